package proxy

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/relay"
	"tacit.dev/wire/direct"
)

const (
	// keepIdle is how long a connection to a peer is kept without use. The peer waits for
	// keepWait, which is longer: closing is left to the side that dialled.
	keepIdle = 5 * time.Second
	keepWait = 15 * time.Second
	// keepAge is how old one may be and still be kept. A network policy that is new
	// does not end what is connected: it is asked at the next dial.
	keepAge = 10 * time.Second
	// keepMost bounds how many a process keeps, coming and going, keepMostOf how many a
	// pod, and keepMostTo how many of those lead to one destination.
	keepMost   = 4096
	keepMostOf = 512
	keepMostTo = 64
	// keptAnswer is how long a connection that was kept has to answer, before another one is
	// made.
	keptAnswer = 2500 * time.Millisecond
	// keepTick is how often is looked which ones are kept no longer.
	keepTick = time.Second
	// endLimit is how long it may take to say the end of one, which should go at once.
	endLimit = time.Second
)

// peerConn is a direct connection as relay sees it. What it carries ends, and it
// itself may be kept for the next one.
type peerConn struct {
	*direct.Conn
	d *pod
	// leaf is our own, with which the handshake was made.
	leaf *identity.Leaf
	born time.Time
	// to is where it leads, on the side that dialled.
	to destination
	// reserved says that it has a place among those that are kept.
	reserved bool
	// since is when it was kept.
	since time.Time
}

// destination is what a kept connection may be used for: the same address and port of
// the same pod, with the same identity. The pod that dials is the one that keeps it.
type destination struct {
	addr netip.AddrPort
	uid  string
	id   mesh.ID
}

func destinationOf(t target) destination {
	return destination{t.addr, t.workload.UID, t.workload.ID}
}

func (d *pod) newPeerConn(c *direct.Conn, leaf *identity.Leaf) *peerConn {
	return &peerConn{Conn: c, d: d, leaf: leaf, born: time.Now()}
}

// CloseWrite ends what is carried, and the connection too unless it may be kept.
func (pc *peerConn) CloseWrite() error {
	if !pc.Keeps() || !pc.isYoung() || !pc.d.idle.isOpen() {
		return pc.Conn.CloseWrite()
	}
	return pc.Finish()
}

// isYoung reports whether it may carry another connection, or wait for one.
func (pc *peerConn) isYoung() bool {
	most := pc.d.p.know.world().MaxAge()
	if most == 0 {
		most = keepAge
	}
	return time.Since(pc.born) < min(keepAge, most) && pc.isRevoked() == nil
}

// isGood reports whether the identities that the handshake proved are still proved.
func (pc *peerConn) isGood(own *identity.Leaf) bool {
	return pc.leaf == own && time.Now().Before(pc.Peer().NotAfter)
}

// Close ends it unless it can be kept; then only those who still watch it stop.
func (pc *peerConn) Close() error { return pc.endBy(pc.Conn.Close) }

// Abort is the same: after both directions have ended there is nothing to reset.
func (pc *peerConn) Abort() error { return pc.endBy(pc.Conn.Abort) }

func (pc *peerConn) endBy(end func() error) error {
	if pc.Finished() {
		return pc.SetReadDeadline(time.Unix(1, 0))
	}
	return end()
}

// AwaitReset implements relay.ResetWatcher.
func (pc *peerConn) AwaitReset() error {
	err := pc.Conn.AwaitReset()
	if pc.Finished() {
		return net.ErrClosed
	}
	return err
}

// reserve takes a place among those that are kept, if there is one.
func (pc *peerConn) reserve() bool {
	if !pc.d.keeps.take() {
		return false
	}
	if pc.reserved = pc.d.p.keeps.take(); !pc.reserved {
		pc.d.keeps.give()
	}
	return pc.reserved
}

// release gives the place back.
func (pc *peerConn) release() {
	if pc.reserved {
		pc.reserved = false
		pc.d.p.keeps.give()
		pc.d.keeps.give()
	}
}

// end says close_notify and closes it. It is never a reset: the peer may still be
// reading what was carried last.
func (pc *peerConn) end() {
	pc.sayEnd()
	pc.letGo()
}

func (pc *peerConn) sayEnd() {
	_ = pc.SetWriteDeadline(time.Now().Add(endLimit))
	_ = pc.Conn.CloseWrite()
}

func (pc *peerConn) letGo() {
	_ = pc.Conn.Close()
	pc.release()
}

// leave has some of a pod ended beside, since that may wait for the peers' FIN.
func leave(all ...*peerConn) {
	if len(all) == 0 {
		return
	}
	all[0].d.p.running.Go(func() {
		for _, pc := range all {
			pc.sayEnd()
		}
		for _, pc := range all {
			pc.letGo()
		}
	})
}

// idlePeers holds the connections of a pod to and from its peers that carry nothing now.
// It is safe for concurrent use.
//
//	put ──► idle ──take──► carries the next one
//	          │ old, idle for keepIdle, or the peer has closed
//	          ▼
//	        leave
type idlePeers struct {
	mu sync.Mutex
	// idle are those that the pod dialled. The one used last is at the end.
	idle map[destination][]*peerConn
	// fresh counts the handshakes that are under way.
	fresh map[destination]int
	// waiting are those that the pod accepted. The function ends the wait.
	waiting map[*peerConn]context.CancelFunc
	// wishes are of those who wait for one to a destination, the first in front. Each has
	// room for one.
	wishes map[destination][]chan *peerConn
	// shut: nothing is kept now.
	shut bool
}

func newIdlePeers() *idlePeers {
	return &idlePeers{
		idle: make(map[destination][]*peerConn), fresh: make(map[destination]int),
		waiting: make(map[*peerConn]context.CancelFunc), wishes: make(map[destination][]chan *peerConn),
	}
}

// open begins to keep connections, again after close.
func (s *idlePeers) open() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut = false
}

func (s *idlePeers) isOpen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.shut
}

// close keeps nothing until open, and ends what is kept.
func (s *idlePeers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut = true
	s.endIdleLocked(func(*peerConn) bool { return true })
	for _, end := range s.waiting {
		end()
	}
}

// await notes that pc waits for its client, until done. end is called if nothing is
// kept any more.
func (s *idlePeers) await(pc *peerConn, end context.CancelFunc) (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut {
		end()
	}
	s.waiting[pc] = end
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.waiting, pc)
	}
}

// isAwaiting reports whether a connection waits for its client.
func (s *idlePeers) isAwaiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting) > 0
}

// handshakes notes that a handshake with to is under way, until done. Nothing is
// taken meanwhile: a preamble would overtake it, and connections lose their order.
func (s *idlePeers) handshakes(to destination) (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh[to]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.fresh[to]--; s.fresh[to] == 0 {
			delete(s.fresh, to)
		}
	}
}

// put gives pc, which has carried something to its end, to who waits for it, or keeps it,
// or ends it.
func (s *idlePeers) put(pc *peerConn) {
	if !pc.Finished() { // then relay has closed it
		return
	}
	if !pc.isYoung() || !pc.Delivered() || !s.fulfil(pc) && !(pc.reserve() && s.hold(pc)) {
		leave(pc)
	}
}

// wish asks for the next connection to that destination, or one that is idle. Handshakes
// that are under way do not matter: who has to wait has lost its place behind them already.
// forget ends the wish.
func (s *idlePeers) wish(to destination) (came <-chan *peerConn, forget func()) {
	c := make(chan *peerConn, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if pc := s.popLocked(to); pc != nil {
		c <- pc
	} else {
		s.wishes[to] = append(s.wishes[to], c)
	}
	return c, func() { s.forget(to, c) }
}

// forget ends a wish. What has come for it meanwhile is for somebody else.
func (s *idlePeers) forget(to destination, c chan *peerConn) {
	s.mu.Lock()
	if i := slices.Index(s.wishes[to], c); i >= 0 {
		s.dropWishLocked(to, i)
	}
	s.mu.Unlock()
	select {
	case pc := <-c:
		pc.release()
		s.put(pc)
	default:
	}
}

// fulfil gives pc to the first who waits for it, if there is one.
func (s *idlePeers) fulfil(pc *peerConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut || len(s.wishes[pc.to]) == 0 {
		return false
	}
	s.wishes[pc.to][0] <- pc
	s.dropWishLocked(pc.to, 0)
	return true
}

func (s *idlePeers) dropWishLocked(to destination, i int) {
	if s.wishes[to] = slices.Delete(s.wishes[to], i, i+1); len(s.wishes[to]) == 0 {
		delete(s.wishes, to)
	}
}

// hold notes that pc is idle, and reports false if it may not be kept.
func (s *idlePeers) hold(pc *peerConn) bool {
	pc.since = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shut || len(s.idle[pc.to]) >= keepMostTo {
		return false
	}
	s.idle[pc.to] = append(s.idle[pc.to], pc)
	return true
}

// take returns a connection to that destination that can carry another one now, nil if
// there is none. own is the leaf of now.
func (s *idlePeers) take(to destination, own *identity.Leaf) *peerConn {
	for {
		pc := s.pop(to)
		if pc == nil {
			return nil
		}
		if pc.serves(own) {
			return pc
		}
	}
}

// serves reports whether pc, which was idle, can carry another one now; else it is ended.
func (pc *peerConn) serves(own *identity.Leaf) bool {
	if !pc.isGood(own) || !pc.isYoung() || !pc.IsQuiet() {
		leave(pc)
		return false
	}
	pc.release()
	return true
}

func (s *idlePeers) pop(to destination) *peerConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fresh[to] > 0 {
		return nil
	}
	return s.popLocked(to)
}

func (s *idlePeers) popLocked(to destination) *peerConn {
	all := s.idle[to]
	if s.shut || len(all) == 0 {
		return nil
	}
	last := len(all) - 1
	pc := all[last]
	all[last] = nil
	if s.idle[to] = all[:last]; last == 0 {
		delete(s.idle, to)
	}
	return pc
}

// tick ends what has been idle for too long. It is called at intervals.
func (s *idlePeers) tick(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endIdleLocked(func(pc *peerConn) bool {
		return s.shut || now.Sub(pc.since) >= keepIdle || !pc.IsQuiet() || pc.isRevoked() != nil
	})
}

// endIdle ends those that are idle and for which noLonger is true.
func (s *idlePeers) endIdle(noLonger func(*peerConn) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endIdleLocked(noLonger)
}

// endIdleLocked ends those that are idle and for which noLonger is true.
func (s *idlePeers) endIdleLocked(noLonger func(*peerConn) bool) {
	var ended []*peerConn
	for to, all := range s.idle {
		s.idle[to] = slices.DeleteFunc(all, func(pc *peerConn) bool {
			no := noLonger(pc)
			if no {
				ended = append(ended, pc)
			}
			return no
		})
		if len(s.idle[to]) == 0 {
			delete(s.idle, to)
		}
	}
	leave(ended...)
}

// tendIdle ends, at intervals, what pods have kept for too long.
func (p *Proxy) tendIdle(ctx context.Context) error {
	tick := time.NewTicker(keepTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, d := range p.list() {
				d.idle.tick(now)
			}
		}
	}
}

// carryOn takes over a connection from a peer what comes next, after j, for as long as both
// sides keep it. It returns when that is joined, which carries on in turn.
func (d *pod) carryOn(ctx context.Context, all *sync.WaitGroup, j *journey) {
	pc, ok := j.near.(*peerConn)
	if !ok {
		return
	}
	for pc.Finished() {
		hello, ok := d.awaitNext(ctx, j, pc)
		if !ok {
			return
		}
		d.accepted.Add(1)
		j = j.next()
		j.queued = d.p.queues.join(d, j.conn)
		far, err := d.admitNext(ctx, j, pc, hello)
		if err == nil {
			d.carry(ctx, all, j, far, 0)
			return
		}
		j.refuse(j.refusalOf(err))
		d.finished(j)
	}
}

// awaitNext waits for the client's next preamble, and takes a place for what follows on j.
// If there is none, pc is closed.
func (d *pod) awaitNext(ctx context.Context, j *journey, pc *peerConn) (direct.Hello, bool) {
	if !pc.reserve() {
		pc.end()
		return direct.Hello{}, false
	}
	wait, cancel := context.WithTimeout(ctx, keepWait)
	defer cancel()
	unwatch := d.watchKept(j, pc, cancel)
	defer unwatch()
	done := d.idle.await(pc, cancel)
	defer func() {
		done()
		if d.drains.Load() {
			d.wake()
		}
	}()
	hello, err := pc.AwaitNext(wait)
	own, noLeaf := d.leaf()
	if err == nil && noLeaf == nil && pc.isGood(own) && d.reserve(j) {
		pc.release()
		return hello, true
	}
	pc.end() // a client that has sent its preamble meanwhile will dial
	return hello, false
}

// admitNext takes what came over a kept connection to the application.
func (d *pod) admitNext(ctx context.Context, j *journey, pc *peerConn, hello direct.Hello) (relay.Conn, error) {
	w := d.p.know.world()
	j.flow.Source, j.flow.Destination = w.Workload(j.flow.SourceAddr.Addr()), d.self(w)
	j.place = d.lines.join(j.line())
	defer j.place.leave()
	return d.admit(ctx, j, pc, hello)
}

// next is the journey after j over the same connection.
func (j *journey) next() *journey {
	n := &journey{d: j.d, inbound: j.inbound, near: j.near, conn: j.conn}
	n.flow.Opened = time.Now()
	n.flow.Reporter = j.flow.Reporter
	n.flow.SourceAddr, n.flow.Dialled, n.flow.DestinationAddr = j.flow.SourceAddr, j.flow.Dialled, j.flow.DestinationAddr
	n.flow.Kept = true
	return n
}
