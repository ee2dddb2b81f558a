package proxy

import (
	"errors"
	"net/netip"
	"slices"
	"sync"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// Who may connect to a pod is decided here, at the destination, before its application is
// dialled; and again, for what is open, whenever the World changes:
//
//	permit: enter ──► decide by the World of now ──► dial, join ──► leave
//	                                                       ▲
//	knowledge.apply: the next World decides ──► review: what is open and denied now is reset
//	                                              └──► only then is that World settled
//
// What leaves the pod in plaintext goes the same way (letOut): the mode of the pod decides.
//
// A passage is entered before it is decided. So a World that comes between the two either
// decides it, or finds it open.

// denial is why a policy lets a connection not pass.
type denial struct{ policy.Verdict }

func (d denial) Error() string { return d.String() }

// spareSets is how many Sets of pods that are gone, or have changed, a Book may have besides one for each pod.
const spareSets = 64

func isDenied(err error) bool { return errors.As(err, new(denial)) }

// passage is an inbound connection that a policy has let in, or is about to; or one that is
// kept for the next; or one that leaves in plaintext.
type passage struct {
	// connection is what comes in. Of one that leaves, its Source is where that leads.
	connection policy.Connection
	// departure is one that leaves, nil for what comes in.
	departure *policy.Departure
	// end ends it, for a reason. It may be called at any time, also after its end.
	end func(*refusal)
	// next and before are those of the same source; guarded by passages.mu.
	next, before *passage
}

// passages are those of one pod, by the address at the other end. It is safe for concurrent use.
type passages struct {
	mu   sync.Mutex
	from map[netip.Addr]*passage // the first of each source
	open int
}

func (s *passages) enter(p *passage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.from == nil {
		s.from = make(map[netip.Addr]*passage)
	}
	at := p.connection.Source
	if p.next = s.from[at]; p.next != nil {
		p.next.before = p
	}
	s.from[at] = p
	s.open++
}

// leave may be called for nil.
func (s *passages) leave(p *passage) {
	if p == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if p.next != nil {
		p.next.before = p.before
	}
	switch at := p.connection.Source; {
	case p.before != nil:
		p.before.next = p.next
	case p.next != nil:
		s.from[at] = p.next
	default:
		delete(s.from, at)
	}
	p.next, p.before = nil, nil
}

// list returns those of the sources, or all for nil.
func (s *passages) list(sources []netip.Addr) (all []*passage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sources == nil || len(sources) > s.open {
		for _, p := range s.from {
			all = p.appendTo(all)
		}
		return all
	}
	for _, a := range sources {
		all = s.from[a].appendTo(all)
	}
	return all
}

func (p *passage) appendTo(all []*passage) []*passage {
	for ; p != nil; p = p.next {
		all = append(all, p)
	}
	return all
}

// law is what applies to a pod under the policies of one World.
type law struct {
	version uint64 // mesh.World.PolicyVersion
	// self is the pod as the World knows it, or has known it last; nil for never.
	self *mesh.Peer
	set  *policy.Set
}

// laws compile the policies, for all pods of the node.
type laws struct {
	mu   sync.Mutex
	book *policy.Book
	// version is the mesh.World.PolicyVersion of book. It belongs to review.
	version uint64
}

// compile makes the Set of who is self in w. Which policies name somebody who is not known
// is not known either, nor which mode that has.
func (l *laws) compile(w *mesh.World, d *pod, self *mesh.Peer) *policy.Set {
	var unknown []string
	f := d.facts.Load()
	own := (*mesh.Mode)(nil)
	if self == nil {
		if self = f.workload; w.HasNamed() {
			unknown = []string{"of " + f.pod}
		}
		if w.HasStrict() {
			own = mesh.StrictMode()
		}
	} else {
		own = self.Mode
	}
	all, missing := w.PoliciesOf(self)
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.book.Compile(all, append(unknown, missing...), own)
}

// law returns what applies to the pod in w.
func (d *pod) law(w *mesh.World) *law {
	had, self := d.lawful.Load(), d.own(w)
	if self == nil && had != nil {
		self = had.self
	}
	if had != nil && had.version == w.PolicyVersion() && sameLaw(had.self, self) {
		return had
	}
	return d.newLaw(w, self)
}

func (d *pod) newLaw(w *mesh.World, self *mesh.Peer) *law {
	l := &law{w.PolicyVersion(), self, d.p.laws.compile(w, d, self)}
	d.lawful.Store(l)
	return l
}

func sameLaw(a, b *mesh.Peer) bool {
	return a == b || a != nil && b != nil && a.Namespace == b.Namespace && slices.Equal(a.Policies, b.Policies) && a.Mode.Equal(b.Mode)
}

// own is the pod itself in w, and never another one that has its address: nil then.
func (d *pod) own(w *mesh.World) *mesh.Peer {
	f := d.facts.Load()
	for _, a := range f.caller.addresses {
		if p := w.Workload(a); p != nil && p.ID == d.id && p.Namespace == f.namespace && p.Name() == f.name {
			return p
		}
	}
	return nil
}

// permit lets j pass, of a peer that has proved id, or is nobody. The passage is open from
// before the decision until finished.
func (d *pod) permit(j *journey, id mesh.ID) error {
	d.follows(j, &passage{connection: j.connection(id), end: func(why *refusal) { j.queued.reset(why) }})
	c := j.passage.connection
	w := d.p.know.world()
	set := d.law(w).set
	v := judge(&c, set, w)
	if tried, is := set.Try(&c); is && tried.Allowed != v.Allowed {
		j.flow.DryRun = tried.String()
		d.p.metrics.dryRuns.Inc()
	}
	j.flow.Policy = v.Policy
	if why := d.object(&c, v, w); why != nil {
		return why
	}
	if set.IsException(&c) {
		return d.except(j, true)
	}
	return nil
}

// follows has j found by p from now on, and by no other one.
func (d *pod) follows(j *journey, p *passage) {
	d.passages.leave(j.passage)
	if j.passage = p; p != nil {
		d.passages.enter(p)
	}
}

// except lets plaintext pass although the mode is strict, and counts it where an exception says so.
// Without a certificate not even that passes. That has ended when control has been away for long,
// and the World is too old.
func (d *pod) except(j *journey, counts bool) error {
	if _, err := d.leaf(); err != nil {
		return err
	}
	if counts {
		d.p.metrics.exception(j.inbound)
	}
	return nil
}

// judge decides about c by the set and w.
func judge(c *policy.Connection, set *policy.Set, w *mesh.World) policy.Verdict {
	c.FromNode = w.IsNode(c.Source)
	return set.Decide(c)
}

// objection tells why what is open may not be, nil if it may.
func (d *pod) objection(p *passage, set *policy.Set, w *mesh.World) *refusal {
	if p.departure != nil {
		if v := judgeDeparture(*p.departure, set, w); !v.Allowed {
			return denied(v)
		}
		return nil
	}
	c := p.connection
	return d.object(&c, judge(&c, set, w), w)
}

// object tells why a connection may not be open, nil if it may. Whoever has the address of
// its source by now must be who has opened it, and neither end may be revoked.
func (d *pod) object(c *policy.Connection, v policy.Verdict, w *mesh.World) *refusal {
	if !v.Allowed {
		return denied(v)
	}
	id := c.Peer.ID()
	if id.IsZero() {
		return nil
	}
	if why := revoked(w, id, d.id); why != nil {
		return why
	}
	if source := w.Workload(c.Source); source != nil && source.ID != id {
		return refuse(identity.ReasonWrongIdentity, flagDenied, "%s is at %s now: not %s", source.ID, c.Source, id)
	}
	return nil
}

func denied(v policy.Verdict) *refusal {
	reason := reasonDenied
	if v.Reason == policy.Strict {
		reason = reasonStrict
	}
	return &refusal{reason, flagDenied, denial{v}}
}

// connection is what policies see of j.
func (j *journey) connection(id mesh.ID) policy.Connection {
	to := j.flow.Dialled
	return policy.Connection{
		Peer: policy.Proved(id), Source: plain(j.flow.SourceAddr.Addr()), Destination: netip.AddrPortFrom(plain(to.Addr()), to.Port()),
	}
}

func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// watchKept has the passage of a connection that is kept after j reviewed until done.
func (d *pod) watchKept(j *journey, pc *peerConn, end func()) (done func()) {
	p := &passage{connection: j.connection(pc.Peer().ID), end: func(*refusal) { end() }}
	d.passages.enter(p)
	return func() { d.passages.leave(p) }
}

// review judges what is open by w, which decides from now on. Sources are addresses of which
// w says something else than the World before, nil for all. One at a time is called.
func (p *Proxy) review(w *mesh.World, sources []netip.Addr) {
	if p.trusts != w.TrustVersion() {
		p.trusts, sources = w.TrustVersion(), nil
		defer p.endRevoked(w)
	}
	pods := p.list()
	turned := p.laws.turn(w, len(pods))
	for _, d := range pods {
		now := d.law(w)
		if turned {
			now = d.newLaw(w, now.self) // the new Book has to know what is still used
		}
		look := sources
		if d.reviewed != now.set {
			d.reviewed, look = now.set, nil
		} else if sources != nil && len(sources) == 0 {
			continue
		}
		for _, one := range d.passages.list(look) {
			if why := d.objection(one, now.set, w); why != nil {
				one.end(why)
				p.metrics.judged(why)
			}
		}
	}
	p.laws.closeOld()
}

// turn begins another Book if policies are other ones, or if it has much that was for pods which
// are gone. It reports whether it has. closeOld forgets what that was not asked for.
func (l *laws) turn(w *mesh.World, pods int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.version == w.PolicyVersion() && l.book.Len() <= 2*pods+spareSets {
		return false
	}
	l.version, l.book = w.PolicyVersion(), l.book.Next()
	return true
}

func (l *laws) closeOld() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.book.Close()
}
