package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Init is the lab's first process, pid 1 of its pid namespace. It arranges the
// mounts, starts the lab proper (Serve) as a child, and reaps whatever ends: the
// lab's own waits are for its own children only. When the lab ends so does Init,
// and the kernel kills all that is left in the namespace.
//
// The folder root becomes /run/lab. Descriptor 3 takes the word "ready" or an error.
func Init(root string, options []string) error {
	ready := os.NewFile(3, "ready")
	if err := arrangeMounts(root); err != nil {
		fmt.Fprintln(ready, err)
		return err
	}
	raiseFileLimit()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(program, append([]string{"lab", "serve"}, options...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ready}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return err
	}
	ready.Close()
	return reap(cmd.Process.Pid)
}

// arrangeMounts makes the mounts private, gives the lab a /proc of its pid
// namespace and an empty /run with the lab's folder in it: services that keep
// their sockets in /run never meet the host's.
func arrangeMounts(root string) error {
	// Opened first: the folder may lie below the host's /run, which is about to
	// be covered.
	folder, err := os.Open(root)
	if err != nil {
		return err
	}
	defer folder.Close()
	steps := []struct {
		what string
		do   func() error
	}{
		{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"mount /proc", func() error {
			return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}},
		{"mount /run", func() error { return unix.Mount("lab", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755") }},
		{"make " + inside, func() error { return os.Mkdir(inside, 0o755) }},
		{"bind the lab's folder", func() error {
			return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", folder.Fd()), inside, "", unix.MS_BIND, "")
		}},
		{"make " + scratchDir, func() error {
			return errors.Join(os.Mkdir(scratchDir, 0o777), os.Chmod(scratchDir, 0o777|os.ModeSticky))
		}},
		{"make " + netnsDir, func() error { return os.Mkdir(netnsDir, 0o755) }},
		{"mount " + netnsDir, func() error { return unix.Mount("lab-netns", netnsDir, "tmpfs", 0, "mode=755") }},
		{"set hostname", func() error { return unix.Sethostname([]byte("lab")) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return os.MkdirAll(filepath.Join(inside, "logs"), 0o755)
}

// raiseFileLimit lifts the soft limit of descriptors to the hard one, as
// container runtimes do; stories open thousands of connections. Setting it
// explicitly makes children inherit it.
func raiseFileLimit() {
	const want = 1 << 20
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return
	}
	higher := syscall.Rlimit{Cur: want, Max: max(l.Max, want)}
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &higher) != nil {
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: l.Max, Max: l.Max}) // the old limit serves small labs
	}
}

// reap waits for every process of the namespace until the lab itself has ended.
func reap(lab int) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	ended := make(chan error, 1)
	go waitAll(lab, ended)
	for {
		select {
		case s := <-signals:
			_ = unix.Kill(lab, s.(syscall.Signal)) // gone already: ended tells
		case err := <-ended:
			return err
		}
	}
}

func waitAll(lab int, ended chan<- error) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			ended <- fmt.Errorf("wait for the lab: %w", err)
			return
		case pid == lab && status.Signaled():
			ended <- fmt.Errorf("the lab was ended by signal %s", status.Signal())
			return
		case pid == lab && status.ExitStatus() != 0:
			ended <- fmt.Errorf("the lab ended with exit code %d", status.ExitStatus())
			return
		case pid == lab:
			ended <- nil
			return
		}
	}
}
