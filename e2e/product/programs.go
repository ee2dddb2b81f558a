package product

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"tacit.dev/e2e/build"
)

// programs of the product, as its Makefile builds them.
var programs = []string{"tacit", "tacit-control", "tacit-node", "tacit-cni"}

// Programs makes the programs that are not in the cache and returns their folder.
// The same sources and version are built once.
func Programs(ctx context.Context, version string, out io.Writer) (string, error) {
	root, err := Sources()
	if err != nil {
		return "", err
	}
	key, err := keyOf(ctx, root, version)
	if err != nil {
		return "", err
	}
	return build.Once(ctx, "tacit-"+key, func(dir string) error {
		fmt.Fprintln(out, "building Tacit", version)
		return compile(ctx, root, dir, version)
	})
}

// Sources is the folder of the product: the one above this module.
func Sources() (string, error) {
	dir, err := build.ModuleDir()
	if err != nil {
		return "", err
	}
	root := filepath.Dir(dir)
	if _, err := os.Stat(filepath.Join(root, "cmd", "tacit-node")); err != nil {
		return "", fmt.Errorf("the sources of Tacit are not above %s: %w", dir, err)
	}
	return root, nil
}

// compile builds without the clone's state in the programs: the same sources are
// the same programs in every clone.
func compile(ctx context.Context, root, dir, version string) error {
	args := []string{"build", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-ldflags", "-s -w -X main.version=" + version, "-o", dir + "/"}
	for _, p := range programs {
		args = append(args, "./cmd/"+p)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build Tacit in %s: %w\n%s", root, err, text)
	}
	return nil
}

// keyOf is a hash of all that the programs are made of.
func keyOf(ctx context.Context, root, version string) (string, error) {
	goVersion, err := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOARCH").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w (Go must be installed)", err)
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%s %s\n", goVersion, version)
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return enterable(name, d)
		}
		if !d.Type().IsRegular() || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		fmt.Fprintf(sum, "%q %x\n", name, sha256.Sum256(text))
		return err
	})
	return hex.EncodeToString(sum.Sum(nil)[:8]), err
}

// enterable leaves out what no program is made of.
func enterable(name string, d fs.DirEntry) error {
	apart := []string{"bin", "bench", "docs", "e2e"}
	if name != "." && (strings.HasPrefix(d.Name(), ".") || slices.Contains(apart, name) || d.Name() == "testdata") {
		return fs.SkipDir
	}
	return nil
}
