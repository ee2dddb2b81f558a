package xds

import (
	"container/heap"
	"maps"
	"math"
	"slices"
	"time"
)

// standing is how far a connected proxy has come; guarded by Server.mu.
type standing struct {
	node *node
	name string
	// acked is what it has settled on, applied what it decides by: never the older.
	acked, applied place
	// discounted: it did not count when Applied was asked last.
	discounted bool
	// behind is since when it was seen at version seen, and late that this was too long. It is
	// so until it has come up with everything.
	behind time.Time
	seen   uint64
	late   bool
}

// place is a version, and where in a queue it stands.
type place struct {
	version uint64
	index   int
}

// queue is a heap of proxies, by one of their versions: the oldest is found at once, and an
// ack costs its logarithm.
type queue struct {
	list []*standing
	of   func(*standing) *place
}

func (q *queue) Len() int           { return len(q.list) }
func (q *queue) Less(i, j int) bool { return q.of(q.list[i]).version < q.of(q.list[j]).version }
func (q *queue) Swap(i, j int) {
	q.list[i], q.list[j] = q.list[j], q.list[i]
	q.of(q.list[i]).index, q.of(q.list[j]).index = i, j
}
func (q *queue) Push(x any) {
	p := x.(*standing)
	q.of(p).index = len(q.list)
	q.list = append(q.list, p)
}
func (q *queue) Pop() any {
	last := len(q.list) - 1
	p := q.list[last]
	q.list[last] = nil
	q.list = q.list[:last]
	return p
}

// advance moves p up to version.
func (q *queue) advance(p *standing, version uint64) {
	if at := q.of(p); at.version < version {
		at.version = version
		heap.Fix(q, at.index)
	}
}

// below visits those that have not reached version, from the i-th of the heap on.
func (q *queue) below(version uint64, i int, visit func(*standing)) {
	if i >= len(q.list) || q.of(q.list[i]).version >= version {
		return
	}
	visit(q.list[i])
	q.below(version, 2*i+1, visit)
	q.below(version, 2*i+2, visit)
}

// oldest is the lowest version of those that count, if it is lower than most. It looks at
// few, unless many do not count.
func (q *queue) oldest(most uint64, i int, counts func(*standing) bool) uint64 {
	if i >= len(q.list) || q.of(q.list[i]).version >= most {
		return most
	}
	if counts(q.list[i]) {
		return q.of(q.list[i]).version
	}
	return q.oldest(q.oldest(most, 2*i+1, counts), 2*i+2, counts)
}

// progress is what Acked and Applied may have answered differently when it moves, or not.
// Called with mu.
func (s *Server) progress() [2]uint64 {
	everybody := func(*standing) bool { return true }
	counted := func(p *standing) bool { return !p.discounted }
	return [2]uint64{s.acks.oldest(math.MaxUint64, 0, everybody), s.applies.oldest(math.MaxUint64, 0, counted)}
}

// note lets a proxy advance, applied at least as far as acked, and tells if that is news for who waits for all. Called with mu.
func (s *Server) note(p *standing, acked, applied uint64) {
	before := s.progress()
	s.acks.advance(p, acked)
	s.applies.advance(p, applied)
	if s.progress() != before {
		s.notify()
	}
}

// arrive counts a proxy that has connected, depart one that goes. Called with mu.
func (s *Server) arrive(name string) *standing {
	n := s.nodes[name]
	p := &standing{node: n, name: name}
	heap.Push(&s.acks, p)
	heap.Push(&s.applies, p)
	n.proxies = append(n.proxies, p)
	n.gone = time.Time{}
	delete(s.away, name)
	if n.timer != nil {
		n.timer.Stop()
		n.timer = nil
	}
	if s.gathering && s.expected[name] {
		delete(s.expected, name)
		s.gatherOn()
	}
	s.notify()
	return p
}

func (s *Server) depart(p *standing) {
	heap.Remove(&s.acks, p.acked.index)
	heap.Remove(&s.applies, p.applied.index)
	n := p.node
	n.proxies = slices.DeleteFunc(n.proxies, func(o *standing) bool { return o == p })
	if len(n.proxies) == 0 {
		n.gone = time.Now()
		s.await(p.name)
	}
	s.notify()
}

func (s *Server) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// latest is the last version, and the last that concerns proxies: who has settled on that
// has settled on all that follows. Called with mu or without.
func (s *Server) latest() (version, world uint64) {
	s.told.RLock()
	defer s.told.RUnlock()
	return s.version, s.world.last
}

// Acked lists, sorted, the nodes that may still act on something older than
// version: their proxy is connected and has not settled on it, or left less than
// GoneAfter ago. A node whose proxy refused a resource stays listed until it has
// a good one. It costs what it lists.
func (s *Server) Acked(version uint64) (waiting []string) {
	_, world := s.latest()
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting = slices.Collect(maps.Keys(s.away))
	s.acks.below(min(version, world), 0, func(p *standing) { waiting = append(waiting, p.name) })
	slices.Sort(waiting)
	return slices.Compact(waiting)
}

// isLate tells whether p has taken nothing for so long, of what there was for it up to world,
// that nobody waits for it any more. Called with mu.
func (s *Server) isLate(p *standing, world uint64, now time.Time) bool {
	switch at := p.applied.version; {
	case at >= world:
		p.behind, p.late = time.Time{}, false
	case p.late:
	case p.behind.IsZero() || p.seen != at:
		p.behind, p.seen = now, at
	case now.Sub(p.behind) >= s.cfg.LateAfter:
		p.late = true
		s.cfg.Log.Warn("pods no longer wait for a node that takes nothing", "node", p.name, "after", s.cfg.LateAfter)
	}
	return p.late
}

// Applied is the oldest publication that a node decides by, be it that it still acts on
// an older one: MaxUint64 if there is no node, 0 if one that has left may come back soon.
// Left out are nodes that do not count, those that have left more than LateAfter ago, and those
// that have not moved for as long and have not caught up since. It costs a look at those, and
// at those that have come no further.
func (s *Server) Applied(counts func(node string) bool) uint64 {
	version, world := s.latest()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for name := range s.away {
		if counts(name) && now.Sub(s.nodes[name].gone) < s.cfg.LateAfter {
			return 0
		}
	}
	waited := func(p *standing) bool { return !s.isLate(p, world, now) && counts(p.name) }
	oldest := s.applies.oldest(math.MaxUint64, 0, waited)
	// Those that have come no further are what it may be asked about next.
	s.applies.below(max(oldest, oldest+1), 0, func(p *standing) { p.discounted = !waited(p) })
	return lift(oldest, version, world)
}

// lift is what who has come as far as at has in fact: between world and version nothing
// concerned it.
func lift(at, version, world uint64) uint64 {
	if at >= world {
		return max(at, version)
	}
	return at
}

// acked is the oldest version that a connected proxy of n has settled on.
func (n *node) acked() (version uint64, proxy bool) {
	for i, p := range n.proxies {
		if i == 0 || p.acked.version < version {
			version, proxy = p.acked.version, true
		}
	}
	return version, proxy
}

func (n *node) rejected() string {
	for st := range n.streams {
		for _, refusal := range st.refusals {
			return refusal
		}
	}
	return ""
}

// Changed receives after the answer of Acked, for a version that all but one node had
// settled on, or of Applied, or who is connected, or what is refused, may have changed; several changes at once. There is one
// channel: it is meant for one reader.
func (s *Server) Changed() <-chan struct{} { return s.changed }

// Agents tells of each agent that has come or gone since the last call whether it is connected.
func (s *Server) Agents() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	moved := s.movedAgents
	s.movedAgents = map[string]bool{}
	for name := range moved {
		n := s.nodes[name]
		moved[name] = n != nil && n.reports != nil
	}
	return moved
}

// Nodes lists what is known of the nodes, by name. It costs a look at each.
func (s *Server) Nodes() []NodeStatus {
	version, world := s.latest()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]NodeStatus, 0, len(s.nodes))
	for _, name := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[name]
		st := NodeStatus{Node: name, Rejected: n.rejected(), GoneSince: n.gone, Agent: n.reports != nil}
		st.Acked, st.Proxy = n.acked()
		st.Behind = st.Proxy && st.Acked < world
		st.Acked = lift(st.Acked, version, world)
		out = append(out, st)
	}
	return out
}
