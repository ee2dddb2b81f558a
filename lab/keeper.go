package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"tacit.dev/pause"
)

// keeper keeps one process of Tacit running, as a kubelet keeps a container:
//
//	        start          ends: at once, later with growing pauses
//	stopped ─────► running ─────────┐
//	   ▲             │  ▲───────────┘
//	   └── stop ─────┘
type keeper struct {
	name    string
	cluster *Cluster
	// command makes a fresh command, and start starts it in its namespace.
	command func() *exec.Cmd
	start   func(*exec.Cmd) error

	mu      sync.Mutex
	wanted  bool
	current *job
	starts  int
	// changed is closed and replaced whenever one of the above changes.
	changed chan struct{}
}

func newKeeper(c *Cluster, name string, command func() *exec.Cmd, start func(*exec.Cmd) error) *keeper {
	return &keeper{name: name, cluster: c, command: command, start: start, wanted: true, changed: make(chan struct{})}
}

// run keeps the process until ctx ends, and then waits for it.
func (k *keeper) run(ctx context.Context) {
	wait := time.Duration(0)
	for ctx.Err() == nil {
		if !k.await(ctx, func() bool { return k.wanted }) {
			return
		}
		began := time.Now()
		if err := k.once(ctx); err != nil {
			k.cluster.log.Error("process does not start", "process", k.name, "err", err)
		}
		if wait = nextPause(wait, time.Since(began)); wait > 0 {
			pause.For(ctx, wait)
		}
	}
}

// nextPause is how long to wait after a process that lived that long: nothing at
// first, so that a story sees what a kill does and not what the lab does.
func nextPause(last, lived time.Duration) time.Duration {
	if lived > time.Second {
		return 0
	}
	return min(max(2*last, 10*time.Millisecond), time.Second)
}

// once starts the process and waits for its end.
func (k *keeper) once(ctx context.Context) error {
	out, err := k.cluster.logFile(k.name)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := k.command()
	cmd.Stdout, cmd.Stderr = out, out
	j, err := k.cluster.startJob(k.name, cmd, func() error { return k.start(cmd) })
	if err != nil {
		return err
	}
	k.set(func() { k.current = j; k.starts++ })
	select {
	case <-j.done:
	case <-ctx.Done():
		_ = j.end(context.WithoutCancel(ctx), time.Second) // the pid namespace ends it otherwise
	}
	k.cluster.log.Info("process ended", "process", k.name, "code", j.code())
	k.set(func() { k.current = nil })
	return nil
}

func (k *keeper) set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
	close(k.changed)
	k.changed = make(chan struct{})
}

// await waits until the condition, checked under the lock, holds.
func (k *keeper) await(ctx context.Context, condition func() bool) bool {
	for {
		k.mu.Lock()
		ok, changed := condition(), k.changed
		k.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// job is the running process, nil if there is none.
func (k *keeper) job() *job {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current
}

// signal signals the running process.
func (k *keeper) signal(s syscall.Signal) error {
	if j := k.job(); j != nil {
		return j.signal(s)
	}
	return fmt.Errorf("signal %s: %s is not running", k.name, s)
}

// stop ends the process, and keeps it away until begin.
func (k *keeper) stop(ctx context.Context, s syscall.Signal) error {
	k.set(func() { k.wanted = false })
	if j := k.job(); j != nil {
		if err := j.signal(s); err != nil {
			return err
		}
	}
	if !k.await(ctx, func() bool { return k.current == nil }) {
		return fmt.Errorf("stop %s by %s: it goes on: %w", k.name, s, ctx.Err())
	}
	return nil
}

// begin has the process run again after a stop, and returns when it was started.
func (k *keeper) begin(ctx context.Context) error {
	k.set(func() { k.wanted = true })
	if !k.await(ctx, func() bool { return k.current != nil }) {
		return fmt.Errorf("start %s: %w", k.name, ctx.Err())
	}
	return nil
}

// again ends the process by a signal and returns when the next one was started.
func (k *keeper) again(ctx context.Context, s syscall.Signal) error {
	k.mu.Lock()
	before, j := k.starts, k.current
	k.mu.Unlock()
	if j == nil {
		return k.begin(ctx)
	}
	if err := j.signal(s); err != nil {
		return err
	}
	if !k.await(ctx, func() bool { return k.starts > before }) {
		return errors.Join(fmt.Errorf("restart %s by %s: it did not start again", k.name, s), ctx.Err())
	}
	return nil
}
