package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/machine"
)

// Words of the program kube that are for itself only.
const (
	WordWait  = "machine-wait"
	WordInit  = "machine-init"
	WordServe = "machine-serve"
)

// host is a machine as its owner sees it.
//
//	       start           the kernel, or stop
//	off ─────────► running ────────────────────► off
type host struct {
	name string
	// dir is the machine's folder: pid, init.log, and its disk.
	dir string

	// Owned by the cluster's caller: methods of Cluster are not called concurrently.
	cmd *exec.Cmd
	// ended is closed when the first process was waited for.
	ended chan struct{}
	// ns is the machine's network namespace, opened before its first process runs
	// itself again: an exec by a thread takes /proc/PID away for a moment.
	ns *os.File
}

func (h *host) netns() string { return fmt.Sprintf("/proc/self/fd/%d", h.ns.Fd()) }

// starter starts processes on a thread that lives as long as it does: the kernel
// sends a parent-death signal when the thread that forked ends, not the process.
type starter struct {
	jobs  chan func()
	ended chan struct{}
}

func newStarter() *starter {
	s := &starter{jobs: make(chan func()), ended: make(chan struct{})}
	go s.run()
	return s
}

func (s *starter) run() {
	runtime.LockOSThread() // never unlocked: the thread ends here
	defer close(s.ended)
	for job := range s.jobs {
		job()
	}
}

func (s *starter) start(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	s.jobs <- func() { result <- cmd.Start() }
	return <-result
}

func (s *starter) stop() {
	close(s.jobs)
	<-s.ended
}

// start clones the machine's first process, puts it into its cgroups, lets lay
// make its links, and sends it the plan.
func (c *Cluster) start(h *host, plan machine.Plan, lay func() error) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer write.Close()
	err = c.clone(h, read)
	read.Close()
	if err != nil {
		h.kill()
		return fmt.Errorf("start %s: %w", h.name, err)
	}
	pid := h.cmd.Process.Pid
	err = errors.Join(c.cgroups.place(h.name, pid), lay(), machine.Placed(write), plan.Send(write),
		os.WriteFile(filepath.Join(h.dir, "pid"), []byte(strconv.Itoa(pid)), 0o644))
	if err != nil {
		h.kill()
		return fmt.Errorf("start %s: %w", h.name, err)
	}
	return nil
}

func (c *Cluster) clone(h *host, plan *os.File) error {
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(h.dir, "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	h.cmd = exec.Command(filepath.Join(c.programs.Tools, "kube"), WordWait)
	h.cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	h.cmd.Dir = "/"
	h.cmd.Stdout, h.cmd.Stderr = log, log
	h.cmd.ExtraFiles = []*os.File{plan}
	h.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	if err := c.starter.start(h.cmd); err != nil {
		return err
	}
	h.ended = make(chan struct{})
	go h.wait()
	h.ns, err = os.Open(netnsPath(h.cmd.Process.Pid))
	return err
}

func (h *host) wait() {
	_ = h.cmd.Wait() // its last words are in init.log
	close(h.ended)
}

// kill ends the machine as a power cut does, and returns when all its processes
// have ended: the kernel lets a pid namespace's first process be waited for last.
func (h *host) kill() {
	h.cut()
	if h.ended != nil {
		<-h.ended
	}
	if h.ns != nil {
		h.ns.Close() // it would keep the namespace
		h.ns = nil
	}
}

// cut is kill without the wait.
func (h *host) cut() {
	if h.ended != nil {
		_ = h.cmd.Process.Kill() // ended already: wait tells
	}
}

// alive returns an error when the machine has ended by itself.
func (h *host) alive() error {
	select {
	case <-h.ended:
		return fmt.Errorf("machine %s has ended:\n%s", h.name, tail(filepath.Join(h.dir, "init.log"), 5))
	default:
		return nil
	}
}

// whileAlive is ctx that ends when the machine does.
func (h *host) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-h.ended:
			cancel(h.alive())
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}
