package proxy

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pause"
	"tacit.dev/wire/handle"
)

const (
	redialFirst = 20 * time.Millisecond
	redialMax   = time.Second
)

// link is the connection to the agent. When it breaks, the pods go on being
// served with what is there, and the agent is dialled again, for ever.
type link struct {
	p *Proxy
	// up says whether there is an agent now.
	up atomic.Bool

	// mu guards outbox.
	mu sync.Mutex
	// outbox waits to be sent. Each pod has at most one need per family,
	// maxBindings and one word about its state in it, so it is bounded by the pods.
	outbox []handle.Message
	// filled has one element when outbox is not empty.
	filled chan struct{}
}

func newLink(p *Proxy) *link { return &link{p: p, filled: make(chan struct{}, 1)} }

// run keeps a connection to the agent until ctx ends.
func (l *link) run(ctx context.Context) error {
	delay, level := redialFirst, slog.LevelWarn
	for {
		err := l.session(ctx, func() { delay, level = redialFirst, slog.LevelWarn })
		if ctx.Err() != nil {
			return nil
		}
		// Once is enough: nothing that serves now depends on it.
		l.p.log.Log(ctx, level, "no agent", "path", l.p.cfg.Handle, "err", err)
		level = slog.LevelDebug
		if !pause.For(ctx, delay/2+rand.N(delay/2)) {
			return nil
		}
		delay = min(2*delay, redialMax)
	}
}

// session is one connection to the agent, from its dial to its end. It calls
// established when the agent has said something.
func (l *link) session(ctx context.Context, established func()) error {
	held, done := l.p.held()
	c, err := handle.Dial(ctx, l.p.cfg.Handle, held...)
	done()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	sent := make(chan struct{})
	ended := make(chan struct{})
	go l.send(c, ended, sent)
	l.begin()
	err = l.receive(ctx, c, established)
	l.up.Store(false)
	c.Close()
	close(ended)
	<-sent
	return err
}

// begin forgets what was said to the agent before and asks this one for sockets.
func (l *link) begin() {
	l.mu.Lock()
	l.outbox = nil
	l.mu.Unlock()
	l.up.Store(true)
	for _, d := range l.p.list() {
		d.sockets4.connected()
		d.sockets6.connected()
	}
}

// receive acts on what the agent says, until the connection ends.
func (l *link) receive(ctx context.Context, c *handle.Conn, established func()) error {
	for {
		m, files, err := c.Receive()
		if err != nil {
			return err
		}
		established()
		l.act(ctx, m, files)
	}
}

// act does what one message asks for. It owns files, and does not block.
func (l *link) act(ctx context.Context, m handle.Message, files []int) {
	if m.Kind == handle.Pod {
		l.p.serve(ctx, m, files)
		return
	}
	d := l.p.pod(m.UID)
	if d == nil {
		closeAll(files)
		return
	}
	switch m.Kind {
	case handle.Sockets:
		d.deliver(m, files)
		return
	case handle.Bound:
		d.bindings.deliver(m, files)
		return
	case handle.Ports:
		d.hearPorts(m.Ports)
	case handle.Drain:
		d.drain()
	case handle.Remove:
		d.remove()
	case handle.Yield:
		d.yield()
	}
	closeAll(files)
}

// post queues m for the agent without blocking. False means that there is none
// now: the next one will be told from the start.
func (l *link) post(m handle.Message) bool {
	if !l.up.Load() {
		return false
	}
	l.mu.Lock()
	l.outbox = append(l.outbox, m)
	l.mu.Unlock()
	select {
	case l.filled <- struct{}{}:
	default:
	}
	return true
}

// send writes what is queued until the session has ended, then closes done.
func (l *link) send(c *handle.Conn, ended <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	for {
		select {
		case <-ended:
			return
		case <-l.filled:
		}
		l.mu.Lock()
		batch := l.outbox
		l.outbox = nil
		l.mu.Unlock()
		for _, m := range batch {
			if err := c.Send(m); err != nil {
				l.p.log.Warn("agent does not listen", "kind", string(m.Kind), "err", err)
				c.Close()
				return
			}
		}
	}
}

func closeAll(files []int) {
	for _, fd := range files {
		unix.Close(fd)
	}
}
