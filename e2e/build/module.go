package build

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

const modulePath = "tacit.dev/e2e"

// module is this Go module on disk.
type module struct {
	dir       string
	goVersion string
	versions  map[string]string // of the modules it requires
}

// findModule looks from the working folder upwards: tests run in their package's
// folder, people in any.
func findModule(ctx context.Context) (module, error) {
	dir, err := moduleDir()
	if err != nil {
		return module{}, err
	}
	m := module{dir: dir, versions: map[string]string{}}
	var version []byte
	if version, err = m.goCommand(ctx, "env", "GOVERSION").Output(); err != nil {
		return module{}, fmt.Errorf("go env in %s: %w (Go must be installed)", dir, err)
	}
	m.goVersion = string(bytes.TrimSpace(version))
	return m, m.readVersions(ctx)
}

func moduleDir() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		for _, d := range []string{dir, filepath.Join(dir, "e2e")} {
			text, err := os.ReadFile(filepath.Join(d, "go.mod"))
			if err == nil && bytes.HasPrefix(text, []byte("module "+modulePath+"\n")) {
				return d, nil
			}
		}
		if dir == "/" {
			return "", errors.New("the sources of " + modulePath + " are not above " + start + ": run it in the clone")
		}
	}
}

func (m module) readVersions(ctx context.Context) error {
	text, err := m.goCommand(ctx, "mod", "edit", "-json").Output()
	if err != nil {
		return fmt.Errorf("read %s/go.mod: %w", m.dir, err)
	}
	var mod struct {
		Require []struct{ Path, Version string }
	}
	if err := json.Unmarshal(text, &mod); err != nil {
		return err
	}
	for _, r := range mod.Require {
		m.versions[r.Path] = r.Version
	}
	return nil
}

// key is the hash of what a build depends on: the module's requirements, the
// sources of these patterns, and the Go version.
func (m module) key(patterns ...string) (string, error) {
	files := []string{filepath.Join(m.dir, "go.mod"), filepath.Join(m.dir, "go.sum")}
	for _, p := range patterns {
		found, err := filepath.Glob(filepath.Join(m.dir, p))
		if err != nil || len(found) == 0 {
			return "", fmt.Errorf("no sources %s in %s: %w", p, m.dir, err)
		}
		files = append(files, slices.DeleteFunc(found, func(f string) bool { return strings.HasSuffix(f, "_test.go") })...)
	}
	return hash([]string{m.goVersion, runtime.GOOS, runtime.GOARCH}, files)
}

func (m module) goCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	return cmd
}

func (m module) goBuild(ctx context.Context, dir string, t target, out io.Writer) error {
	args := []string{"build", "-v", "-trimpath", "-tags", t.tags, "-ldflags", "-s -w " + t.ldflags, "-o", filepath.Join(dir, t.to)}
	if strings.HasSuffix(t.to, "/") {
		args[len(args)-1] += "/"
	}
	cmd := m.goCommand(ctx, append(args, t.packages...)...)
	cmd.Env = append(cmd.Env, "CGO_ENABLED="+map[bool]string{true: "1", false: "0"}[t.cgo])
	p := &progress{what: t.what, out: out, begin: time.Now(), last: time.Now()}
	if err := run(cmd, p.line); err != nil {
		return fmt.Errorf("build %s: %w\n%s", t.what, err, p.tail())
	}
	return nil
}

// run runs cmd and hands on each line of its standard error.
func run(cmd *exec.Cmd, line func(string)) error {
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line(lines.Text())
	}
	return errors.Join(lines.Err(), cmd.Wait())
}

// progress tells from what go build -v prints, a package a line, that it goes on.
type progress struct {
	what        string
	out         io.Writer
	begin, last time.Time
	packages    int
	lines       []string
}

func (p *progress) line(text string) {
	if !strings.ContainsAny(text, " :") {
		p.packages++
	}
	p.lines = append(p.lines, text)
	if time.Since(p.last) < 10*time.Second {
		return
	}
	p.last = time.Now()
	fmt.Fprintf(p.out, "  %s: %d packages compiled after %s; now %s\n", p.what, p.packages, time.Since(p.begin).Round(time.Second), text)
}

func (p *progress) tail() string { return strings.Join(p.lines[max(0, len(p.lines)-20):], "\n") }
