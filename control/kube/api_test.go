package kube

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

// What API drops of an object is nothing that Build reads.
func TestBuildMissesNothingThatAPIDrops(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("%d files, %v", len(paths), err)
	}
	for _, path := range paths {
		a, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		whole, _ := archive(t, a)
		want := text(Build(whole, labConfig))
		kept, _ := archive(t, a)
		keepAll(t, kept.Namespaces)
		keepAll(t, kept.Pods)
		keepAll(t, kept.Services)
		keepAll(t, kept.EndpointSlices)
		keepAll(t, kept.Nodes)
		if diff := cmp.Diff(want, text(Build(kept, labConfig))); diff != "" {
			t.Errorf("%s: (-whole +kept)\n%s", path, diff)
		}
	}
}

func keepAll[T any](t *testing.T, list []T) {
	t.Helper()
	for i, v := range list {
		kept, err := keepRead(v)
		if err != nil {
			t.Fatal(err)
		}
		list[i] = kept.(T)
	}
}
