package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"tacit.dev/wire/handle"
)

// This is how the acting agent lets another take its place; see wire/handle for the
// conversation, and takeover.go for the other side.

// awaitSuccessor waits for an agent that wants to take over. nil when ctx ended.
func (a *Agent) awaitSuccessor(ctx context.Context) (*handle.Conn, error) {
	l, err := handle.Listen(a.successorSocket(), -1)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("accept a successor: %w", err)
		}
		if err := hearTake(c); err == nil {
			return c, nil
		}
		c.Close()
	}
}

func (a *Agent) successorSocket() string { return filepath.Join(a.cfg.RunDir, "agent.sock") }

func hearTake(c *handle.Conn) error {
	if err := c.SetReadDeadline(time.Now().Add(helloLimit)); err != nil {
		return err
	}
	for _, want := range []handle.Kind{handle.Hello, handle.Take} {
		m, files, err := c.Receive()
		closeFDs(files)
		if err != nil {
			return err
		}
		if m.Kind != want {
			return fmt.Errorf("%s from an agent: want %s", m.Kind, want)
		}
	}
	return c.SetReadDeadline(time.Time{})
}

// handOver gives the office to the successor, and reports whether it has it. Until
// that says done this agent rests, and acts again if the successor goes away.
func (a *Agent) handOver(ctx context.Context, o *office, c *handle.Conn) bool {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	a.cfg.Log.Info("another agent takes over")
	a.rest(ctx)
	err := a.giveAll(c, o.plugins)
	if err == nil {
		err = hearDone(c)
	}
	if err != nil {
		if ctx.Err() == nil {
			a.cfg.Log.Warn("the other agent has gone, this one goes on", "error", err)
		}
		a.run(a.resume)
		return false
	}
	a.run(a.retire)
	o.lock.Close()
	o.plugins.Close()
	o.lock, o.plugins = nil, nil
	// It has the lock when it hangs up.
	_, files, _ := c.Receive()
	closeFDs(files)
	a.cfg.Log.Info("handed over: this agent only serves the connections of its own proxy")
	return true
}

// rest stops all that changes a pod, and returns when nothing is under way.
func (a *Agent) rest(ctx context.Context) {
	still := make(chan struct{})
	a.run(func() {
		a.duty = resting
		a.still = append(a.still, still)
	})
	select {
	case <-still:
	case <-a.ended:
	case <-ctx.Done():
	}
}

// isStill reports whether no job is at work.
func (a *Agent) isStill() bool {
	for _, p := range a.pods {
		if p.busy {
			return false
		}
	}
	return !a.searching.busy
}

func (a *Agent) resume() {
	a.duty = acting
	for _, p := range a.pods {
		a.checkSoon(p)
	}
}

// giveAll sends the listeners of every pod and that for the plugin. They stay ours,
// too, until the successor serves.
func (a *Agent) giveAll(c *handle.Conn, plugins *net.UnixListener) error {
	var held []handle.HeldPod
	var err error
	a.run(func() {
		for _, p := range a.pods {
			h := handle.HeldPod{UID: p.key}
			for _, l := range p.listeners {
				fd, derr := duplicate(l.file)
				if derr != nil {
					err = derr
					continue
				}
				h.Roles, h.Files = append(h.Roles, l.role), append(h.Files, fd)
			}
			held = append(held, h)
		}
	})
	for _, h := range held {
		if err == nil {
			err = c.Send(handle.Message{Kind: handle.Held, UID: h.UID, Roles: h.Roles}, h.Files...)
		}
		closeFDs(h.Files)
	}
	if err != nil {
		return fmt.Errorf("give listeners: %w", err)
	}
	fd, err := duplicate(plugins)
	if err != nil {
		return err
	}
	defer closeFDs([]int{fd})
	return c.Send(handle.Message{Kind: handle.Given}, fd)
}

func hearDone(c *handle.Conn) error {
	m, files, err := c.Receive()
	closeFDs(files)
	if err == nil && m.Kind != handle.Done {
		err = errors.New("it says " + string(m.Kind))
	}
	return err
}

// retire lets go of everything but the namespaces, in which the proxy may still
// need sockets for connections that it has accepted.
func (a *Agent) retire() {
	a.duty = waiting
	a.metrics.pods.Reset()
	a.metrics.unprotected.Set(0)
	for _, p := range a.pods {
		ns := p.ns
		p.ns = nil
		p.closeFiles()
		p.ns = ns
		p.settled, p.forgotten, p.successor = nil, nil, nil
		if a.proxy != nil {
			a.proxy.send(handle.Message{Kind: handle.Yield, UID: p.key}, nil)
		}
	}
}

// dropEnded lets go of the namespaces of pods that have ended since; somebody else
// is told of their end. It keeps what cannot be looked at.
func (a *Agent) dropEnded() {
	for key, p := range a.pods {
		if p.ns != nil && !p.ns.Is(p.rec.Netns) {
			a.sayRemove(p)
			p.closeFiles()
			delete(a.pods, key)
		}
	}
}
