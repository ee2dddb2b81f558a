package proxy

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// slots bounds how many of something are under way at once, in all and with one
// peer. Who finds no slot waits for one in turn: a burst is served one after the
// other, a flood is refused, and a peer that keeps what it has does not keep the
// others out. Without the bound all of a burst would be half done when the time is
// up, and none would have a session to resume. It is safe for concurrent use.
type slots struct {
	// patience is how long to wait.
	patience time.Duration

	free chan struct{}
	// used is how many slots are taken, for the gauge.
	used atomic.Int64
	// each is how many of them one peer may have.
	each int

	// mu guards peers and what they hold.
	mu    sync.Mutex
	peers map[netip.Addr]*peerSlots
}

// peerSlots are those of one peer, while anybody has one or waits.
type peerSlots struct {
	free chan struct{}
	// users have a slot or wait for one.
	users int
}

func newSlots(n int, patience time.Duration) *slots {
	return &slots{
		patience: patience, free: make(chan struct{}, n), each: max(1, n/8),
		peers: make(map[netip.Addr]*peerSlots),
	}
}

// take returns when there is a slot, or with errHandshakeLimit after a while, or
// when ctx ends.
func (s *slots) take(ctx context.Context, peer netip.Addr) error {
	p := s.join(peer)
	if !s.acquire(ctx, p.free) {
		s.leave(peer, p)
		return errHandshakeLimit
	}
	if !s.acquire(ctx, s.free) {
		<-p.free
		s.leave(peer, p)
		return errHandshakeLimit
	}
	s.used.Add(1)
	return nil
}

// give returns a slot.
func (s *slots) give(peer netip.Addr) {
	s.used.Add(-1)
	<-s.free
	s.mu.Lock()
	p := s.peers[peer]
	s.mu.Unlock()
	<-p.free
	s.leave(peer, p)
}

func (s *slots) join(peer netip.Addr) *peerSlots {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[peer]
	if p == nil {
		p = &peerSlots{free: make(chan struct{}, s.each)}
		s.peers[peer] = p
	}
	p.users++
	return p
}

func (s *slots) leave(peer netip.Addr, p *peerSlots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.users--; p.users == 0 {
		delete(s.peers, peer)
	}
}

func (s *slots) acquire(ctx context.Context, free chan<- struct{}) bool {
	select {
	case free <- struct{}{}:
		return true
	default:
	}
	late := time.NewTimer(s.patience)
	defer late.Stop()
	select {
	case free <- struct{}{}:
		return true
	case <-late.C:
	case <-ctx.Done():
	}
	return false
}

// quota bounds how many connections there are, those going out and those coming in
// together. Who finds it used up is refused at once.
type quota struct {
	max  int64
	open atomic.Int64
}

// take reserves one, or reports false if all are taken.
func (q *quota) take() bool {
	if q.open.Add(1) > q.max {
		q.open.Add(-1)
		return false
	}
	return true
}

// give returns one and reports whether it was the last.
func (q *quota) give() (last bool) { return q.open.Add(-1) == 0 }

// looks bounds the connections to a pod that have not said yet whether they are TLS, in
// all and from one address. Each may be silent for as long as it likes. Who comes above
// is refused. It is safe for concurrent use.
type looks struct {
	most, each int
	// node counts those of all pods, for the gauge.
	node *atomic.Int64

	mu   sync.Mutex
	all  int                // guarded by mu
	from map[netip.Addr]int // guarded by mu, without those that have none
}

// newLooks bounds them for a pod with that many connections, half of which may be silent.
func newLooks(connections int, node *atomic.Int64) *looks {
	return &looks{most: max(1, connections/2), each: max(1, connections/8), node: node, from: make(map[netip.Addr]int)}
}

// begin notes one more from that address, until end, or reports false if there are too many.
func (l *looks) begin(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= l.most || l.from[from] >= l.each {
		return false
	}
	l.all++
	l.from[from]++
	l.node.Add(1)
	return true
}

func (l *looks) end(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.node.Add(-1)
	l.all--
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}
