package proxy

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain gives the tests the rights of root over namespaces of their own: who
// is not root becomes it in a user namespace. It fails on goroutines left over.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := runChild(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		os.Exit(inUserNamespace())
	}
	if err := dropPrivilegedPorts(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if code == 0 && goroutinesLeft() {
		code = 1
	}
	os.Exit(code)
}

// dropPrivilegedPorts begins again without the right that a proxy lacks: to bind a port
// that takes a privilege. The tests' namespaces have none unless a test says so.
func dropPrivilegedPorts() error {
	if has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_NET_BIND_SERVICE, 0, 0, 0); err != nil || has == 0 {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_BIND_SERVICE, 0, 0, 0); err != nil {
		return fmt.Errorf("drop NET_BIND_SERVICE: %w", err)
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}

func inUserNamespace() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
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

// goroutinesLeft waits, with a bound, until only the test's own goroutine is left.
func goroutinesLeft() bool {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
		if runtime.NumGoroutine() <= 1 {
			return false
		}
	}
	var b strings.Builder
	pprof.Lookup("goroutine").WriteTo(&b, 1)
	fmt.Fprintf(os.Stderr, "goroutines left:\n%s", b.String())
	return true
}
