package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"tacit.dev/e2e/build"
)

// Spec is what an image has. Its zero values are an image's own defaults.
type Spec struct {
	// Name is the reference by which pods ask for it.
	Name       string
	Files      []File
	Entrypoint []string
	Cmd        []string
	// Env are words KEY=VALUE.
	Env []string
	// User is a number, or number:number: there is no /etc/passwd to look names up.
	User   string
	Labels map[string]string
}

// File is a file of an image. Folders above it are made; /tmp is always there.
type File struct {
	// Path is where it is in the image.
	Path string
	// Source is the file of this machine that it is a copy of. Links are followed.
	Source string
	// Text is its content if there is no source.
	Text string
	// Link makes it a symbolic link to that.
	Link string
	Mode int64
}

// Build makes the image, unless it is in the cache, and returns the path of its
// tar. The folder of the tar has nothing else.
func Build(ctx context.Context, s Spec) (string, error) {
	layer, err := s.layer()
	if err != nil {
		return "", fmt.Errorf("image %s: %w", s.Name, err)
	}
	key, err := s.key(layer)
	if err != nil {
		return "", err
	}
	dir, err := build.Once(ctx, "image-"+key, func(dir string) error { return s.write(layer, filepath.Join(dir, "image.tar")) })
	if err != nil {
		return "", fmt.Errorf("image %s: %w", s.Name, err)
	}
	return filepath.Join(dir, "image.tar"), nil
}

// key is a name for the image by its content.
func (s Spec) key(layer []byte) (string, error) {
	s.Files = slices.Clone(s.Files)
	for i := range s.Files {
		s.Files[i].Source = "" // where it came from does not matter
	}
	words, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	sum.Write(words)
	sum.Write(layer)
	return hex.EncodeToString(sum.Sum(nil)[:8]), nil
}

// write writes an OCI layout as a tar. By its annotation containerd knows the name.
func (s Spec) write(layer []byte, file string) error {
	img, err := s.image(layer)
	if err != nil {
		return err
	}
	folder, err := os.MkdirTemp(filepath.Dir(file), ".layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	to, err := layout.Write(folder, empty.Index)
	if err != nil {
		return err
	}
	named := layout.WithAnnotations(map[string]string{"io.containerd.image.name": s.Name, "org.opencontainers.image.ref.name": s.Name})
	if err := to.AppendImage(img, named, layout.WithPlatform(platform())); err != nil {
		return err
	}
	return writeTar(folder, file)
}

func platform() v1.Platform { return v1.Platform{OS: "linux", Architecture: runtime.GOARCH} }

func (s Spec) image(layer []byte) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	// Not compressed: it does not travel, and every node unpacks it.
	img, err := mutate.AppendLayers(img, static.NewLayer(layer, types.OCIUncompressedLayer))
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = platform().OS, platform().Architecture
	config.Config = v1.Config{Entrypoint: s.Entrypoint, Cmd: s.Cmd, User: s.User, Labels: s.Labels, WorkingDir: "/",
		Env: append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/"}, s.Env...)}
	return mutate.ConfigFile(img, config)
}

func writeTar(folder, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(folder)), w.Close())
}

// layer is the tar of the files, in the order of their paths.
func (s Spec) layer() ([]byte, error) {
	var out bytes.Buffer
	l := layerWriter{w: tar.NewWriter(&out), made: map[string]bool{"/": true}}
	if err := l.folder("/tmp", 0o1777); err != nil {
		return nil, err
	}
	files := slices.SortedFunc(slices.Values(s.Files), func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	for _, f := range files {
		if err := l.add(f); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	err := l.w.Close()
	return out.Bytes(), err
}

type layerWriter struct {
	w    *tar.Writer
	made map[string]bool // folders
}

func (l layerWriter) folder(name string, mode int64) error {
	if l.made[name] {
		return nil
	}
	if err := l.folder(path.Dir(name), 0o755); err != nil {
		return err
	}
	l.made[name] = true
	return l.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(name, "/") + "/", Mode: mode})
}

func (l layerWriter) add(f File) error {
	name := path.Clean("/" + f.Path)
	if err := l.folder(path.Dir(name), 0o755); err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: f.Mode}
	if f.Link != "" {
		header.Typeflag, header.Linkname = tar.TypeSymlink, f.Link
		return l.w.WriteHeader(header)
	}
	text := []byte(f.Text)
	if f.Source != "" {
		var err error
		if text, err = os.ReadFile(f.Source); err != nil {
			return err
		}
	}
	header.Size = int64(len(text))
	if err := l.w.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(l.w, bytes.NewReader(text))
	return err
}
