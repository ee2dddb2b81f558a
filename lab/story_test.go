package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"tacit.dev/lab"
)

// TestStories runs testdata/*.txtar, each in a lab of its own. The verbs are those
// of tacit lab; "up OPTION..." comes first.
func TestStories(t *testing.T) {
	cmds := map[string]func(*testscript.TestScript, bool, []string){
		"lab": labVerb, "up": upVerb, "host": hostVerb, "eventually": eventuallyVerb, "cgroup": cgroupVerb,
	}
	for _, name := range lab.Verbs() {
		if !slices.Contains(reserved, name) {
			cmds[name] = func(ts *testscript.TestScript, not bool, args []string) {
				labVerb(ts, not, append([]string{name}, args...))
			}
		}
	}
	testscript.Run(t, testscript.Params{
		Files: stories(t),
		Cmds:  cmds,
		Setup: setupStory,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Getuid() == 0, nil
			case "cgroups":
				return memoryGroups() != "", nil
			case "soak":
				return os.Getenv("TACIT_SOAK") != "", nil
			}
			return false, fmt.Errorf("unknown condition %s", cond)
		},
	})
}

// reserved are the verbs whose names testscript keeps for itself.
var reserved = []string{"exec", "stop", "kill", "wait"}

var reservedLine = regexp.MustCompile(`(?m)^((?:\[[^\]]*\] *)*(?:! *)?)(` + strings.Join(reserved, "|") + `)( |$)`)

// stories are the scripts, with the reserved verbs written "lab VERB": in a story
// "exec" runs something in a pod, never on the host.
func stories(t *testing.T) []string {
	names, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	dir := t.TempDir()
	var out []string
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if soaking(text) && os.Getenv("TACIT_SOAK") == "" {
			continue
		}
		script, files, _ := strings.Cut("\n"+string(text), "\n-- ")
		if files != "" {
			files = "\n-- " + files
		}
		script = reservedLine.ReplaceAllString(strings.TrimPrefix(script, "\n"), "${1}lab $2$3")
		path := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(path, []byte(script+files), 0o644); err != nil {
			t.Fatal(err)
		}
		out = append(out, path)
	}
	return out
}

// soaking stories say in their first line that they take long.
func soaking(text []byte) bool { return strings.HasPrefix(string(text), "# soak:") }

// verbLimit is longer than any verb of a story takes: one of make soak waits for an hour.
const verbLimit = 70 * time.Minute

type labKey struct{}

// story is the lab of one script.
type story struct {
	dir     string
	started *lab.Started
	stderr  *os.File
	// groups are the memory cgroups that it has made.
	groups map[string]*group
}

func setupStory(env *testscript.Env) error {
	// Short, since the path of a unix socket must be.
	dir, err := os.MkdirTemp("", "tacit-story-")
	if err != nil {
		return err
	}
	s := &story{dir: dir}
	env.Values[labKey{}] = s
	env.Defer(func() { s.end(env.T()) })
	env.Setenv("LAB", filepath.Join(dir, "run"))
	return nil
}

func upVerb(ts *testscript.TestScript, not bool, args []string) {
	s := ts.Value(labKey{}).(*story)
	program, err := exec.LookPath("tacit")
	ts.Check(err)
	s.stderr, err = os.Create(filepath.Join(s.dir, "lab.err"))
	ts.Check(err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s.started, err = lab.Start(ctx, lab.StartConfig{
		Program: program, Dir: s.dir, Leashed: true, Stderr: s.stderr,
		Options: append([]string{"bin=" + os.Getenv("TACIT_BIN")}, args...),
	})
	if not == (err == nil) {
		said, _ := os.ReadFile(s.stderr.Name())
		ts.Fatalf("up: %v\n%s", err, said)
	}
}

// end takes the lab down; of a failed story it shows the logs.
func (s *story) end(t testscript.T) {
	if tb, ok := t.(testing.TB); ok && tb.Failed() {
		t.Log(s.logs())
		if keep := os.Getenv("TACIT_LOGS"); keep != "" { // all of them, for whoever looks into it
			s.dump()
			t.Log(os.CopyFS(filepath.Join(keep, filepath.Base(s.dir)), os.DirFS(filepath.Join(s.dir, "run", "logs"))))
		}
	}
	if err := s.crashes(); err != nil {
		defer t.Fatal(err)
	}
	if s.started != nil {
		if err := s.started.Process.Kill(); err != nil && !strings.Contains(err.Error(), "finished") {
			t.Log(err)
		}
		_ = s.started.Wait() // killed, and says so
	}
	for _, g := range s.groups {
		if err := g.remove(); err != nil {
			defer t.Fatal(err)
		}
	}
	if s.stderr != nil {
		s.stderr.Close()
	}
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
}

// dump puts what the processes tell of themselves next to their logs.
func (s *story) dump() {
	for _, process := range []string{"control", "n1/agent", "n1/proxy", "n2/agent", "n2/proxy"} {
		for _, page := range []string{"/dump/status", "/dump/pods", "/metrics", "/debug/pprof/goroutine?debug=2"} {
			name := strings.NewReplacer("/", "-", "?", "-").Replace(process + page)
			out, err := os.Create(filepath.Join(s.dir, "run", "logs", name))
			if err != nil {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_, _ = lab.Do(ctx, lab.Call{Dir: s.dir, Args: []string{"dump", process, page}, Stdin: out, Stdout: out, Stderr: out})
			cancel()
			out.Close()
		}
	}
}

// crashes tells of a process that fell over its own feet, which a story might not
// notice: it is started again at once.
func (s *story) crashes() error {
	names, err := filepath.Glob(filepath.Join(s.dir, "run", "logs", "*.log"))
	for _, name := range append(names, filepath.Join(s.dir, "lab.err")) {
		text, _ := os.ReadFile(name) // a lab that never came up has none
		for _, bad := range []string{"DATA RACE", "panic: ", "fatal error: "} {
			if i := bytes.Index(text, []byte(bad)); i >= 0 {
				err = errors.Join(err, fmt.Errorf("%s: %s", filepath.Base(name), text[i:min(len(text), i+4000)]))
			}
		}
	}
	return err
}

// logs are the last lines of every process, and before them some of those that tell of
// something that went wrong.
func (s *story) logs() string {
	var b strings.Builder
	names, _ := filepath.Glob(filepath.Join(s.dir, "run", "logs", "*.log"))
	for _, name := range append(names, filepath.Join(s.dir, "lab.err")) {
		text, err := os.ReadFile(name)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		end := max(0, len(lines)-25)
		wrong := slices.DeleteFunc(slices.Clone(lines[:end]), func(l string) bool {
			return !strings.Contains(l, "flags=") && !strings.Contains(l, "level=WARN") && !strings.Contains(l, "level=ERROR")
		})
		shown := append(wrong[max(0, len(wrong)-40):], lines[end:]...)
		fmt.Fprintf(&b, "== %s %v\n%s\n", filepath.Base(name), errOrNothing(err), strings.Join(shown, "\n"))
	}
	return b.String()
}

func errOrNothing(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// labVerb asks the story's lab.
func labVerb(ts *testscript.TestScript, not bool, args []string) {
	code := ask(ts, not && lab.TakesNot(args[0]), args)
	wantFailure := not && !lab.TakesNot(args[0])
	if wantFailure && code == 0 {
		ts.Fatalf("%s: it succeeded", strings.Join(args, " "))
	}
	if !wantFailure && code != 0 {
		ts.Fatalf("%s: exit code %d", strings.Join(args, " "), code)
	}
}

// eventuallyVerb asks again until it succeeds: for what others have to be told of
// first. It asks at most ten seconds long.
func eventuallyVerb(ts *testscript.TestScript, not bool, args []string) {
	if not || len(args) == 0 {
		ts.Fatalf("usage: eventually VERB...")
	}
	for deadline := time.Now().Add(10 * time.Second); ask(ts, false, args) != 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("%s: not within ten seconds", strings.Join(args, " "))
		}
	}
}

// ask returns the exit code of a verb; what it says is the script's stdout and stderr.
func ask(ts *testscript.TestScript, not bool, args []string) int {
	s := ts.Value(labKey{}).(*story)
	if s.started == nil {
		ts.Fatalf("the lab is not up: the first verb is up")
	}
	stdin, err := os.Open(os.DevNull)
	ts.Check(err)
	defer stdin.Close()
	stdout, stderr := memory(ts), memory(ts)
	defer stdout.Close()
	defer stderr.Close()
	ctx, cancel := context.WithTimeout(context.Background(), verbLimit)
	defer cancel()
	code, err := lab.Do(ctx, lab.Call{
		Dir: s.dir, Args: args, WorkDir: ts.MkAbs("."), Not: not,
		Stdin: stdin, Stdout: stdout, Stderr: stderr,
	})
	show(ts, stdout, ts.Stdout())
	show(ts, stderr, ts.Stderr())
	ts.Check(err)
	return code
}

// memory is a file that a process may write to and that is nowhere.
func memory(ts *testscript.TestScript) *os.File {
	fd, err := unix.MemfdCreate("story", unix.MFD_CLOEXEC)
	ts.Check(err)
	return os.NewFile(uintptr(fd), "memory")
}

func show(ts *testscript.TestScript, from *os.File, to interface{ Write([]byte) (int, error) }) {
	_, err := from.Seek(0, 0)
	ts.Check(err)
	var buf [64 << 10]byte
	for {
		n, err := from.Read(buf[:])
		_, _ = to.Write(buf[:n])
		if n == 0 || err != nil {
			return
		}
	}
}

// hostVerb runs a program outside of the lab.
func hostVerb(ts *testscript.TestScript, not bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: host PROGRAM ARG...")
	}
	if err := ts.Exec(args[0], args[1:]...); not == (err == nil) {
		ts.Fatalf("host %s: %v", strings.Join(args, " "), err)
	}
}

// hold is a process of its own that has a lab on a leash.
func hold(dir string) int {
	program, err := exec.LookPath("tacit")
	if err != nil {
		return 1
	}
	s, err := lab.Start(context.Background(), lab.StartConfig{
		Program: program, Dir: dir, Leashed: true, Stderr: os.Stderr, Options: []string{"mesh=off"},
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("up")
	_ = s.Wait()
	return 0
}
