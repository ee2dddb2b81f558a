package lab_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Whoever has a lab on a leash may be killed at any time: then all is gone.
func TestKilledWithItsOwner(t *testing.T) {
	holder, err := exec.LookPath("hold")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "tacit-hold-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command(holder, dir)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), storyMark+"=held")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "up\n" {
		t.Fatalf("the lab did not come up: %q %v", line, err)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := settle(func() error { return leakedProcesses("held") }); err != nil {
		t.Error(err)
	}
}

// Who starts a lab by a pipe gets to its end though the lab goes on; what else people ask
// of a lab is asked here, too.
func TestUpInAPipe(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tacit := func(words ...string) string {
		t.Helper()
		out, err := exec.CommandContext(ctx, "tacit", append([]string{"lab"}, words...)...).CombinedOutput() // reads to the end
		if err != nil {
			t.Fatalf("%v: %v: %s", words, err, out)
		}
		return string(out)
	}
	if said := tacit("up", "bin="+os.Getenv("TACIT_BIN")); !strings.HasPrefix(said, "a lab is up") {
		t.Errorf("up: %s", said)
	}
	defer tacit("down")
	tacit("node", "n1")
	if page := tacit("dump", "n1/proxy", "/debug/pprof/goroutine?debug=1"); !strings.Contains(page, "goroutine profile:") {
		t.Errorf("dump of a path with a query: %.200s", page)
	}
	tacit("pod", "n1/client")
	tacit("start", "talk", "client", "--", "sh", "-c", "echo one; echo two; echo three")
	tacit("wait", "talk")
	if said := tacit("log", "talk"); said != "one\ntwo\nthree\n" {
		t.Errorf("log of a job: %q", said)
	}
	if said := tacit("log", "talk", "^t"); said != "two\nthree\n" {
		t.Errorf("lines of a log: %q", said)
	}
	tacit("stop", "n1/agent")
	tacit("label", "namespace", "default", "tacit.dev/mesh=on")
	for said := ""; !strings.Contains(said, "is not connected"); said = tacit("status") {
		if ctx.Err() != nil {
			t.Fatalf("no reason in: %s", said)
		}
	}
}
