package lab_test

import (
	"bufio"
	"os"
	"os/exec"
	"syscall"
	"testing"
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
