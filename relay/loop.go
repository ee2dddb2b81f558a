package relay

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

const (
	// readable is the event of which a step is the answer. All others have a passage rise.
	readable = unix.EPOLLIN
	// watchedFor are told once for each time they begin: a step leaves nothing in the socket,
	// or the passage rises.
	watchedFor = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
	// restTick is how often is looked for passages that have become quiet. They have been
	// for one to two of it.
	restTick = 250 * time.Millisecond
	// eventsAtOnce bounds how many events are taken from the kernel at a time.
	eventsAtOnce = 128
)

// Loops carry passages at rest. A connection costs them two registered sockets and some
// hundred bytes of state, and a message two system calls and no goroutine: the loop that is
// told of it reads it, opens or seals it, and writes it, before it looks at the next one.
// Nothing in it blocks. While Run does not run, or where the kernel refuses, passages have
// goroutines instead. It is safe for concurrent use.
type Loops struct {
	all  []*loop
	next atomic.Uint32
	tick time.Duration // restTick, but in tests
}

// NewLoops returns n loops, best as many as there are CPUs.
func NewLoops(n int) *Loops {
	l := &Loops{all: make([]*loop, max(n, 1)), tick: restTick}
	for i := range l.all {
		l.all[i] = &loop{passages: make(map[uint64]*Passage), lively: make(map[*Passage]struct{})}
	}
	return l
}

// pick chooses the loop of a new passage.
func (l *Loops) pick() *loop { return l.all[int(l.next.Add(1))%len(l.all)] }

// Run carries until ctx ends. What is at rest then goes on with goroutines.
func (l *Loops) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, one := range l.all {
		g.Go(func() error { return one.run(ctx) })
		g.Go(func() error { return one.tend(ctx, l.tick) })
	}
	return g.Wait()
}

// loop is one of Loops. Its epoll is watched by the runtime's: the goroutine waits as any
// other does, and costs no thread.
type loop struct {
	// turn is held by who takes events, before any other lock.
	turn   sync.Mutex
	events [eventsAtOnce]unix.EpollEvent // guarded by turn
	buf    [BufferSize]byte              // guarded by turn, scratch memory

	// mu is taken after a passage's, never before.
	mu       sync.Mutex
	epoll    int // guarded by mu, valid while open
	open     bool
	last     uint64                // guarded by mu, the last id given
	passages map[uint64]*Passage   // guarded by mu, all that are or were at rest
	lively   map[*Passage]struct{} // guarded by mu, all of them that do not doze
}

// begin makes the epoll, which is the caller's to close after l.close.
func (l *loop) begin() (*os.File, syscall.RawConn, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, nil, os.NewSyscallError("epoll_create1", err)
	}
	f := os.NewFile(uintptr(fd), "epoll")
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	l.mu.Lock()
	l.epoll, l.open = fd, true
	l.mu.Unlock()
	return f, raw, nil
}

// run takes events until ctx ends.
func (l *loop) run(ctx context.Context) error {
	f, raw, err := l.begin()
	if err != nil {
		return err
	}
	defer f.Close()
	defer l.close()
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		failed = l.takeAll(int(fd))
		return failed != nil
	})
	if failed == nil && ctx.Err() == nil {
		failed = err
	}
	return failed
}

// close has what is at rest rise.
func (l *loop) close() {
	l.turn.Lock() // nobody uses the epoll any more
	l.mu.Lock()
	l.open = false
	all := slices.Collect(maps.Values(l.passages))
	l.mu.Unlock()
	l.turn.Unlock()
	for _, p := range all {
		p.mu.Lock()
		p.to.watched, p.back.watched = false, false
		if p.mode == resting {
			p.riseLocked()
		}
		p.mu.Unlock()
	}
}

// takeAll does what the events of now ask for.
func (l *loop) takeAll(epoll int) error {
	events := socket.EventsQuietly
	for {
		l.turn.Lock()
		all, err := l.take(epoll, events)
		l.turn.Unlock()
		if all || err != nil {
			return err
		}
		events = socket.Events // this may go on for long
	}
}

// take does what as many events ask for as are told at once, and reports whether these are
// all: the kernel tells of what comes from now on. l.turn is held.
func (l *loop) take(epoll int, events func(int, []unix.EpollEvent) (int, error)) (all bool, err error) {
	n, err := events(epoll, l.events[:])
	if errors.Is(err, unix.EINTR) {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("epoll_wait", err)
	}
	for _, e := range l.events[:n] {
		id := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32
		if p := l.passage(id / 2); p != nil {
			p.event(p.half(id), e.Events, l.buf[:])
		}
	}
	return n < len(l.events), nil
}

// help takes the events of now in the goroutine of somebody else, unless that is being done.
// While all CPUs are busy with goroutines that have much to carry, the runtime seldom looks
// for what has come, and has who is told of it wait for all of these.
func (l *loop) help() {
	if !l.turn.TryLock() {
		return
	}
	defer l.turn.Unlock()
	l.mu.Lock()
	epoll, open := l.epoll, l.open
	l.mu.Unlock()
	if open {
		_, _ = l.take(epoll, socket.Events) // run is told the same error
	}
}

// An event carries the id of its passage, doubled, and 1 more for the half back.
func (p *Passage) half(id uint64) *half {
	if id%2 == 0 {
		return &p.to
	}
	return &p.back
}

func (l *loop) passage(id uint64) *Passage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.passages[id]
}

// watch has the loop told of what comes for p, from what is there now on. It reports false
// if that cannot be. p.mu is held.
func (l *loop) watch(p *Passage) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.open {
		return false
	}
	if p.id == 0 {
		l.last++
		p.id = l.last
		l.passages[p.id] = p
	}
	return l.register(&p.to, 2*p.id) && l.register(&p.back, 2*p.id+1)
}

func (l *loop) register(h *half, id uint64) bool {
	op := unix.EPOLL_CTL_ADD
	if h.watched {
		op = unix.EPOLL_CTL_MOD // what is there is told again
	}
	err := unix.EBADF
	_ = h.from.(Stepper).Control(func(fd uintptr) {
		e := unix.EpollEvent{Events: watchedFor, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
		err, _ = unix.EpollCtl(l.epoll, op, int(fd), &e).(unix.Errno)
	})
	h.watched = h.watched || err == 0
	return err == 0
}

// unwatch has the loop told no more of what comes for h. p.mu is held.
func (l *loop) unwatch(h *half) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.watched && l.open {
		_ = h.from.(Stepper).Control(func(fd uintptr) { _ = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, int(fd), nil) })
	}
	h.watched = false
}

// liven has p looked at, at intervals, until it is still. p.mu is held.
func (l *loop) liven(p *Passage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lively[p] = struct{}{}
}

func (l *loop) still(p *Passage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.lively, p)
}

// forget lets go of p, whose sockets may be used for something else. p.mu is held.
func (l *loop) forget(p *Passage) {
	l.unwatch(&p.to)
	l.unwatch(&p.back)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.passages, p.id)
	delete(l.lively, p)
}

// tend has passages rest that are quiet, at intervals, until ctx ends.
func (l *loop) tend(ctx context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		l.mu.Lock()
		all := slices.Collect(maps.Keys(l.lively))
		l.mu.Unlock()
		for _, p := range all {
			p.rest()
		}
	}
}
