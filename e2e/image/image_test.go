package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"slices"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestBuild: containerd finds the name, the same files give the same image, and
// other content another.
func TestBuild(t *testing.T) {
	t.Setenv("TACIT_E2E_CACHE", t.TempDir())
	spec := Spec{Name: "tacit.test/x:1", Entrypoint: []string{"/bin/x"}, User: "65532",
		Files: []File{{Path: "/bin/x", Text: "program", Mode: 0o755}, {Path: "/etc/a/b", Link: "/bin/x"}}}
	first, err := Build(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Build(t.Context(), spec); err != nil || again != first {
		t.Errorf("built again: %s, %v; want %s", again, err, first)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(fileOf(t, first, "index.json"), &index); err != nil {
		t.Fatal(err)
	}
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != spec.Name {
		t.Errorf("name %q, want %q", got, spec.Name)
	}
	spec.Files[0].Text = "another program"
	if other, err := Build(t.Context(), spec); err != nil || other == first {
		t.Errorf("other content: %s, %v", other, err)
	}
}

func fileOf(t *testing.T, file, name string) []byte {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s in %s: %v", name, file, err)
		}
		if h.Name == name {
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
	}
}

// TestLayer: folders come before what is in them, each once, and /tmp is
// everybody's.
func TestLayer(t *testing.T) {
	text, err := Spec{Files: []File{{Path: "/b/c/d"}, {Path: "/a"}, {Path: "/b/c/e"}, {Path: "/tmp/f"}}}.layer()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	r := tar.NewReader(bytes.NewReader(text))
	for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "tmp/" && h.Mode != 0o1777 {
			t.Errorf("/tmp has mode %o", h.Mode)
		}
		names = append(names, h.Name)
	}
	want := []string{"tmp/", "a", "b/", "b/c/", "b/c/d", "b/c/e", "tmp/f"}
	if !slices.Equal(names, want) {
		t.Errorf("layer has %q, want %q", names, want)
	}
}
