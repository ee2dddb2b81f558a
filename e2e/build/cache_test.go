package build

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestOnceFillsOnce: two test processes that start at once must not build twice.
func TestOnceFillsOnce(t *testing.T) {
	t.Setenv(cacheEnv, t.TempDir())
	var fills atomic.Int32
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			dir, err := Once(t.Context(), "key", func(dir string) error {
				fills.Add(1)
				return os.WriteFile(filepath.Join(dir, "file"), nil, 0o644)
			})
			if err == nil {
				_, err = os.Stat(filepath.Join(dir, "file"))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if n := fills.Load(); n != 1 {
		t.Errorf("filled %d times", n)
	}
}

// TestOnceIsAllOrNothing: what a build left half-way, killed or failed, is never
// taken for its result.
func TestOnceIsAllOrNothing(t *testing.T) {
	cache := t.TempDir()
	t.Setenv(cacheEnv, cache)
	if err := os.MkdirAll(filepath.Join(cache, "key.making", "half"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Once(t.Context(), "key", func(string) error { return errors.New("no compiler") }); err == nil {
		t.Error("a failed build is a result")
	}
	dir, err := Once(t.Context(), "key", func(string) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("the result has %v, %v: left by the one before", entries, err)
	}
}

// TestOnceRemovesTheOld: what nobody has asked for in a long time, and nothing else.
func TestOnceRemovesTheOld(t *testing.T) {
	cache := t.TempDir()
	t.Setenv(cacheEnv, cache)
	long := time.Now().Add(-2 * keepFor)
	for _, name := range []string{"image-0123456789abcdef", "tools-0123456789abcdef", "clusters", "image-0123456789abcdef.lock"} {
		dir := filepath.Join(cache, name)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.Chtimes(dir, long, long)); err != nil {
			t.Fatal(err)
		}
	}
	never := func(string) error { return errors.New("it is there") }
	if _, err := Once(t.Context(), "tools-0123456789abcdef", never); err != nil {
		t.Error(err)
	}
	if _, err := Once(t.Context(), "image-fedcba9876543210", func(string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, err := os.ReadDir(cache)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	want := []string{"clusters", "image-0123456789abcdef.lock", "image-fedcba9876543210", "image-fedcba9876543210.lock", "tools-0123456789abcdef"}
	if err != nil || !slices.Equal(left, want) {
		t.Errorf("left are %q, %v; want %q", left, err, want)
	}
}

// TestMissingPackages: the error is the command that helps.
func TestMissingPackages(t *testing.T) {
	err := missing([]need{{"sh", "dash"}, {"no-such-program", "some-package"}}, "lib-dev")
	if err == nil || !strings.HasSuffix(err.Error(), "apt-get install some-package lib-dev") {
		t.Errorf("the error is %v", err)
	}
}

// TestKeyFollowsSources: another source is another key.
func TestKeyFollowsSources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module "+modulePath)
	write("go.sum", "")
	write("main.go", "package main")
	write("main_test.go", "package main")
	m := module{dir: dir, goVersion: "go1.26"}
	key := func() string {
		k, err := m.key("*.go")
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key()
	if write("main_test.go", "package main // changed"); key() != first {
		t.Error("a test is part of the program")
	}
	if write("main.go", "package main // changed"); key() == first {
		t.Error("a changed source has the same key")
	}
}
