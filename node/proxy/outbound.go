package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/relay"
	"tacit.dev/wire/direct"
)

// chunkSize is how much of what an application says first is kept until the
// other side has answered, in bytes.
const chunkSize = 16 << 10

// outbound connects to what the application dialled. The lease lasts until the
// other side is there, so that a World is not acknowledged while an older one
// is still acted upon.
func (d *pod) outbound(ctx context.Context, j *journey) (far relay.Conn, sent int64, err error) {
	if !d.p.know.isKnown() {
		return nil, 0, &refusal{reasonNoWorld, flagUpstreamFailure, errNoWorld}
	}
	j.place.await(ctx)
	far, sent, err = d.reach(ctx, j)
	for range maxOutdated {
		if !errors.Is(err, errOutdated) {
			break
		}
		far, sent, err = d.reach(ctx, j)
	}
	return far, sent, err
}

// maxOutdated is how often a connection may begin anew because of what has become known.
const maxOutdated = 3

// errOutdated says that another pod is known at the address now than when it was chosen:
// one of the mesh has begun where nobody was, while it was dialled as if it were outside;
// or the one that was to be dialled is gone, or reached otherwise.
var errOutdated = errors.New("another pod is there meanwhile")

// reach is outbound under the World of now.
func (d *pod) reach(ctx context.Context, j *journey) (far relay.Conn, sent int64, err error) {
	j.lease = d.p.know.lease()
	defer func() { d.p.know.release(j.lease) }()
	f, w := d.facts.Load(), d.p.know.world()
	j.flow.Source = d.self(w)
	from := f.caller
	from.mayReach = d.mayReach(w, j.flow.Dialled)
	r, err := from.find(w, j.flow.Dialled)
	j.flow.Service = r.service
	if err != nil {
		return nil, 0, err
	}
	return d.tryAll(ctx, j, r)
}

// unleased does something that may take minutes and decides nothing, without a lease: the
// World would not be acknowledged for as long. What was chosen before has to be looked at
// again.
func (d *pod) unleased(j *journey, slow func()) {
	d.p.know.release(j.lease)
	slow()
	j.lease = d.p.know.lease()
}

// bounds are those of one target.
type bounds struct {
	// reach is for how long it may be silent, until it is connected and its identity is
	// proved.
	reach time.Duration
	// all ends when it has replied.
	all time.Duration
}

// bounds are those of the next of so many targets, when so much time is left. Nobody says
// how long silence lasts: kube-proxy would stay with one endpoint until the kernel gives
// up. As long as there is another one, and nothing was sent, that is tried much sooner.
func (c Config) bounds(targets int, left time.Duration) bounds {
	if targets == 1 {
		return bounds{left, left}
	}
	return bounds{min(left/time.Duration(targets), c.EndpointTimeout), left}
}

// tryAll tries the targets until one accepts, or a byte may have been consumed.
// The wait for a turn does not count.
func (d *pod) tryAll(ctx context.Context, j *journey, r route) (relay.Conn, int64, error) {
	first := firstBytes{conn: j.conn, pool: &d.p.chunks}
	defer first.release()
	left := d.p.cfg.DialTimeout
	for i, t := range r.targets {
		j.towards(t, r.inside)
		far, spent, err := d.try(ctx, d.p.cfg.bounds(len(r.targets)-i, left), t, j, &first)
		if err == nil {
			return far, int64(first.n), nil
		}
		var last *finalError
		if errors.As(err, &last) || errors.Is(err, errOutdated) || ctx.Err() != nil || i == len(r.targets)-1 {
			return nil, 0, err
		}
		left -= spent
		d.p.metrics.retries.Inc()
		d.log.Debug("next endpoint", "refused", t.addr.String(), "err", err)
	}
	panic("proxy: route without targets")
}

// try goes to one target, within its time, and tells how much of that it took. A pod of
// the mesh is reached over a connection that is there, or by a handshake when its turn comes.
func (d *pod) try(ctx context.Context, within bounds, t target, j *journey, first *firstBytes) (far relay.Conn, spent time.Duration, err error) {
	began := time.Now()
	if !t.direct {
		far, err = d.tryPlain(ctx, within.reach, t, j)
		return far, time.Since(began), err
	}
	d.follows(j, nil) // that of a target before
	w := d.p.know.world()
	if why := revoked(w, t.workload.ID); why != nil {
		return nil, 0, why
	}
	if !d.isThere(t, w) { // the target before took its time
		return nil, 0, errOutdated
	}
	far, err = d.tryKept(ctx, within, t, j, first)
	spent = time.Since(began)
	if far != nil || err != nil {
		return far, spent, err
	}
	tn := d.dialling.join(t.addr.Addr())
	defer tn.leave()
	if far, err = d.awaitTurn(ctx, within, tn, t, j, first); far != nil || err != nil {
		return far, spent, err
	}
	began = time.Now()
	far, err = d.tryDirect(ctx, within, tn, t, j, first)
	return far, spent + time.Since(began), err
}

// awaitTurn returns when tn holds a slot, or what is carried by a connection to t that was
// kept meanwhile. The wait is long: it holds no lease, and afterwards t has to be there still.
func (d *pod) awaitTurn(ctx context.Context, within bounds, tn *turn, t target, j *journey, first *firstBytes) (relay.Conn, error) {
	if tn.isHeld() {
		return nil, nil
	}
	gone, unwatch := j.watch(tn)
	defer unwatch()
	for {
		kept, forget := d.idle.wish(destinationOf(t))
		var pc *peerConn
		var err error
		d.unleased(j, func() { pc, err = tn.await(ctx, gone, kept) })
		forget()
		if err == nil && !d.isThere(t, d.p.know.world()) {
			err = errOutdated
		}
		own, noLeaf := d.leaf()
		switch {
		case err != nil && pc != nil:
			leave(pc)
			return nil, err
		case err != nil || pc == nil:
			return nil, err
		case noLeaf != nil:
			leave(pc)
		case pc.serves(own):
			if far, err := d.ask(ctx, within, pc, j, first); far != nil || err != nil {
				return far, err
			}
		}
	}
}

// isThere reports whether t is in w the same pod of the mesh, to be reached by direct, and not revoked.
// An address that only an endpoint names is the pod's for as long as its own ones are.
func (d *pod) isThere(t target, w *mesh.World) bool {
	now := w.Workload(t.addr.Addr())
	for i := 0; now == nil && i < len(t.workload.Addresses); i++ {
		now = w.Workload(t.workload.Addresses[i])
	}
	f := d.facts.Load()
	return now != nil && now.UID == t.workload.UID && now.ID == t.workload.ID && !w.IsRevoked(now.ID) && f.caller.target(t.addr, now).direct
}

// towards notes where the connection goes.
func (j *journey) towards(t target, inside bool) {
	j.flow.Destination, j.flow.DestinationAddr = t.workload, t.addr
	j.flow.Security, j.kind = mesh.Plaintext, outside
	j.flow.Kept, j.flow.Resumed = false, false
	j.flow.SourceID, j.flow.DestinationID = mesh.ID{}, mesh.ID{}
	j.queued.proves(nil)
	switch {
	case t.direct:
		j.flow.Security, j.kind = mesh.MutualTLS, mutual
	case t.within:
		j.kind = within
	case inside:
		j.kind = plaintext
	}
}

// tryPlain dials one that is not reached by direct.
func (d *pod) tryPlain(ctx context.Context, within time.Duration, t target, j *journey) (relay.Conn, error) {
	if !t.within {
		if err := d.letOut(j, t); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var c *net.TCPConn
	var err error
	d.unleased(j, func() { c, err = d.dial(ctx, &dialling{to: t.addr}) })
	j.place.leave()
	if err != nil {
		return nil, err
	}
	// Every node knows a pod before its application begins: if that answers and was not
	// known when it was dialled, it is known by now.
	if d.isDirect(t.addr, d.p.know.world()) {
		c.Close()
		return nil, errOutdated
	}
	return relay.Prepared(c), nil
}

// isDirect reports whether a pod is at addr in w that is reached by direct.
func (d *pod) isDirect(addr netip.AddrPort, w *mesh.World) bool {
	now := w.Workload(addr.Addr())
	f := d.facts.Load()
	return now != nil && f.caller.target(addr, now).direct
}

// finalError is one after which no other target may be tried.
type finalError struct{ error }

func (e *finalError) Unwrap() error { return e.error }

// kept is how long a connection that was kept has to answer.
func (b bounds) kept() time.Duration { return min(b.all/4, keptAnswer) }

// tryKept goes to a pod of the mesh over a connection that is there already. It returns
// nil if there is none that the peer has kept too.
func (d *pod) tryKept(ctx context.Context, within bounds, t target, j *journey, first *firstBytes) (relay.Conn, error) {
	own, err := d.leaf()
	if err != nil {
		return nil, nil // to dial tells why
	}
	for end := time.Now().Add(within.kept()); time.Now().Before(end); {
		pc := d.idle.take(destinationOf(t), own)
		if pc == nil {
			return nil, nil
		}
		if far, err := d.ask(ctx, within, pc, j, first); far != nil || err != nil {
			return far, err
		}
	}
	return nil, nil
}

// prove notes what the handshake of pc has proved, which led to another pod. The error is why
// that counts no more.
func (j *journey) prove(pc *peerConn) error {
	j.flow.SourceID, j.flow.DestinationID = j.d.id, pc.Peer().ID
	j.flow.Resumed = pc.Peer().Resumed
	j.queued.proves(pc) // whoever is revoked after this is found by endRevoked
	if why := pc.isRevoked(); why != nil {
		pc.Conn.Abort()
		return &finalError{why}
	}
	return nil
}

// ask goes over pc, and returns nil if the peer has not kept it: as long as that has not
// replied, nothing of the application was sent, so whatever is wrong with a kept connection,
// another one will do. No reply: it is forgotten on the way, or its last bytes are still being read.
func (d *pod) ask(ctx context.Context, within bounds, pc *peerConn, j *journey, first *firstBytes) (relay.Conn, error) {
	answer, cancel := context.WithTimeout(ctx, within.kept())
	defer cancel()
	reply, err := pc.Next(answer, d.hello(j))
	if err == nil {
		j.flow.Kept = true
		if err := j.prove(pc); err != nil {
			return nil, err
		}
	}
	if err == nil && reply.Status == direct.StatusOK {
		return pc, first.follow(pc, time.Now().Add(within.all))
	}
	leave(pc)
	if err == nil {
		return nil, refusalOfReply(reply)
	}
	return nil, ctx.Err()
}

// tryDirect dials a pod of the mesh: TLS to exactly the identity that the World
// names, or nothing.
func (d *pod) tryDirect(ctx context.Context, within bounds, tn *turn, t target, j *journey, first *firstBytes) (relay.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, within.all)
	defer cancel()
	reach, cancel := context.WithTimeout(ctx, within.reach)
	defer cancel()
	said := false // something of the application may be on its way
	pc, err := d.handshake(reach, tn, t, j, func() ([]byte, error) {
		p, err := first.bytes()
		said = len(p) > 0 || err != nil
		return p, err
	})
	if err != nil && said {
		return nil, &finalError{err}
	}
	if err != nil {
		return nil, err
	}
	if err := j.prove(pc); err != nil {
		return nil, err
	}
	var reply direct.Reply
	d.unleased(j, func() { reply, err = pc.AwaitReply(ctx) })
	if err == nil && reply.Status == direct.StatusOK {
		return pc, nil
	}
	pc.Conn.Abort()
	if err == nil {
		return nil, refusalOfReply(reply)
	}
	if first.n > 0 { // nobody knows whether they were consumed
		return nil, &finalError{err}
	}
	return nil, err
}

// leaf returns the pod's own certificate, or the refusal that names why there is none.
func (d *pod) leaf() (*identity.Leaf, error) {
	if why := revoked(d.p.know.world(), d.id); why != nil {
		return nil, &refusal{"own_" + why.reason, why.flags, why.err}
	}
	leaf, err := d.p.cfg.Leaves.Leaf(d.id)
	if err == nil {
		return leaf, nil
	}
	reason := identity.Reason(err)
	if reason != identity.ReasonExpired {
		reason = identity.ReasonNoCertificate
	}
	return nil, refuse("own_"+reason, flagUpstreamFailure, "own certificate: %w", err)
}

// handshake dials t from the pod's own address, with a source port that hints at
// TLS, and proves identities. It gives the slot of tn back.
func (d *pod) handshake(ctx context.Context, tn *turn, t target, j *journey, first direct.First) (*peerConn, error) {
	defer tn.leave()
	to := destinationOf(t)
	defer d.idle.handshakes(to)()
	leaf, err := d.leaf()
	if err != nil {
		return nil, &finalError{err}
	}
	own, ok := d.source(t)
	if !ok {
		return nil, refuse(reasonNoAddress, flagUpstreamFailure, "dial %s: the pod has no address of that family", t.addr)
	}
	ports := markedPorts
	if d.awaitsTLS(t, d.p.know.world()) {
		ports = directPorts
	}
	connect := func(ctx context.Context) (c *net.TCPConn, err error) {
		d.unleased(j, func() {
			c, err = tn.dial(ctx, func(ctx context.Context) (*net.TCPConn, error) {
				defer j.place.leave()
				return d.dial(ctx, &dialling{from: own, to: t.addr, ports: ports})
			})
		})
		if err == nil && !d.isThere(t, d.p.know.world()) {
			c.Close()
			return nil, errOutdated
		}
		return c, err
	}
	cfg := d.p.cfg.TLS.Client(leaf, t.workload.ID, t.addr.Addr().String())
	c, err := direct.Dial(ctx, direct.Way{Connect: connect, Limit: d.p.cfg.HandshakeTimeout}, cfg, d.hello(j), first)
	if err != nil {
		return nil, err
	}
	pc := d.newPeerConn(c, leaf)
	pc.to = to
	return pc, nil
}

// source is from where t is dialed: the pod's own address of that family. To a further address of
// a pod a network may lead by which nothing comes back to the own one: there it is the kernel's
// choice.
func (d *pod) source(t target) (netip.Addr, bool) {
	to := t.addr.Addr()
	first, ok := addressLike(t.workload, to)
	if ok && first != to && slices.Contains(t.workload.Addresses, to) {
		if to.Is6() {
			return netip.IPv6Unspecified(), true
		}
		return netip.IPv4Unspecified(), true
	}
	return d.facts.Load().address(to.Is6())
}

// awaitsTLS reports whether the receiver waits for TLS from this pod even if the port does
// not hint at it. Where it would only look for a while, a ClientHello that is late would come
// after the first words of an application that speaks first.
func (d *pod) awaitsTLS(t target, w *mesh.World) bool {
	self := d.self(w)
	return isMesh(self) && !mayExclude(w, self, t.workload, t.addr)
}

// hello is what the preamble tells.
func (d *pod) hello(j *journey) direct.Hello {
	return direct.Hello{Service: serviceOf(j), SourcePod: d.facts.Load().pod, SourcePort: j.flow.SourceAddr.Port()}
}

// serviceOf is how the preamble names what was dialled.
func serviceOf(j *journey) string {
	if j.flow.Service == nil {
		return ""
	}
	return j.flow.Service.Key() + ":" + strconv.Itoa(int(j.flow.Dialled.Port()))
}

// firstBytes is what the application said first. It is kept until the other side
// has answered, so that another endpoint can be told the same.
type firstBytes struct {
	conn *net.TCPConn
	pool interface {
		Get() any
		Put(any)
	}
	buf *[chunkSize]byte
	n   int
}

// bytes are what the application has said by now, if it has. It does not wait for
// more: what comes later follows when the other side has answered.
func (b *firstBytes) bytes() ([]byte, error) {
	if b.n == 0 {
		if err := b.read(); err != nil {
			return nil, &refusal{reasonReset, flagDownstreamReset, err}
		}
	}
	return b.buf[:b.n], nil
}

// follow sends what was read for an endpoint before.
func (b *firstBytes) follow(pc *peerConn, deadline time.Time) error {
	if b.n == 0 {
		return nil
	}
	err := pc.SetWriteDeadline(deadline) // relay lifts it
	if err == nil {
		_, err = pc.Write(b.buf[:b.n])
	}
	if err != nil {
		pc.Conn.Abort()
		return &finalError{err}
	}
	return nil
}

// read takes what is there, without waiting. The end of the stream is left to
// who reads next.
func (b *firstBytes) read() error {
	raw, err := b.conn.SyscallConn()
	if err != nil {
		return err
	}
	if b.buf == nil {
		b.buf = b.pool.Get().(*[chunkSize]byte)
	}
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		b.n, rerr = unix.Read(int(fd), b.buf[:])
		return true
	})
	b.n = max(b.n, 0)
	if errors.Is(rerr, syscall.EAGAIN) || errors.Is(rerr, syscall.EINTR) {
		rerr = nil
	}
	return errors.Join(err, rerr)
}

// release gives the buffer back.
func (b *firstBytes) release() {
	if b.buf != nil {
		b.pool.Put(b.buf)
		b.buf = nil
	}
}
