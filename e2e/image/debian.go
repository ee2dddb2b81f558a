package image

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Package is a Debian package of this machine.
type Package struct {
	Name, Version, Architecture string
}

// Copyright is where Debian keeps the terms under which it may be passed on.
func (p Package) Copyright() string { return "/usr/share/doc/" + p.Name + "/copyright" }

// Packages are those that the files are from, in the order of their names. A file
// of none is an error.
func Packages(ctx context.Context, files []File) ([]Package, error) {
	owners, err := owners(ctx, files)
	if err != nil {
		return nil, err
	}
	text, err := exec.CommandContext(ctx, "dpkg-query", append([]string{"-W", "-f", "${Package} ${Version} ${Architecture}\n"}, owners...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("dpkg-query -W %s: %w", strings.Join(owners, " "), err)
	}
	var found []Package
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) != 3 {
			return nil, fmt.Errorf("dpkg-query -W printed %q", line)
		}
		found = append(found, Package{words[0], words[1], words[2]})
	}
	slices.SortFunc(found, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

// owners are the packages' names as dpkg writes them, each once. It is asked once
// for all files, by every path that each has: /lib is a link to /usr/lib, and
// packages say now one, now the other.
func owners(ctx context.Context, files []File) ([]string, error) {
	var asked []string
	for _, f := range files {
		paths, err := pathsOf(f.Source)
		if err != nil {
			return nil, err
		}
		asked = append(asked, paths...)
	}
	// It complains of every path that is not found, though most are by another.
	text, _ := exec.CommandContext(ctx, "dpkg-query", append([]string{"-S"}, asked...)...).Output()
	owner := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, path, ok := strings.Cut(strings.TrimSpace(line), ": "); ok {
			owner[path] = name
		}
	}
	var all []string
	for _, f := range files {
		paths, _ := pathsOf(f.Source)
		i := slices.IndexFunc(paths, func(path string) bool { return owner[path] != "" })
		if i < 0 {
			return nil, fmt.Errorf("no Debian package has %s", f.Source)
		}
		all = append(all, owner[paths[i]])
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func pathsOf(file string) ([]string, error) {
	real, err := filepath.EvalSymlinks(file)
	return []string{real, strings.TrimPrefix(real, "/usr"), file}, err
}
