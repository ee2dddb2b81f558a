package netns

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"syscall"
	"testing"
	"time"
)

// TestMain gives the tests the rights of root over namespaces of their own: who
// is not root becomes it in a user namespace. It fails on goroutines left over.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		os.Exit(inUserNamespace())
	}
	code := m.Run()
	// The fuzzer's own goroutines are not ours to wait for.
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if code == 0 && !fuzzing && goroutinesLeft() {
		code = 1
	}
	os.Exit(code)
}

func inUserNamespace() int {
	// Cgroups can be made only by who is root of the machine.
	cmd := exec.Command("/proc/self/exe", append(os.Args[1:], "-test.skip=^TestFindInRealCgroups$")...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "user namespace (sysctl kernel.unprivileged_userns_clone=1, or run as root): %v\n", err)
		return 1
	}
	return 0
}

// goroutinesLeft waits, with a bound, until only this goroutine is left.
func goroutinesLeft() bool {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
		if runtime.NumGoroutine() <= 1 {
			return false
		}
	}
	fmt.Fprintln(os.Stderr, "goroutines left:")
	pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	return true
}
