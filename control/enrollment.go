package control

import (
	"net/netip"
	"slices"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/wire/xds"
)

// State is how far the enrollment of one pod is.
//
//	                  label on                  agent: captured
//	  ┌─► outside ──────────────► enrolling ─────────────────────► announced
//	  │      │ agent: captured        │                             │     ▲
//	  │      │ (nobody asked)         │ label off          label off│     │label on
//	  │      ▼                        │                             ▼     │
//	  └── releasing ◄─────────────────┴────────────────────────── withdrawing
//	agent: not captured                                   every node acknowledged
//	(or silent for a while)                               or is gone
//
// What the others see and what the node is told follows from it:
//
//	             Pod.Enroll   Workload.Direct   .Enrolled   signed for
//	outside      false       false             false       no
//	enrolling    true        false             true        yes
//	announced    true        true              true        yes
//	withdrawing  true        false             true        yes
//	releasing    false       false             true        yes
//
// Two orders are kept by it. A pod is announced only after its agent has said
// that it is captured: else its application would be handed a ClientHello. And it
// is released only after nobody dials it by direct any more, for the same reason.
//
// An announced pod stays announced until its label says otherwise, even if its
// agent is silent, gone, or says that it is not captured: peers then fail to
// reach it, and the pod is reported as unprotected. The other choice would turn
// an accident into plaintext.
//
// In releasing the label may be on again. The pod is not enrolled again before the
// agent has spoken: a "captured" that it said before it heard of the release
// would be taken for one that it said after the new enrollment. An agent that has
// been connected for a while and says nothing has nothing to say: a pod that is
// drained stays captured in its eyes, and enrolling it again changes nothing.
type State string

// The states; see State.
const (
	Outside     State = "outside"
	Enrolling   State = "enrolling"
	Announced   State = "announced"
	Withdrawing State = "withdrawing"
	Releasing   State = "releasing"
)

// enroll tells whether the node is told to enroll the pod.
func (s State) enroll() bool { return s == Enrolling || s == Announced || s == Withdrawing }

// direct tells whether the pod is announced to the others.
func (s State) direct() bool { return s == Announced }

// mayDial tells whether the pod's proxy may dial by direct, with a leaf of its own.
func (s State) mayDial() bool { return s != Outside }

// leaves tells whether the pod is on its way out. It is to be as any pod outside of the mesh, which
// others reach in plaintext already: no mode is strict with it.
func (s State) leaves() bool { return s == Withdrawing || s == Releasing }

// word is what the agent has said about a pod.
type word string

const (
	// silent: nothing yet, or nothing that counts any more.
	silent word = "silent"
	// captured, and it was said since the pod is in its state.
	captured word = "captured"
	// stale: captured was the last word, but something else was asked since.
	stale word = "stale"
	// free: anything but captured.
	free word = "free"
)

// situation is all that decides about the state after this one.
type situation struct {
	// wanted: the labels ask for the pod to be enrolled.
	wanted bool
	word   word
	// acked: no node acts on the announcement any more.
	acked bool
	// rested: what the agent said before it heard of this state has arrived.
	rested bool
	// settled: the agent would have spoken by now if it had anything to say. It
	// implies rested.
	settled bool
}

// after is the state machine: pure, one step.
func (s State) after(o situation) State {
	switch s {
	case Outside:
		switch {
		case o.wanted:
			return Enrolling
		case o.word == captured:
			return Releasing
		}
	case Enrolling:
		switch {
		case !o.wanted:
			return Releasing
		case o.word == captured, o.word == stale && o.settled:
			return Announced
		}
	case Announced:
		if !o.wanted {
			return Withdrawing
		}
	case Withdrawing:
		switch {
		case o.wanted:
			return Announced
		case o.acked:
			return Releasing
		}
	case Releasing:
		if o.word == free && o.rested || o.settled && (o.wanted || o.word == silent) {
			return Outside
		}
	}
	return s
}

// restFor is longer than a report travels. A pod that is released is not enrolled
// again sooner: a report that crossed with the release would be taken for news
// about the enrollment.
const restFor = 100 * time.Millisecond

// settleAfter is how long a connected agent may be silent about what it was told.
// It answers in a fraction of it. One that is not connected brings everything it
// has to say when it comes back, and is waited for.
const settleAfter = 3 * time.Second

// enrollment is the enrollment of one pod. The reconciling goroutine owns it.
type enrollment struct {
	pod kube.Pod
	// hosted is the workload as roster.hosts has it.
	hosted *mesh.Workload
	state  State
	word   word
	// reason is why the agent says that the pod is not captured; of a captured one, why it
	// is only partly protected.
	reason string
	// since is when state was entered.
	since time.Time
	// withdrawn is the publication that withdrew it, 0 if it is not published yet.
	withdrawn uint64
	// told are its addresses by its agent, nil if that has not said.
	told []netip.Addr
	// others are further ones, as its agent sees them in the pod.
	others []netip.Addr
	// unkept says that its state is not remembered yet, so that nobody is told of it.
	unkept bool
	// markedPorts is mesh.Workload's, by its agent; news says that it has changed and no
	// node has been told.
	markedPorts, news bool
	// said is what the reader of objects knows of what its agent says.
	said kube.Said
	// timed is when it is looked at again, if a timer is set.
	timed time.Time
	// toldNode: its node knows of it.
	toldNode bool
	// allowed is for whom its node may have a leaf because of it, nil if for nobody.
	allowed *allowance
	// counts is how it is counted.
	counts counted
	// at is where it is announced, nil if it is not; spreading is the publication that said
	// so, 0 when every node decides by it. everywhere are those of at by which every node
	// decides already.
	at, everywhere []netip.Addr
	spreading      uint64
}

// outlook is what an enrollment sees of the world besides its own pod.
type outlook struct {
	now time.Time
	// acked tells whether no node acts on anything older than the publication.
	acked func(version uint64) bool
	// applied is the oldest publication that any node decides by.
	applied func() uint64
	// connected tells whether the agent of the node is.
	connected map[string]bool
}

// hear takes in what the agent said.
func (e *enrollment) hear(r xds.Report) {
	e.word, e.reason = free, r.Reason
	switch r.State {
	case xds.Captured:
		e.word, e.told, e.others = captured, r.Addresses, r.Others
		e.news = e.news || e.markedPorts != r.MarkedPorts
		e.markedPorts = r.MarkedPorts
	case xds.Released:
		e.told, e.others = nil, nil
	case xds.Unprotected: // it is where it was
	}
}

// direct tells whether the others are told to dial it by direct.
func (e *enrollment) direct() bool { return e.state.direct() && !e.unkept }

// announced notes which publication announces the pod where it is now, and tells whether it is
// this one.
func (e *enrollment) announced(version uint64) bool {
	switch {
	case !e.direct() || e.pod.Workload == nil:
		e.at, e.everywhere, e.spreading = nil, nil, 0
	case !slices.Equal(e.at, e.pod.Workload.Addresses):
		e.at, e.spreading = e.pod.Workload.Addresses, version
		e.everywhere = slices.DeleteFunc(slices.Clone(e.everywhere), func(a netip.Addr) bool { return !slices.Contains(e.at, a) })
		return true
	}
	return false
}

// spread takes note that every node decides by the publication that announces the pod, and
// tells whether that is new.
func (e *enrollment) spread(applied func() uint64) bool {
	if e.spreading == 0 || applied() < e.spreading {
		return false
	}
	e.everywhere, e.spreading = e.at, 0
	return true
}

// advance steps until nothing changes any more, and tells whether anything did.
func (e *enrollment) advance(o outlook) bool {
	before := e.state
	for {
		next := e.state.after(situation{
			wanted:  e.pod.Enroll,
			word:    e.word,
			acked:   e.state == Withdrawing && e.withdrawn != 0 && o.acked(e.withdrawn),
			rested:  o.now.Sub(e.since) >= restFor,
			settled: e.awaitsWord() && o.now.Sub(e.since) >= settleAfter && o.connected[e.pod.Node],
		})
		if next == e.state {
			return next != before
		}
		e.enter(next, o.now)
	}
}

// enter forgets what no longer counts: words said about what was asked before.
func (e *enrollment) enter(next State, now time.Time) {
	if next == Releasing || e.state == Releasing {
		if e.reason = ""; e.word == captured || e.word == stale {
			e.word = stale
		} else {
			e.word = silent
		}
	}
	e.state, e.since, e.withdrawn = next, now, 0
}

// awaitsWord tells whether the silence of the agent means something.
func (e *enrollment) awaitsWord() bool {
	return e.state == Releasing || e.state == Enrolling && e.word == stale
}

// deadline is when the state may change though nobody says anything; zero if it
// does not.
func (e *enrollment) deadline() time.Time {
	switch {
	case e.state == Releasing && e.word == free:
		return e.since.Add(restFor)
	case e.awaitsWord():
		return e.since.Add(settleAfter)
	}
	return time.Time{}
}

// lookAgain is when something about the pod may change by time alone; zero if nothing does.
func (e *enrollment) lookAgain() time.Time {
	d := e.deadline()
	if e.state == Enrolling && e.pod.Shown.Status == "" { // see condition
		if shown := e.since.Add(enrollingAfter); d.IsZero() || shown.Before(d) {
			return shown
		}
	}
	return d
}

// allowance is for whom the pod's node may have a leaf because of it, nil if for nobody.
func (e *enrollment) allowance() *allowance {
	if !e.state.mayDial() {
		return nil
	}
	return &allowance{e.pod.Node, e.pod.ID}
}
