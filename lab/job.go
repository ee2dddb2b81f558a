package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// job is one process group that the lab started. It is started once; all methods
// may be called by many goroutines.
type job struct {
	name string
	cmd  *exec.Cmd
	// done is closed when the process has ended; err is read after it.
	done chan struct{}
	err  error
}

// startJob starts cmd by start (cmd.Start, in some namespace) in a process group of
// its own, and closes the files when cmd has them.
func (c *Cluster) startJob(name string, cmd *exec.Cmd, start func() error) (*job, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	j := &job{name: name, cmd: cmd, done: make(chan struct{})}
	if err := start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	c.running.Go(j.wait)
	return j, nil
}

func (j *job) wait() {
	defer close(j.done)
	j.err = j.cmd.Wait()
}

func (j *job) pid() int { return j.cmd.Process.Pid }

func (j *job) ended() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// signal goes to the whole process group. A group that is gone is no error.
func (j *job) signal(s syscall.Signal) error {
	if err := unix.Kill(-j.pid(), s); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s to %s: %w", s, j.name, err)
	}
	return nil
}

// end asks the group to end and after grace kills it. It returns when the first
// process of the group is gone.
func (j *job) end(ctx context.Context, grace time.Duration) error {
	err := j.signal(syscall.SIGTERM)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-j.done:
	case <-timer.C:
	case <-ctx.Done():
	}
	err = errors.Join(err, j.signal(syscall.SIGKILL))
	<-j.done
	return err
}

// code is the exit code as a shell has it. Only after done.
func (j *job) code() int {
	var exit *exec.ExitError
	switch {
	case j.err == nil:
		return 0
	case !errors.As(j.err, &exit):
		return 1
	}
	if w, ok := exit.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return 128 + int(w.Signal())
	}
	return exit.ExitCode()
}

// logFile opens the file that takes a process's words. Restarts append.
func (c *Cluster) logFile(name string) (*os.File, error) {
	return os.OpenFile(c.logPath(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}
