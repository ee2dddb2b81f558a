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

// Packages are those that the files are from, in the order of their names.
func Packages(ctx context.Context, files []File) ([]Package, error) {
	var found []Package
	for _, f := range files {
		p, err := packageOf(ctx, f.Source)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(found, p) {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

func packageOf(ctx context.Context, file string) (Package, error) {
	name, err := ownerOf(ctx, file)
	if err != nil {
		return Package{}, err
	}
	text, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture}", name).Output()
	words := strings.Fields(string(text))
	if err != nil || len(words) != 3 {
		return Package{}, fmt.Errorf("dpkg-query -W %s: %q, %w", name, text, err)
	}
	return Package{words[0], words[1], words[2]}, nil
}

// ownerOf asks by every path that the file has: /lib is a link to /usr/lib, and
// packages say now one, now the other.
func ownerOf(ctx context.Context, file string) (string, error) {
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return "", err
	}
	for _, path := range []string{real, strings.TrimPrefix(real, "/usr"), file} {
		text, err := exec.CommandContext(ctx, "dpkg-query", "-S", path).Output()
		if name, _, found := strings.Cut(string(text), ": "); err == nil && found {
			return name, nil
		}
	}
	return "", fmt.Errorf("no Debian package has %s", file)
}
