package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/policy"
	"tacit.dev/relay"
	"tacit.dev/wire/handle"
)

// maxListeners bounds what a confused agent could give to one pod.
const maxListeners = 16

// podState is how far a pod is.
//
//	           certificate           drain          no connection,
//	           and World             ▼              empty backlog
//	starting ───────────► serving ──────► draining ──────► drained
//	   │  too late:          ▲               │                │
//	   │  accept and refuse  └──── pod again ┴────────────────┘
//	   ▼
//	remove, at any time: connections are reset, and the pod is forgotten
type podState string

const (
	starting podState = "starting"
	serving  podState = "serving"
	draining podState = "draining"
	drained  podState = "drained"
)

// pod is one enrolled pod of the node.
type pod struct {
	p   *Proxy
	uid string
	id  mesh.ID
	log *slog.Logger
	// cancel ends run, and with it all of the pod.
	cancel context.CancelFunc

	sockets4, sockets6 *sockets
	bindings           *bindings
	// ports are the pod's portRange, first in the upper half.
	ports atomic.Uint32
	// quota counts the connections, whatever their kind.
	quota quota
	looks *arrivals
	// arrivals are the inbound ones of quota.
	arrivals *arrivals
	// dialling and answering are its parts of the node's.
	dialling, answering *share
	lines               *lines
	// affinity outlives facts.
	affinity *affinity
	// idle are the connections that are kept for the next one, and keeps counts them.
	idle  *idlePeers
	keeps quota
	// accepted counts all connections ever accepted.
	accepted atomic.Uint64
	counts   podCounts
	// announced is when the pod was first seen to be announced, in Unix
	// nanoseconds; 0 while it is not.
	announced atomic.Int64
	// alive is what connections have for keepalive; nil until the first one.
	alive atomic.Pointer[alive]
	// lawful is what applied to the pod last, nil for never.
	lawful   atomic.Pointer[law]
	passages passages
	// reviewed is by what passages were judged last. It belongs to Proxy.review.
	reviewed *policy.Set
	// facts may be replaced by a newer message of the agent.
	facts atomic.Pointer[facts]

	// woken has one element when run has to look again.
	woken chan struct{}
	// drains is true while the agent wants the pod to drain.
	drains atomic.Bool

	// mu guards the fields below, which run writes and others read.
	mu        sync.Mutex
	state     podState
	listeners []*listener
	// owed says that a word is due to the agent when the pod is where the agent wants it.
	owed bool
}

// facts is what the agent tells of a pod. It is not changed.
type facts struct {
	namespace, name string
	// pod is NAMESPACE/NAME.
	pod    string
	caller caller
	// workload stands for the pod while the World does not know it.
	workload *mesh.Peer
}

// listener is one of the pod's listening sockets. The agent has it too.
type listener struct {
	*net.TCPListener
	role   handle.Role
	cookie uint64
	// started is run's own: it is accepted from.
	started bool
}

// serve begins to serve the pod that the agent tells of, or goes on serving it.
// It owns files.
func (p *Proxy) serve(ctx context.Context, m handle.Message, files []int) {
	id, err := mesh.ParseID(m.Pod.ID)
	if err != nil { // handle has checked it
		closeAll(files)
		return
	}
	d := p.pod(m.UID)
	if d != nil && d.id != id {
		d.remove()
		d = nil
	}
	begin := func() {}
	if d == nil {
		d, begin = p.newPod(ctx, m.UID, id)
	}
	d.facts.Store(d.factsOf(m.Pod))
	d.adopt(m.Roles, files)
	d.drains.Store(false)
	if p.departs.Load() == int32(staying) {
		d.idle.open()
	}
	d.order()
	begin()
}

// newPod makes a pod, which is served from the call of begin on.
func (p *Proxy) newPod(ctx context.Context, uid string, id mesh.ID) (d *pod, begin func()) {
	ctx, cancel := context.WithCancel(ctx)
	d = &pod{
		p: p, uid: uid, id: id, cancel: cancel, state: starting,
		log:   p.log.With("pod_uid", uid, "identity", id.String()),
		quota: quota{max: int64(p.cfg.MaxConnectionsPerPod)}, lines: newLines(),
		looks: newLooks(p.cfg.MaxConnectionsPerPod, &p.looking), arrivals: newArrivals(p.cfg.MaxConnectionsPerPod), dialling: p.dialling.share(), answering: p.answering.share(),
		woken: make(chan struct{}, 1), affinity: newAffinity(), idle: newIdlePeers(), keeps: quota{max: keepMostOf},
	}
	d.sockets4 = newSockets(false, &p.starved, d.log, d.need(4))
	d.sockets6 = newSockets(true, &p.starved, d.log, d.need(6))
	d.bindings = newBindings(func(source netip.AddrPort) bool {
		return d.p.link.post(handle.Message{Kind: handle.Bind, UID: d.uid, Source: source})
	})
	return d, func() {
		p.mu.Lock()
		p.pods[uid] = d
		p.mu.Unlock()
		d.sockets4.connected()
		d.sockets6.connected()
		p.running.Go(func() { d.run(ctx) })
	}
}

func (d *pod) factsOf(i *handle.PodInfo) *facts {
	return &facts{
		namespace: i.Namespace, name: i.Name, pod: i.Namespace + "/" + i.Name,
		caller:   caller{addresses: slices.Clone(i.Addresses), node: d.p.cfg.Node, pick: rand.IntN, affinity: d.affinity},
		workload: (&mesh.Workload{Namespace: i.Namespace, Name: i.Name, Addresses: slices.Clone(i.Addresses), ID: d.id}).Peer(),
	}
}

// need returns the function that asks the agent for sockets of a family.
func (d *pod) need(family int) func(n int) bool {
	return func(n int) bool {
		return d.p.link.post(handle.Message{Kind: handle.Need, UID: d.uid, Family: family, Count: n})
	}
}

// pod returns the pod with that UID, or nil.
func (p *Proxy) pod(uid string) *pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pods[uid]
}

// list returns the pods of now.
func (p *Proxy) list() []*pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]*pod, 0, len(p.pods))
	for _, d := range p.pods {
		all = append(all, d)
	}
	return all
}

// held tells the agent which listeners are here, so that an agent that was
// restarted has them again. The files are copies; done closes them.
func (p *Proxy) held() (held []handle.HeldPod, done func()) {
	for _, d := range p.list() {
		h := handle.HeldPod{UID: d.uid}
		d.mu.Lock()
		for _, l := range d.listeners {
			if fd, err := l.duplicate(); err == nil && !slices.Contains(h.Roles, l.role) {
				h.Roles, h.Files = append(h.Roles, l.role), append(h.Files, fd)
			}
		}
		d.mu.Unlock()
		held = append(held, h)
	}
	return held, func() {
		for _, h := range held {
			closeAll(h.Files)
		}
	}
}

// duplicate returns another descriptor of l. (net's own File would make the
// socket blocking, for us too.)
func (l *listener) duplicate() (int, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return -1, err
	}
	dup, derr := -1, error(nil)
	if err := raw.Control(func(fd uintptr) { dup, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	return dup, derr
}

// adopt takes the listeners that are not here yet and closes the copies of
// those that are.
func (d *pod) adopt(roles []handle.Role, files []int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, fd := range files {
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		known := slices.ContainsFunc(d.listeners, func(l *listener) bool { return l.cookie == cookie })
		if err != nil || known || d.p.departs.Load() == int32(closed) || len(d.listeners) >= maxListeners {
			unix.Close(fd)
			continue
		}
		l, err := newListener(roles[i], fd)
		if err != nil {
			d.log.Error("listener refused", "role", string(roles[i]), "err", err)
			continue
		}
		l.cookie = cookie
		d.listeners = append(d.listeners, l)
	}
}

// newListener takes over fd. What it accepts has no lingering, a bound of what is unsent, and urgent bytes in
// line, from the first moment: all are inherited.
func newListener(role handle.Role, fd int) (*listener, error) {
	f := os.NewFile(uintptr(fd), string(role))
	defer f.Close()
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return nil, fmt.Errorf("set SO_LINGER: %w", err)
	}
	if err := relay.UrgentInLine(fd); err != nil {
		return nil, err
	}
	if err := boundUnsent(fd); err != nil {
		return nil, err
	}
	nl, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	l, ok := nl.(*net.TCPListener)
	if !ok {
		nl.Close()
		return nil, fmt.Errorf("a %T: want a TCP listener", nl)
	}
	return &listener{TCPListener: l, role: role}, nil
}

// drain is the agent's wish to release the pod. Without its rules, what is kept could
// not even be closed: its packets are translated by them.
func (d *pod) drain() {
	d.drains.Store(true)
	d.idle.close()
	d.order()
}

// order has run look again, and answer the agent.
func (d *pod) order() {
	d.mu.Lock()
	d.owed = true
	d.mu.Unlock()
	d.wake()
}

func (d *pod) wake() {
	select {
	case d.woken <- struct{}{}:
	default:
	}
}

// remove ends the pod. It does not wait: a pod with the same UID may begin at once.
func (d *pod) remove() {
	d.p.mu.Lock()
	if d.p.pods[d.uid] == d {
		delete(d.p.pods, d.uid)
	}
	d.p.mu.Unlock()
	d.cancel()
}

// yield leaves the listeners to another proxy, which accepts from the same sockets:
// what waits in their backlog is its own now. What was accepted here stays here, and ends
// here: nothing is kept for another one.
func (d *pod) yield() {
	d.idle.close()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.listeners {
		l.Close()
	}
	d.listeners = nil
}

// deliver takes over sockets that the agent made.
func (d *pod) deliver(m handle.Message, files []int) {
	if len(files) == 0 {
		d.log.Warn("agent has no sockets", "family", m.Family, "reason", m.Reason)
	}
	d.sockets(m.Family == 6).deliver(files)
}

// hearPorts notes which ports the pod's kernel gives.
func (d *pod) hearPorts(ports [2]uint16) { d.ports.Store(uint32(ports[0])<<16 | uint32(ports[1])) }

// ephemeral is the pod's portRange, as the agent has told.
func (d *pod) ephemeral() portRange {
	v := d.ports.Load()
	return portRange{uint16(v >> 16), uint16(v)}
}

func (d *pod) sockets(v6 bool) *sockets {
	if v6 {
		return d.sockets6
	}
	return d.sockets4
}

// run serves the pod until ctx ends, and returns when its last connection is gone.
func (d *pod) run(ctx context.Context) {
	defer d.p.hold(d.id)()
	defer d.idle.close()
	var all sync.WaitGroup
	defer all.Wait()
	ready := make(chan struct{})
	all.Go(func() { d.awaitReady(ctx, ready) })
	d.follow(ctx, &all, ready)
	d.remove()
	d.mu.Lock()
	for _, l := range d.listeners {
		l.Close()
	}
	d.mu.Unlock()
	d.sockets4.close()
	d.sockets6.close()
	d.bindings.close()
}

// awaitReady closes ready when the pod's certificate and the first World are there.
func (d *pod) awaitReady(ctx context.Context, ready chan<- struct{}) {
	if d.p.know.await(ctx) == nil && d.p.cfg.Leaves.Ready(ctx, d.id) == nil {
		close(ready)
	}
}

// follow does what the agent asks for, until ctx ends.
func (d *pod) follow(ctx context.Context, all *sync.WaitGroup, ready <-chan struct{}) {
	late := time.NewTimer(d.p.cfg.ReadyTimeout)
	defer late.Stop()
	q := quietness{d: d, timer: time.NewTimer(0)}
	defer q.timer.Stop()
	isReady, accepts := false, false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ready:
			isReady, accepts, ready = true, true, nil
		case <-late.C:
			if !isReady {
				accepts = true
				d.complain()
			}
		case <-q.timer.C:
		case <-d.woken:
		}
		if accepts {
			d.accept(ctx, all)
		}
		d.step(isReady, &q)
	}
}

// step moves the state to where the agent wants it, as far as that goes now.
func (d *pod) step(isReady bool, q *quietness) {
	switch {
	case !d.drains.Load() && isReady:
		q.since = time.Time{}
		d.enter(serving, handle.Ready)
	case d.drains.Load() && q.isQuiet():
		d.enter(drained, handle.Drained)
	case d.drains.Load():
		d.mu.Lock()
		d.state = draining
		d.mu.Unlock()
	}
}

// enter enters state s and tells the agent, if it waits to hear or it is news.
func (d *pod) enter(s podState, word handle.Kind) {
	d.mu.Lock()
	tell := d.owed || d.state != s
	d.state, d.owed = s, false
	d.mu.Unlock()
	if tell {
		d.p.link.post(handle.Message{Kind: word, UID: d.uid})
	}
}

// complain tells the agent why the pod is not ready yet.
func (d *pod) complain() {
	err := errNoWorld
	if d.p.know.isKnown() {
		_, err = d.p.cfg.Leaves.Leaf(d.id)
	}
	if err == nil {
		return
	}
	d.log.Error("pod not ready, its connections are refused", "err", err)
	reason := err.Error()
	d.p.link.post(handle.Message{Kind: handle.Failed, UID: d.uid, Reason: reason[:min(len(reason), 1000)]})
}

// accept begins to accept from the listeners that are new.
func (d *pod) accept(ctx context.Context, all *sync.WaitGroup) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.listeners {
		if !l.started {
			l.started = true
			all.Go(func() { d.acceptLoop(ctx, all, l) })
		}
	}
}

// quietness tells whether a draining pod has had no connection for long enough.
type quietness struct {
	d *pod
	// timer fires when it may be quiet.
	timer *time.Timer
	// since and accepted are those of the last noise.
	since    time.Time
	accepted uint64
}

// isQuiet reports whether the pod has had no connection for DrainQuiet. If not,
// the timer, or the end of the last connection, wakes who asks.
func (q *quietness) isQuiet() bool {
	now, n := time.Now(), q.d.accepted.Load()
	if q.since.IsZero() || n != q.accepted || q.d.quota.open.Load() > 0 || q.d.idle.isAwaiting() || q.d.hasBacklog() {
		q.since, q.accepted = now, n
	}
	rest := q.d.p.cfg.DrainQuiet - now.Sub(q.since)
	if rest <= 0 {
		return true
	}
	if q.d.quota.open.Load() == 0 {
		q.timer.Reset(rest)
	}
	return false
}

// hasBacklog reports whether a connection waits to be accepted.
func (d *pod) hasBacklog() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.listeners, func(l *listener) bool { return l.backlog() > 0 })
}

// backlog is how many connections wait to be accepted (tcp(7): for a listener
// the kernel tells it as tcpi_unacked).
func (l *listener) backlog() (n uint32) {
	raw, err := l.SyscallConn()
	if err != nil {
		return 0
	}
	raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Unacked
		}
	})
	return n
}

// address returns the pod's own address of a family.
func (f *facts) address(v6 bool) (netip.Addr, bool) {
	for _, a := range f.caller.addresses {
		if a.Is6() == v6 {
			return a, true
		}
	}
	return netip.Addr{}, false
}
