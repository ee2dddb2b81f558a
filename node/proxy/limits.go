package proxy

import (
	"container/list"
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// slowDial is how long a dial may take and hold a slot for the handshake that follows.
const slowDial = 100 * time.Millisecond

// slots bounds how many handshakes are under way on a node, those as client or those as
// server. Who finds no slot waits for one in turn: a burst is served a part after the
// other. Without the bound all of it would be half done when the time is up, and none
// would have a session to resume. It is safe for concurrent use.
//
//	join ──fits──► holds a slot ◄──────────► rests while a dial is not answered
//	  │                 ▲      │
//	  └──► waits ───────┘      └──► leave: whose turn it is gets the slot
//
// No pod keeps the others out, and no peer of a pod its others: a pod may have as many as
// are free besides, and always one; a peer of it an eighth of all, and the last quarter is
// for peers that have none. So however many stall, something is free for who comes next: of
// 512 slots, one pod has 256 at most, and when 24 of its peers have all that they can get,
// 40 others still find one.
type slots struct {
	// patience is how long a turn is waited for.
	patience time.Duration
	most     int
	// each is how many of them one peer of a pod may have.
	each int
	// waited gets how long those that had to wait did, in seconds.
	waited prometheus.Observer

	// mu guards all below, and all of shares and turns.
	mu            sync.Mutex
	used, waiting int
	// pods are the shares of which somebody waits, the next to be served in front.
	pods list.List
}

// share is a pod's part of slots.
type share struct {
	of    *slots
	used  int
	peers map[netip.Addr]*peerShare // those that have a turn
	// queue are the peers of which somebody waits, the next to be served in front.
	queue list.List
	// place is where it is in slots.pods, nil if nobody waits.
	place *list.Element
}

// peerShare is the part of one peer of a pod.
type peerShare struct {
	addr  netip.Addr
	used  int
	turns int       // of any state
	queue list.List // of *turn
	place *list.Element
}

// turn is one connection's claim to a slot. The one who joined calls leave.
type turn struct {
	of   *share
	peer *peerShare
	held bool
	// mayRest: a dial is under way.
	mayRest bool
	// gone: it has left.
	gone bool
	// place is where it waits, nil if it does not; since is for how long.
	place *list.Element
	since time.Time
	// came has one element when the slot that it waited for is there.
	came chan struct{}
}

func newSlots(most int, patience time.Duration, waited prometheus.Observer) *slots {
	return &slots{most: most, each: max(1, most/8), patience: patience, waited: waited}
}

// share returns the part of a pod that is new.
func (s *slots) share() *share {
	return &share{of: s, peers: make(map[netip.Addr]*peerShare)}
}

// counts tells how many slots are taken, and how many wait for one.
func (s *slots) counts() (used, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used, s.waiting
}

// join takes a slot if there is one for that peer, or stands in line.
func (h *share) join(peer netip.Addr) *turn {
	h.of.mu.Lock()
	defer h.of.mu.Unlock()
	p := h.peers[peer]
	if p == nil {
		p = &peerShare{addr: peer}
		h.peers[peer] = p
	}
	p.turns++
	t := &turn{of: h, peer: p}
	if h.fitsLocked(p) {
		t.holdLocked()
	} else {
		t.waitLocked(p.queue.PushBack)
	}
	return t
}

// await blocks until t holds a slot, or until something comes by instead: then that is
// returned, and t still waits. The error is errHandshakeLimit when patience is over,
// errGone when gone is closed, or that of ctx.
func (t *turn) await(ctx context.Context, gone <-chan struct{}, instead <-chan *peerConn) (*peerConn, error) {
	if t.isHeld() {
		return nil, nil
	}
	defer func() { t.of.of.waited.Observe(time.Since(t.since).Seconds()) }()
	late := time.NewTimer(t.of.of.patience - time.Since(t.since))
	defer late.Stop()
	select {
	case <-t.came:
		return nil, nil
	case pc := <-instead:
		return pc, nil
	case <-late.C:
		return nil, errHandshakeLimit
	case <-gone:
		return nil, errGone
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// dial runs one. While it is not answered it does not count: dials into silence would
// otherwise keep those from their handshakes that are connected.
func (t *turn) dial(ctx context.Context, dial func(context.Context) (*net.TCPConn, error)) (*net.TCPConn, error) {
	t.setMayRest(true)
	slow := time.AfterFunc(slowDial, t.rest)
	c, err := dial(ctx)
	slow.Stop()
	t.setMayRest(false)
	if err != nil {
		return nil, err
	}
	t.claim()
	if _, err := t.await(ctx, nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// rest gives the slot away for as long as the dial is under way.
func (t *turn) rest() {
	s := t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.mayRest && t.held {
		t.giveLocked()
	}
}

func (t *turn) setMayRest(may bool) {
	s := t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	t.mayRest = may
}

// claim takes a slot again if t has rested, or has it served next.
func (t *turn) claim() {
	s := t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case t.held:
	case t.of.fitsLocked(t.peer):
		t.holdLocked()
	default:
		t.waitLocked(t.peer.queue.PushFront)
	}
}

// stepBack lets those of its peer that wait go before t.
func (t *turn) stepBack() {
	s := t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.place != nil {
		t.peer.queue.MoveToBack(t.place)
	}
}

func (t *turn) isHeld() bool {
	s := t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.held
}

// leave gives the slot back, or the place in line. Only the first call counts.
func (t *turn) leave() {
	h, s := t.of, t.of.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.gone {
		return
	}
	t.gone, t.mayRest = true, false
	if t.place != nil {
		t.unwaitLocked()
	}
	if t.peer.turns--; t.peer.turns == 0 {
		delete(h.peers, t.peer.addr)
	}
	if t.held {
		t.giveLocked()
	}
}

// roomLocked is how many more the pod may have.
func (h *share) roomLocked() int {
	room := h.of.most - h.of.used - h.used
	if h.used == 0 {
		return max(room, 1)
	}
	return room
}

func (h *share) fitsLocked(p *peerShare) bool {
	room := h.roomLocked()
	if p.used == 0 {
		return room > 0
	}
	return p.used < h.of.each && room > h.of.most/4
}

func (t *turn) holdLocked() {
	t.held = true
	t.of.of.used++
	t.of.used++
	t.peer.used++
}

func (t *turn) giveLocked() {
	t.held = false
	t.of.of.used--
	t.of.used--
	t.peer.used--
	t.of.of.serveLocked()
}

// waitLocked stands in line: of the peer, which stands in that of the pod, which stands in that of all.
func (t *turn) waitLocked(push func(any) *list.Element) {
	h, s := t.of, t.of.of
	t.came, t.since = make(chan struct{}, 1), time.Now()
	t.place = push(t)
	if t.peer.place == nil {
		t.peer.place = h.queue.PushBack(t.peer)
	}
	if h.place == nil {
		h.place = s.pods.PushBack(h)
	}
	s.waiting++
}

func (t *turn) unwaitLocked() {
	h, s := t.of, t.of.of
	t.peer.queue.Remove(t.place)
	t.place = nil
	if t.peer.queue.Len() == 0 {
		h.queue.Remove(t.peer.place)
		t.peer.place = nil
	}
	if h.queue.Len() == 0 {
		s.pods.Remove(h.place)
		h.place = nil
	}
	s.waiting--
}

// serveLocked gives slots to those whose turn it is, one of each pod after the other, until
// none fits that waits.
func (s *slots) serveLocked() {
	for vain := 0; vain < s.pods.Len(); {
		h := s.pods.Front().Value.(*share)
		s.pods.MoveToBack(h.place)
		vain++
		if t := h.nextLocked(); t != nil {
			t.unwaitLocked()
			t.holdLocked()
			t.came <- struct{}{}
			vain = 0
		}
	}
}

// nextLocked is the turn that the pod has served next, nil if none of it fits. Peers in front that do
// not fit have slots already, so there are never many of them.
func (h *share) nextLocked() *turn {
	if h.roomLocked() <= 0 {
		return nil
	}
	for range h.queue.Len() {
		p := h.queue.Front().Value.(*peerShare)
		h.queue.MoveToBack(p.place)
		if h.fitsLocked(p) {
			return p.queue.Front().Value.(*turn)
		}
	}
	return nil
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

// arrivals bounds connections that come in to a pod, in all and from one address. Who comes
// above is refused. It is safe for concurrent use.
type arrivals struct {
	most, each int
	// node counts those of all pods, for the gauge.
	node *atomic.Int64

	mu   sync.Mutex
	all  int                // guarded by mu
	from map[netip.Addr]int // guarded by mu, without those that have none
}

// newArrivals bounds those of a pod with that many connections. Whoever has all that one
// client can get leaves half of them to others, and all clients together leave an eighth to
// what the pod itself dials.
func newArrivals(connections int) *arrivals {
	return &arrivals{most: max(1, connections-connections/8), each: max(1, connections/2),
		node: new(atomic.Int64), from: make(map[netip.Addr]int)}
}

// newLooks bounds those that have not said yet whether they are TLS, half of all. Each may
// be silent for as long as it likes.
func newLooks(connections int, node *atomic.Int64) *arrivals {
	return &arrivals{most: max(1, connections/2), each: max(1, connections/8), node: node, from: make(map[netip.Addr]int)}
}

// begin notes one more from that address, until end, or reports false if there are too many.
func (l *arrivals) begin(from netip.Addr) bool {
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

func (l *arrivals) end(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.node.Add(-1)
	l.all--
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}

// count tells how many there are.
func (l *arrivals) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all
}
