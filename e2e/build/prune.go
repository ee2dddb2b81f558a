package build

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// keepFor is how long a folder stays that nobody asks for: every change of a
// source leaves one behind.
const keepFor = 7 * 24 * time.Hour

// folderName is how Once's callers name what they make: a word and a hash.
var folderName = regexp.MustCompile(`^[a-z]+-[0-9a-f]{16}$`)

// used reports whether the folder is there, and notes on it that it was asked for.
func used(dir string) bool {
	now := time.Now()
	return os.Chtimes(dir, now, now) == nil
}

// prune removes what was not asked for during keepFor. Locks stay: who waits for
// one would hold another file than who comes later.
func prune(cache string, now time.Time) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".old") { // left by one who was killed
			errs = append(errs, os.RemoveAll(filepath.Join(cache, e.Name())))
			continue
		}
		info, err := e.Info()
		if err != nil || !e.IsDir() || !folderName.MatchString(e.Name()) || now.Sub(info.ModTime()) < keepFor {
			continue // or just removed by somebody else
		}
		old := filepath.Join(cache, e.Name()+".old")
		if os.Rename(filepath.Join(cache, e.Name()), old) == nil { // complete or absent, also now
			errs = append(errs, os.RemoveAll(old))
		}
	}
	return errors.Join(errs...)
}
