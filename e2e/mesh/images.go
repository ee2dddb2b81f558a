package mesh

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/image"
	"tacit.dev/e2e/product"
)

const (
	// LabImage has the program tacit, for the lab's application: its arguments are
	// those of "tacit lab app".
	LabImage = "tacit.test/lab:1"
	// ProgramsImage has nginx, PostgreSQL and Redis with their clients, curl,
	// openssl and a shell. Its user is root unless the pod says otherwise; postgres
	// is 70.
	ProgramsImage = "tacit.test/programs:1"
	// FortioImage has the program of e2e/load.
	FortioImage = "tacit.test/load:1"

	// NextVersion is the tag of a second version of Tacit, built from the same sources.
	NextVersion = "next"

	registry = "tacit.test"
	version  = "e2e"
)

// words are for people who read /etc/passwd, and for initdb, which wants a name.
var users = map[string]string{
	"/etc/passwd": "root:x:0:0:root:/:/bin/sh\npostgres:x:70:70:postgres:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
	"/etc/group":  "root:x:0:\npostgres:x:70:\nnogroup:x:65534:\n",
}

// tools are what the scripts of tests call.
var tools = []string{
	"/bin/sh", "/bin/cat", "/bin/chmod", "/bin/date", "/bin/grep", "/bin/ls", "/bin/mkdir", "/bin/sed", "/bin/sleep",
	"/usr/bin/env", "/usr/bin/head", "/usr/bin/id", "/usr/bin/seq", "/usr/bin/sha256sum", "/usr/bin/sort", "/usr/bin/tail", "/usr/bin/tr",
	"/usr/bin/uniq", "/usr/bin/wc", "/usr/bin/curl", "/usr/bin/openssl", "/usr/sbin/nginx", "/usr/bin/redis-server", "/usr/bin/redis-cli",
	"/usr/bin/redis-benchmark",
}

// images makes Tacit's and the tests' images that are not in the cache.
func (o Options) images(ctx context.Context, made product.Images) ([]string, error) {
	specs := []image.Spec{{Name: LabImage, Entrypoint: []string{"/tacit", "lab", "app"},
		Files: []image.File{{Path: "/tacit", Source: filepath.Join(made.Programs, "tacit"), Mode: 0o755}}}}
	if o.Load {
		program, err := build.Load(ctx, cmp.Or[io.Writer](o.Progress, io.Discard))
		if err != nil {
			return nil, err
		}
		specs = append(specs, image.Spec{Name: FortioImage, Entrypoint: []string{"/load"}, Files: []image.File{{Path: "/load", Source: program, Mode: 0o755}}})
	}
	if o.Programs {
		spec, err := programs()
		if err != nil {
			return nil, fmt.Errorf("%w (make packages installs what tests use)", err)
		}
		specs = append(specs, spec)
	}
	tars := []string{made.Node, made.Control}
	for _, s := range specs {
		tar, err := image.Build(ctx, s)
		if err != nil {
			return nil, err
		}
		tars = append(tars, tar)
	}
	return tars, nil
}

// programs are Debian's, from the packages of this machine.
func programs() (image.Spec, error) {
	postgres, err := postgresFolder()
	if err != nil {
		return image.Spec{}, err
	}
	spec := image.Spec{Name: ProgramsImage, Entrypoint: []string{"/bin/sh"},
		Env: []string{"PATH=" + postgres + "/bin:/usr/local/bin:/usr/sbin:/usr/bin:/bin"}}
	for path, text := range users {
		spec.Files = append(spec.Files, image.File{Path: path, Text: text, Mode: 0o644})
	}
	wanted := slices.Clone(tools)
	for _, name := range []string{"bin/initdb", "bin/postgres", "bin/psql", "bin/pgbench", "lib/plpgsql.so", "lib/dict_snowball.so"} {
		wanted = append(wanted, filepath.Join(postgres, name))
	}
	for _, path := range wanted {
		files, err := image.Program(path)
		if err != nil {
			return spec, err
		}
		spec.Files = append(spec.Files, files...)
	}
	shared, err := folder("/usr/share/postgresql/" + filepath.Base(postgres))
	spec.Files = append(spec.Files, shared...)
	spec.Files = unique(spec.Files)
	return spec, err
}

// postgresFolder is the newest version's.
func postgresFolder() (string, error) {
	all, err := filepath.Glob("/usr/lib/postgresql/*")
	if err != nil || len(all) == 0 {
		return "", errors.New("no PostgreSQL in /usr/lib/postgresql")
	}
	return slices.Max(all), nil
}

// folder is all files of a folder of this machine.
func folder(root string) (files []image.File, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return nil // a link to a package that is not there
		}
		files = append(files, image.File{Path: path, Source: path, Mode: 0o644})
		return nil
	})
	return files, err
}

// unique leaves one file of each path: programs share libraries.
func unique(files []image.File) []image.File {
	seen := map[string]bool{}
	return slices.DeleteFunc(files, func(f image.File) bool {
		had := seen[f.Path]
		seen[f.Path] = true
		return had
	})
}
