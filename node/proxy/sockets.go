package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"tacit.dev/wire/handle"
)

const (
	// minLevel is how many sockets a pod and family keep ready at least. They
	// cost the kernel about 2 kB each.
	minLevel = 4
	// maxLevel is how many at most.
	maxLevel = 64
	// maxAsked is how many are asked for at once, for those who wait already: as
	// many as one message carries.
	maxAsked = handle.MaxFiles
)

// sockets are the unconnected sockets of one pod and one family, which the agent
// made in the pod's namespace: with them the proxy dials as if it were there. At
// most level wait ready. It is safe for concurrent use.
//
//	agent ──deliver──► idle ──take──► a dial
//	  ▲                  │ half empty
//	  └──────ask─────────┘
type sockets struct {
	// ask sends a request for n sockets to the agent, without blocking. False
	// means that there is no agent now; connected is called when there is.
	ask func(n int) bool
	// starved counts those who had to wait, of all pods.
	starved *atomic.Uint64

	// mu guards all below.
	mu      sync.Mutex
	idle    []int
	waiters []chan int
	// asked is how many the agent was asked for and has not delivered. There
	// is one request at a time.
	asked int
	// level is how many to have at hand: doubled when there were none, halved
	// when few were taken for a while.
	level int
	// taken counts since the last trim.
	taken int
	// overdue counts the trims since the agent was asked.
	overdue int
	closed  bool
}

func newSockets(starved *atomic.Uint64, ask func(n int) bool) *sockets {
	return &sockets{starved: starved, ask: ask, level: minLevel}
}

// take returns a socket, which is the caller's. If there is none it waits for
// the agent until ctx ends.
func (s *sockets) take(ctx context.Context) (int, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return -1, fmt.Errorf("%w: the pod is gone", errNoSocket)
	}
	s.taken++
	if n := len(s.idle); n > 0 {
		fd := s.idle[n-1]
		s.idle = s.idle[:n-1]
		s.refill()
		s.mu.Unlock()
		return fd, nil
	}
	s.starved.Add(1)
	s.level = min(2*s.level, maxLevel)
	w := make(chan int, 1)
	s.waiters = append(s.waiters, w)
	s.refill()
	s.mu.Unlock()
	return s.wait(ctx, w)
}

// wait returns what comes to w. A socket that comes as ctx ends is not lost.
func (s *sockets) wait(ctx context.Context, w chan int) (int, error) {
	select {
	case fd, ok := <-w:
		if !ok {
			return -1, fmt.Errorf("%w: the agent has none to give, see its log", errNoSocket)
		}
		return fd, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiters, w); i >= 0 {
		s.waiters = slices.Delete(s.waiters, i, i+1)
	} else if fd, ok := <-w; ok {
		s.keep(fd)
	}
	return -1, fmt.Errorf("%w: waited for the agent: %w", errNoSocket, ctx.Err())
}

// refill asks for more at half empty. The caller holds mu.
func (s *sockets) refill() {
	if s.asked > 0 || s.closed || len(s.waiters) == 0 && len(s.idle) > s.level/2 {
		return
	}
	n := min(s.level+len(s.waiters)-len(s.idle), maxAsked)
	if n > 0 && s.ask(n) {
		s.asked, s.overdue = n, 0
	}
}

// keep makes fd ready for the next one. The caller holds mu.
func (s *sockets) keep(fd int) {
	if s.closed || len(s.idle) >= 2*maxLevel {
		unix.Close(fd)
		return
	}
	s.idle = append(s.idle, fd)
}

// deliver takes over what the agent gave. Nothing at all means that it could
// not: those who wait are told so, and the next one asks again.
func (s *sockets) deliver(files []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = 0
	if len(files) == 0 {
		s.dismiss()
		return
	}
	for _, fd := range files {
		if len(s.waiters) > 0 {
			s.waiters[0] <- fd // has room for one, and gets one
			s.waiters = s.waiters[1:]
			continue
		}
		s.keep(fd)
	}
	s.refill()
}

// dismiss tells all who wait that nothing comes. The caller holds mu.
func (s *sockets) dismiss() {
	for _, w := range s.waiters {
		close(w)
	}
	s.waiters = nil
}

// connected is called when there is an agent, maybe another one than before:
// what the old one was asked for will not come.
func (s *sockets) connected() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = 0
	s.refill()
}

// trim gives back what a quiet pod does not need. It is called at intervals.
func (s *sockets) trim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken < s.level && s.level > minLevel {
		s.level /= 2
	}
	s.taken = 0
	if s.overdue++; s.asked > 0 && s.overdue > 2 { // the agent did not hear it
		s.asked = 0
		s.refill()
	}
	for len(s.idle) > s.level {
		n := len(s.idle) - 1
		unix.Close(s.idle[n])
		s.idle = s.idle[:n]
	}
}

// close closes all sockets, and those that still come.
func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, fd := range s.idle {
		unix.Close(fd)
	}
	s.idle = nil
	s.dismiss()
}

// ready tells how many wait ready, for the dump.
func (s *sockets) ready() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.idle)
}

var errNoSocket = errors.New("no socket of the pod's namespace")
