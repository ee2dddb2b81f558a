package proxy

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errDraining is why a proxy that is about to end is not ready.
var errDraining = errors.New("this proxy was told to end, and drains")

const (
	// drainTick is how often a proxy that drains looks whether somebody needs it.
	drainTick = 20 * time.Millisecond
	// lastCall is for how long a proxy that drains accepts nothing before it ends, or a fifth of
	// Config.Drain if that is less: what it accepted last would be reset at once.
	lastCall = 5 * time.Second
)

// departure is how far a proxy is that is to end. Certificates, Worlds and their
// acknowledgements go on all the time, or the mesh would wait for this node.
//
//	         Drain                   lastCall before the end
//	staying ──────► departing ───────────────────────────► closed ────► Run's ctx ends: what
//	                nothing is kept; it                    accepts      is open is reset
//	                accepts and serves                     nothing        ▲
//	                     └──────────── nobody needs it ──────┴────────────┘
type departure int32

const (
	staying departure = iota
	departing
	closed
)

// Drain returns when nobody needs this proxy any more, after Config.Drain, or when ctx ends. Then
// Run's ctx is to be ended. Until then it accepts and serves, as there may be nobody else to do it:
// another proxy of the node has taken over when the agent has yielded all listeners. Without another
// proxy it is needed until there was no connection for DrainQuiet.
func (p *Proxy) Drain(ctx context.Context) {
	if p.cfg.Drain <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Drain)
	defer cancel()
	p.departs.Store(int32(departing))
	p.log.Info("proxy drains", "limit", p.cfg.Drain)
	last := time.NewTimer(p.cfg.Drain - min(lastCall, p.cfg.Drain/5))
	defer last.Stop()
	tick := time.NewTicker(drainTick)
	defer tick.Stop()
	for need := (need{}); p.isNeeded(&need); {
		select {
		case <-ctx.Done():
			p.log.Info("proxy ends though it is needed", "connections", need.open)
			return
		case <-last.C:
			p.departs.Store(int32(closed))
		case <-tick.C:
		}
	}
	p.log.Info("proxy is not needed any more")
}

// need is for what a proxy that drains is needed.
type need struct {
	// open are the connections, accepted all that ever were.
	open     int64
	accepted uint64
	// since is when either was last seen to change, or open not to be 0.
	since time.Time
}

// isNeeded ends what is kept and, at last call, leaves the listeners to others. It
// reports whether somebody needs this proxy, and notes it in n.
func (p *Proxy) isNeeded(n *need) bool {
	had := *n
	*n = need{since: had.since}
	listens, busy := false, false
	for _, d := range p.list() {
		if p.departs.Load() == int32(closed) {
			d.depart()
		}
		d.idle.close()
		n.open += d.quota.open.Load()
		n.accepted += d.accepted.Load()
		busy = busy || d.idle.isAwaiting() || d.hasBacklog()
		listens = listens || d.listens()
	}
	busy = busy || n.open > 0
	now := time.Now()
	if busy || n.accepted != had.accepted || n.since.IsZero() {
		n.since = now
	}
	return busy || listens && now.Sub(n.since) < p.cfg.DrainQuiet
}

// listens reports whether the pod has listeners here.
func (d *pod) listens() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.listeners) > 0
}

// depart has the listeners closed, by those who accept from them. If the agent has them too,
// what comes from now on waits there for the next proxy.
func (d *pod) depart() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.listeners = slices.DeleteFunc(d.listeners, func(l *listener) bool {
		if l.started {
			l.SetDeadline(time.Unix(1, 0))
			return false
		}
		l.Close()
		return true
	})
}

// emptyBacklog accepts what waits, and closes l at once: if nobody else has it, what
// waits then is reset. What comes later is not answered, and comes again.
func (d *pod) emptyBacklog(ctx context.Context, all *sync.WaitGroup, l *listener) {
	for c := l.acceptWaiting(); c != nil; c = l.acceptWaiting() {
		d.accepted.Add(1)
		d.start(ctx, all, l, c)
	}
	l.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.listeners = slices.DeleteFunc(d.listeners, func(o *listener) bool { return o == l })
}

// acceptWaiting accepts a connection that waits, nil if none does or can be taken.
func (l *listener) acceptWaiting() *net.TCPConn {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	if raw.Control(func(s uintptr) { fd, _, err = unix.Accept4(int(s), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC) }) != nil || err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	return c.(*net.TCPConn)
}
