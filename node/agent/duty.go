package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"tacit.dev/pause"
	"tacit.dev/pod/cni"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

// duty is what an agent may do. While the node's pod is replaced there are two agents,
// each with a proxy of its own; one of them acts: applies rules, answers the plugin,
// writes records and reports.
//
//	          the lock is free, or             a successor asks, and
//	          the other one gives              no job is at work
//	waiting ────────────────────────► acting ───────────────────────► resting
//	   ▲                                 ▲                             │   │
//	   │                                 └─── the successor has gone ──┘   │
//	   └────────────────────────────────────────── the successor serves ───┘
//
// In any of them the agent hands out sockets for the connections that its own proxy
// has. One that has acted before takes over only what nobody has any more.
type duty int

const (
	waiting duty = iota
	acting
	resting
)

const (
	// lockPause is how often one that waits looks whether the lock is free.
	lockPause = 100 * time.Millisecond
	// confirmLimit bounds the time from a take-over until the new proxy serves every
	// pod that it was ready for. After it the old agent acts again.
	confirmLimit = 30 * time.Second
	// lockLimit bounds how long the old agent may take to let go of the lock.
	lockLimit = 10 * time.Second
)

// office is what the acting agent has and no other.
type office struct {
	lock    *os.File
	plugins *net.UnixListener
	// before is the agent that gives it all to us, until we have said that we
	// serve. nil if there is none.
	before *handle.Conn
}

func (o *office) close() {
	if o.lock != nil {
		o.lock.Close()
	}
	if o.plugins != nil {
		o.plugins.Close()
	}
	if o.before != nil {
		o.before.Close()
	}
}

// serve waits for the office and holds it, again and again, until ctx ends.
func (a *Agent) serve(ctx context.Context) error {
	for fresh := true; ctx.Err() == nil; fresh = false {
		o, err := a.obtain(ctx, fresh)
		if err == nil && o != nil {
			err = a.hold(ctx, o)
			o.close()
		}
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	return nil
}

// obtain waits for the office. Only a fresh agent asks for it; else two pods of
// one node would take it from each other for ever. It is nil when ctx ended.
func (a *Agent) obtain(ctx context.Context, fresh bool) (*office, error) {
	said := ""
	for {
		o, err := a.takeFree()
		if o != nil || err != nil {
			return o, err
		}
		if fresh {
			if o, err = a.takeOver(ctx); err == nil {
				return o, nil
			}
			a.waitsFor.Store(new(err.Error()))
			if err.Error() != said && ctx.Err() == nil {
				said = err.Error()
				a.cfg.Log.Info("another agent acts", "waits_for", said)
			}
		}
		if !pause.For(ctx, lockPause) {
			return nil, nil
		}
	}
}

// takeFree takes the office that nobody has; nil if somebody does.
func (a *Agent) takeFree() (*office, error) {
	lock, err := a.lock()
	if lock == nil {
		return nil, err
	}
	plugins, err := cni.Listen(filepath.Join(a.cfg.RunDir, "cni.sock"))
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &office{lock: lock, plugins: plugins}, nil
}

// lock keeps any other agent from acting; nil if another one has it.
func (a *Agent) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(a.cfg.RunDir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}

// hold acts until ctx ends or a successor serves.
func (a *Agent) hold(ctx context.Context, o *office) error {
	a.run(a.begin)
	for ctx.Err() == nil {
		next, err := a.act(ctx, o)
		if next == nil || err != nil {
			return err
		}
		if a.handOver(ctx, o, next) {
			return nil
		}
	}
	return nil
}

// act does what only the acting agent does, until ctx ends or a successor asks, which
// is then returned. Nothing of it is under way any more when it returns.
func (a *Agent) act(ctx context.Context, o *office) (next *handle.Conn, err error) {
	plugins, err := copyOf(o.plugins)
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	work, stop := context.WithCancel(ctx)
	defer stop()
	g.Go(func() error { return cni.Serve(work, plugins, a.answer) })
	g.Go(func() error { return a.keepChain(work) })
	g.Go(func() error { return a.hearControl(work) })
	g.Go(func() error {
		defer stop()
		if err := a.confirm(ctx, o); err != nil {
			return err
		}
		next, err = a.awaitSuccessor(ctx)
		return err
	})
	if err := g.Wait(); err != nil || ctx.Err() != nil && next == nil {
		if next != nil {
			next.Close()
		}
		return nil, err
	}
	return next, nil
}

// copyOf is another descriptor of l: the one that is served is closed at its end.
func copyOf(l *net.UnixListener) (*net.UnixListener, error) {
	fd, err := duplicate(l)
	if err != nil {
		return nil, err
	}
	return listenerOf(fd)
}

// listenerOf takes over fd.
func listenerOf(fd int) (*net.UnixListener, error) {
	f := os.NewFile(uintptr(fd), "cni.sock")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen for tacit-cni: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("listen for tacit-cni: a %T", l)
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}

// hearControl begins when every pod of the last agent's has been looked at:
// control takes a pod that is not reported at once for one that is not captured.
func (a *Agent) hearControl(ctx context.Context) error {
	if a.cfg.Control == nil {
		return nil
	}
	select {
	case <-a.found:
	case <-ctx.Done():
		return nil
	}
	if err := a.cfg.Control(ctx); ctx.Err() == nil {
		return err
	}
	return nil
}

// run has the loop run f, and waits for it.
func (a *Agent) run(f func()) { a.ask(func() string { f(); return "" }) }

// begin is the first act, on the loop. What this agent knew from acting before
// counts no more; what the last one knew is in the records.
func (a *Agent) begin() {
	for _, p := range a.pods {
		if p.reported != "" {
			a.tellControl(xds.Report{UID: p.uid(), Namespace: p.rec.Namespace, Name: p.rec.Name, State: xds.Released})
		}
		p.closeFiles()
	}
	clear(a.pods)
	clear(a.missing)
	clear(a.left)
	a.duty = acting
	a.found, a.served = make(chan struct{}), make(chan struct{})
	a.recover()
	a.takeWarm()
	if a.proxy != nil {
		a.sortHeld(a.proxy)
	}
}

// looked notes that all pods of the last agent's have been looked at.
func (a *Agent) looked() {
	close(a.found)
	a.foundOnce.Do(func() { close(a.recovered) })
}

// Ready says why the agent is not: nil once it acts, and its proxy serves what the
// proxy of the agent before it has served.
func (a *Agent) Ready() error {
	if why := a.waitsFor.Load(); why != nil {
		return fmt.Errorf("another agent acts on this node; this one waits: %s", *why)
	}
	return nil
}
