package lab_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tacit.dev/cli"
)

// storyMark is in the environment of every process that a test started, so that
// one that stayed behind is found.
const storyMark = "TACIT_STORY"

// TestMain makes this binary serve as the program tacit, too.
func TestMain(m *testing.M) {
	testscript.Main(suite{m}, map[string]func(){
		"tacit": func() { os.Exit(cli.Main("test", os.Args[1:])) },
		"hold":  func() { os.Exit(hold(os.Args[1])) },
	})
}

// suite is all tests, with what comes before and after them.
type suite struct{ *testing.M }

// Run builds the programs, runs the tests, and fails if anything stayed behind.
func (s suite) Run() int {
	os.Setenv(storyMark, strconv.Itoa(os.Getpid()))
	remove, err := buildPrograms()
	defer remove()
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	goroutines, mounts := runtime.NumGoroutine(), namespaceMounts()
	code := s.M.Run()
	for what, err := range map[string]error{
		"goroutines": settle(func() error { return leakedGoroutines(goroutines) }),
		"processes":  settle(func() error { return leakedProcesses(os.Getenv(storyMark)) }),
		"mounts":     settle(func() error { return leakedMounts(mounts) }),
	} {
		if err != nil {
			fmt.Fprintf(os.Stderr, "leaked %s: %v\n", what, err)
			code = max(code, 1)
		}
	}
	return code
}

// buildPrograms puts Tacit's programs where TACIT_BIN says, or makes them. With
// TACIT_RACE they have the race detector, like a test binary with -race.
func buildPrograms() (remove func(), err error) {
	if os.Getenv("TACIT_BIN") != "" {
		return func() {}, nil
	}
	dir, err := os.MkdirTemp("", "tacit-bin-")
	if err != nil {
		return func() {}, err
	}
	remove = func() { os.RemoveAll(dir) }
	os.Setenv("TACIT_BIN", dir)
	args := []string{"build", "-o", dir}
	if os.Getenv("TACIT_RACE") != "" {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "tacit.dev/cmd/tacit-control", "tacit.dev/cmd/tacit-node", "tacit.dev/cmd/tacit-cni")...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return remove, cmd.Run()
}

// settle gives what has ended a moment to be gone.
func settle(check func() error) error {
	var err error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = check(); err == nil {
			return nil
		}
	}
	return err
}

func leakedGoroutines(before int) error {
	if runtime.NumGoroutine() <= before {
		return nil
	}
	buf := make([]byte, 1<<20)
	return fmt.Errorf("%d, before %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
}

// leakedProcesses looks for the mark in the environment of all processes. Without
// the processes their pid, mount and network namespaces are gone, too.
func leakedProcesses(of string) error {
	mark := []byte(storyMark + "=" + of + "\x00")
	self := strconv.Itoa(os.Getpid())
	paths, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	for _, path := range paths {
		pid := filepath.Base(filepath.Dir(path))
		env, err := os.ReadFile(path)
		if err != nil || pid == self || !bytes.Contains(env, mark) {
			continue
		}
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		return fmt.Errorf("process %s: %s", pid, bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
	}
	return nil
}

// namespaceMounts counts namespaces that are bound to a file where labs bind them, in
// the test's own mount namespace. A lab may do so in its own only.
func namespaceMounts() (n int) {
	text, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, " /run/netns/") && strings.Contains(line, " - nsfs ") {
			n++
		}
	}
	return n
}

func leakedMounts(before int) error {
	if now := namespaceMounts(); now > before {
		return fmt.Errorf("%d bound namespaces, before %d", now, before)
	}
	return nil
}
