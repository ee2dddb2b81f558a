package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

// A pod is one that a runtime has told of. It goes this way:
//
//	    ADD, or found again
//	          │
//	          ▼              control: enroll
//	┌──────► idle ───────────────────────────► listening   listeners are open
//	│         ▲                                    │ tell the proxy
//	│         │ control: do not                    ▼
//	│         ├─────────────────────────────── told        the proxy fetches the certificate
//	│         │                                    │ proxy: ready
//	│         │ remove rules,                      ▼
//	│         │ close listeners                captured ◄──┐ read back, repaired
//	│         │                                    │       │
//	│         │         control: do not            │ ──────┘
//	│         │   ┌────────────────────────────────┘
//	│         │   ▼
//	│      draining   rules capture nothing new; the proxy is told to drain,
//	│         │ ▲     and says drained when its last connection has ended
//	│         └─┘
//	│         control: enroll — from draining back to told
//	│
//	└ from everywhere: DEL, or the namespace is gone ──► forgotten
//
// It is not kept as one variable but as facts, and next decides from them: so it
// does not matter in which order agent, proxy and control come and go. All fields
// belong to the loop; a job gets copies.
type pod struct {
	rec record
	// key is what the proxy knows it by: the UID, or the sandbox if the runtime
	// does not tell the UID.
	key string

	ns        *netns.NS // open only while there are listeners or rules
	listeners []listener
	rules     rules
	proxy     proxyWord
	// reason is what the proxy says it is waiting for.
	reason string
	// gone: by DEL, or because the namespace is.
	gone bool
	// successor is a new sandbox of the same pod, which waits for this to be gone.
	successor *pod

	// busy: a job is at work.
	busy bool
	// needs counts the sockets that the proxy asks for, by family; giving says
	// that some are being made. This goes on beside any other job.
	needs  map[int]int
	giving map[int]bool
	binds  binds
	// err is why the last job failed, retry when it may be tried again.
	err     error
	retry   time.Time
	backoff time.Duration
	// check is when the rules are read back next.
	check time.Time
	// checked is when that was begun last.
	checked time.Time
	// unrest is how long they are left alone after a repair, since somebody changes them again
	// and again; 0 in quiet times. repaired is when they were put right last.
	unrest   time.Duration
	repaired time.Time
	// guard is what is known of the pod's guard.
	guard guard
	// since is when control first wanted what is not so yet.
	since time.Time
	// recovering: not yet looked at since the agent began.
	recovering bool
	// reported is the last state that control has been told, and of a captured pod
	// reportedPorts the last markedPorts, reportedOthers the last others.
	reported       xds.PodState
	reportedPorts  bool
	reportedOthers []netip.Addr
	// markedPorts: the namespace gives programs source ports that hint at direct.
	markedPorts bool
	// others are addresses that the namespace has besides those of reached.
	others []netip.Addr
	// ports are those that the proxy has been told last; zeros if it has not.
	ports  [2]uint16
	logged string // last reason told of it being unprotected
	// settled hear when the pod is as control wants it, known when every node knows it,
	// forgotten when it is.
	settled   []chan struct{}
	known     []chan struct{}
	forgotten []chan struct{}
	// stopWatch ends the watch over the namespace; nil while there is none.
	stopWatch context.CancelFunc
}

type listener struct {
	role handle.Role
	file *os.File
}

// rules is what we know of the rules in the pod.
type rules int

const (
	noRules rules = iota
	// stale: some are there that should capture; not read back, or found wrong,
	// or not those that are wanted now.
	stale
	capturing
	draining
)

func (r rules) String() string {
	return [...]string{"none", "stale", "capturing", "draining"}[r]
}

// proxyWord is the last that was said between us and the proxy that is connected.
type proxyWord int

const (
	unsaid proxyWord = iota
	saidServe
	saysReady
	saidDrain
	saysDrained
)

func (w proxyWord) String() string {
	return [...]string{"unsaid", "told to serve", "ready", "told to drain", "drained"}[w]
}

// step is what is to be done next.
type step int

const (
	wait    step = iota
	open         // namespace and listeners
	tell         // the proxy to serve
	capture      // apply the rules
	drain        // apply rules that capture nothing new
	tellDrain
	release // remove everything
	forget  // remove everything, and the record
)

// facts is all that next looks at.
type facts struct {
	known, enroll, gone bool
	open                bool // listeners are
	connected           bool // a proxy is
	rules               rules
	proxy               proxyWord
}

// next decides. It is the drawing above, as a function.
func next(f facts) step {
	switch {
	case f.gone:
		return forget
	case !f.known:
		return wait
	case f.enroll:
		return nextIn(f)
	}
	return nextOut(f)
}

func nextIn(f facts) step {
	serving := f.proxy == saidServe || f.proxy == saysReady
	switch {
	case f.rules == stale: // first: it may be unprotected now
		return capture
	case !f.open:
		return open
	case f.connected && !serving:
		return tell
	case f.rules != capturing && f.proxy == saysReady:
		return capture
	}
	return wait
}

func nextOut(f facts) step {
	switch {
	case f.rules == noRules && !f.open:
		return wait
	case f.rules == noRules, f.proxy == saysDrained:
		return release
	case f.rules != draining:
		return drain
	case !f.connected || f.proxy == saidDrain:
		return wait
	case !f.open:
		return open
	case f.proxy == unsaid:
		return tell
	}
	return tellDrain
}

func (p *pod) facts(connected bool) facts {
	w := p.rec.Word
	return facts{
		known: w != nil, enroll: w != nil && w.Enroll, gone: p.gone, open: len(p.listeners) > 0,
		connected: connected, rules: p.rules, proxy: p.proxy,
	}
}

func (p *pod) enrolled() bool { return !p.gone && p.rec.Word != nil && p.rec.Word.Enroll }

// isSettled reports whether the pod is as control wants it, as far as an ADD has
// to wait. A pod that is being drained was in the mesh already: nobody adds it.
func (p *pod) isSettled() bool {
	switch {
	case p.gone || p.rec.Word == nil:
		return false
	case p.rec.Word.Enroll:
		return p.rules == capturing && p.proxy == saysReady
	}
	return p.rules == noRules || p.rules == draining
}

// isKnown reports whether nobody takes the pod for something outside of the mesh any
// more, whoever learns its addresses from elsewhere. Nobody has to know one that is in no
// mesh.
func (p *pod) isKnown() bool {
	w := p.rec.Word
	return w != nil && (!w.Enroll || !slices.ContainsFunc(p.reached(), func(a netip.Addr) bool { return !slices.Contains(w.Known, a) }))
}

// reached is where others reach the pod, as its runtime has told: one address of each
// family. Of one that was found nobody has told, and it began long ago.
func (p *pod) reached() []netip.Addr {
	if p.rec.Found {
		return nil
	}
	return mesh.OneOfEach(p.rec.Addresses)
}

// waitsFor is what an impatient plugin is told.
func (p *pod) waitsFor(connected bool) string {
	switch {
	case p.err != nil:
		return p.err.Error()
	case p.rec.Word == nil:
		return "control has not told of this pod yet"
	case !connected:
		return "no proxy is connected"
	case p.proxy == saidServe && p.reason != "":
		return "the proxy is not ready: " + p.reason
	case p.proxy == saidServe:
		return "the proxy is not ready yet: no certificate"
	}
	return "work in progress"
}

// redirection is the rules that control's word asks for.
func (p *pod) redirection() redirect.Config {
	if p.rules == draining || p.rec.Word == nil {
		return redirect.Config{Drain: true}
	}
	return p.redirectionBy(*p.rec.Word)
}

// redirectionBy is the rules that a word asks for.
func (p *pod) redirectionBy(w mesh.Pod) redirect.Config {
	return redirect.Config{ExcludeOutbound: w.ExcludeOutbound, ExcludeInbound: w.ExcludeInbound, ProbePorts: w.ProbePorts, Own: p.own(w)}
}

// own is where the mesh knows the pod, or is about to; nothing if nobody has said so yet.
func (p *pod) own(w mesh.Pod) []netip.Addr {
	all := slices.Concat(p.reached(), w.Known)
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// info is what the proxy is told.
func (p *pod) info() *handle.PodInfo {
	return &handle.PodInfo{
		UID: p.key, Namespace: p.rec.Namespace, Name: p.rec.Name,
		ID: p.rec.Word.ID.String(), Addresses: p.rec.Addresses,
	}
}

// hear takes control's word, and reports whether it is another than before.
func (p *pod) hear(w mesh.Pod, now time.Time) bool {
	old := p.rec.Word
	if old != nil && sameWord(*old, w) {
		return false
	}
	if old == nil || old.Enroll != w.Enroll {
		p.since = now
	}
	if old != nil && old.ID != w.ID && p.proxy != saidDrain && p.proxy != saysDrained {
		p.proxy = unsaid
	}
	if p.rules == capturing && (old == nil || !p.sameRules(*old, w)) {
		p.rules = stale
	}
	p.rec.Word = &w
	p.err, p.retry, p.backoff = nil, time.Time{}, 0
	return true
}

// sameRules: what the node's addresses are, which some rules need, does not change.
func (p *pod) sameRules(a, b mesh.Pod) bool {
	return redirect.Ruleset(p.redirectionBy(a)) == redirect.Ruleset(p.redirectionBy(b)) && slices.Equal(a.ProbePorts, b.ProbePorts)
}

func sameWord(a, b mesh.Pod) bool {
	return a.UID == b.UID && a.ID == b.ID && a.Enroll == b.Enroll &&
		slices.Equal(a.ExcludeOutbound, b.ExcludeOutbound) && slices.Equal(a.ExcludeInbound, b.ExcludeInbound) &&
		slices.Equal(a.ProbePorts, b.ProbePorts) && slices.Equal(a.Known, b.Known)
}

// closeFiles lets go of the namespace and the listeners, our copies of them.
func (p *pod) closeFiles() {
	if p.stopWatch != nil {
		p.stopWatch()
		p.stopWatch = nil
	}
	for _, l := range p.listeners {
		closeShared(l.file)
	}
	p.listeners = nil
	if p.ns != nil {
		p.ns.Close()
		p.ns = nil
	}
}

// addresses of the capture in a pod's namespace, by role.
func addresses() map[handle.Role]netip.AddrPort {
	return map[handle.Role]netip.AddrPort{
		handle.Outbound4: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), mesh.OutboundPort),
		handle.Outbound6: netip.AddrPortFrom(netip.IPv6Loopback(), mesh.OutboundPort),
		handle.Inbound4:  netip.AddrPortFrom(netip.IPv4Unspecified(), mesh.InboundPort),
		handle.Inbound6:  netip.AddrPortFrom(netip.IPv6Unspecified(), mesh.InboundPort),
	}
}

var errTaken = errors.New("the port is taken in the pod: by the proxy, which will give the listener back, or by the application")
