package image

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Program is a program or library of this machine with its loader and all
// libraries that they name, each where it is on this machine: it runs in an image
// that has nothing else. What is only opened while it runs (dlopen) is named by
// nobody: the caller adds it.
func Program(file string) ([]File, error) {
	c := closure{}
	if err := c.add(file); err != nil {
		return nil, fmt.Errorf("what %s needs to run: %w", file, err)
	}
	return c.files, nil
}

// closure is what was found so far.
type closure struct{ files []File }

func (c *closure) has(path string) bool {
	return slices.ContainsFunc(c.files, func(f File) bool { return f.Path == path })
}

func (c *closure) add(path string) error {
	if c.has(path) {
		return nil
	}
	needs, err := needsOf(path)
	if err != nil {
		return err
	}
	c.files = append(c.files, File{Path: path, Source: path, Mode: 0o755})
	for _, n := range needs {
		if !strings.Contains(n, "/") {
			if n, err = findLibrary(n); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		if c.loads(n) {
			continue
		}
		if err := c.add(n); err != nil {
			return err
		}
	}
	return nil
}

// loads says that the library is the loader, which libc names without its folder.
func (c *closure) loads(path string) bool {
	return slices.ContainsFunc(c.files, func(f File) bool {
		return filepath.Base(f.Path) == filepath.Base(path) && strings.HasPrefix(filepath.Base(path), "ld-linux")
	})
}

// needsOf are the loader, by its path, and the libraries, by their names.
func needsOf(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var needs []string
	if section := f.Section(".interp"); section != nil {
		text, err := section.Data()
		if err != nil {
			return nil, err
		}
		needs = append(needs, strings.TrimRight(string(text), "\x00"))
	}
	libraries, err := f.ImportedLibraries()
	return append(needs, libraries...), err
}

// findLibrary looks where Debian's loader looks when it is told nothing.
func findLibrary(name string) (string, error) {
	arch := map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[runtime.GOARCH]
	folders := []string{"/lib/" + arch, "/usr/lib/" + arch, "/lib", "/usr/lib"}
	for _, folder := range folders {
		path := filepath.Join(folder, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s in %s", name, strings.Join(folders, ", "))
}
