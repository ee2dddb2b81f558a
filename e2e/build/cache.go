package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// cacheEnv overrides where the programs are kept.
const cacheEnv = "TACIT_E2E_CACHE"

// Cache is the folder of everything that outlives a run: programs, images, and
// the folders of running clusters.
func Cache() (string, error) {
	dir := os.Getenv(cacheEnv)
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("no place for programs: %w (set %s)", err, cacheEnv)
		}
		dir = filepath.Join(user, "tacit-e2e")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// Once returns the cached folder of that key, and has fill make it if there is
// none. A folder is complete or absent: it is filled beside its place and renamed.
// Several processes may call it at once; one fills, the others wait. What was not
// asked for during a week is removed when something new is made.
func Once(ctx context.Context, key string, fill func(dir string) error) (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, key)
	if used(dir) {
		return dir, nil
	}
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if used(dir) {
		return dir, nil
	}
	return dir, errors.Join(fillAndRename(dir, fill), prune(cache, time.Now()))
}

func fillAndRename(dir string, fill func(string) error) error {
	tmp := dir + ".making" // perhaps left by one who was killed; the lock says that nobody is at it
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := fill(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// lock takes the file's lock; ctx ends the wait for it.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = Poll(ctx, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s, which another build holds: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// hash is a name for the content of these files, and these words.
func hash(words []string, files []string) (string, error) {
	sum := sha256.New()
	for _, w := range words {
		fmt.Fprintf(sum, "%q\n", w)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%x\n", sha256.Sum256(text))
	}
	return hex.EncodeToString(sum.Sum(nil)[:8]), nil
}
