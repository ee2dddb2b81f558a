package tacit

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// notice is how NOTICE begins.
const notice = `Tacit
Copyright The Tacit Authors

This product is licensed under the Apache License, Version 2.0: see LICENSE. Its programs contain
the following modules, whose notices are:
`

// TestReferenceOfNotices compares NOTICE with the notices of the modules that are linked into the
// programs. With -update it writes that.
func TestReferenceOfNotices(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}} {{.Dir}}{{end}}", "./cmd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	modules := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(modules)
	text := notice
	for _, m := range slices.Compact(modules) {
		path, dir, _ := strings.Cut(m, " ")
		files, err := filepath.Glob(filepath.Join(dir, "NOTICE*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			of, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if path != module {
				text += "\n" + strings.Repeat("-", 72) + "\n" + path + "\n\n" + strings.TrimSpace(string(of)) + "\n"
			}
		}
	}
	is, err := os.ReadFile("NOTICE")
	switch {
	case *update:
		err = os.WriteFile("NOTICE", []byte(text), 0o644)
	case err == nil && string(is) != text:
		t.Error("NOTICE is not what the modules of the programs say. Run: make reference")
	}
	if err != nil {
		t.Error(err)
	}
}
