package machine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

const (
	// planFD is where the owner's words arrive: one byte when the cgroups are set,
	// then the plan.
	planFD = 3
	// self runs this program again, wherever its file is or was.
	self = "/proc/self/exe"
	// planFile is inside a machine with a root of its own.
	planFile = "/run/machine/plan.json"
)

// Wait waits until the owner has put this process into its cgroups, then enters a
// cgroup namespace whose root they are, and becomes the program again with next as
// arguments. A namespace is entered by a thread, not by a process: only exec makes
// this thread the whole process.
func Wait(next ...string) error {
	var word [1]byte
	if n, err := unix.Read(planFD, word[:]); n != 1 {
		return fmt.Errorf("wait for the owner: %w", errors.Join(err, errors.New("it ended")))
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("enter a cgroup namespace: %w", err)
	}
	return unix.Exec(self, append([]string{"machine"}, next...), os.Environ())
}

// Placed tells a machine in Wait that it is in its cgroups.
func Placed(to *os.File) error {
	_, err := to.Write([]byte{'\n'})
	return err
}

// Init is the first process. It starts this program again with serve, and the
// plan's file, as arguments, and reaps whatever ends until that has ended; then the
// kernel ends all that is left.
func Init(serve string) error {
	plan, err := receive(os.NewFile(planFD, "plan"))
	if err != nil {
		return err
	}
	file, err := prepare(plan)
	if err != nil {
		return err
	}
	cmd := exec.Command(self, serve, file)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "PATH="+plan.Path, "HOME=/root")
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return err
	}
	return reap(cmd.Process.Pid)
}

// prepare makes the machine what the plan says, and leaves the plan in a file.
func prepare(p Plan) (file string, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Sethostname([]byte(p.Name)); err != nil {
		return "", err
	}
	if p.Root == nil {
		err = sharedRoot()
	} else {
		err = p.Root.make()
	}
	if err != nil {
		return "", err
	}
	for key, value := range p.Sysctls {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644); err != nil {
			return "", fmt.Errorf("sysctl %s: %w", key, err)
		}
	}
	return planFile, writePlan(p)
}

func writePlan(p Plan) error {
	if err := os.MkdirAll(filepath.Dir(planFile), 0o755); err != nil {
		return err
	}
	f, err := os.Create(planFile)
	if err != nil {
		return err
	}
	return errors.Join(p.Send(f), f.Close())
}

// reap waits for every process until pid has ended.
func reap(pid int) error {
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case ended == pid && status.Exited() && status.ExitStatus() == 0:
			return nil
		case ended == pid:
			return fmt.Errorf("the machine's second process ended: status %#x", uint32(status))
		}
	}
}
