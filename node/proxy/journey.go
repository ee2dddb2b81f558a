package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/relay"
)

// journey is one connection on its way through this proxy. One goroutine owns it, and once
// it is joined, its passage.
type journey struct {
	d       *pod
	inbound bool
	kind    kind
	// near is the end that was accepted: the application's socket if it goes
	// out, the network's if it comes in.
	near relay.Conn
	// conn is the accepted socket itself. It belongs to near.
	conn *net.TCPConn
	// far is the end that was dialled, from when it is there.
	far relay.Conn
	// place is where it stands among those with the same ends, until the dial.
	place *place
	// lease is that of the World that decides where it goes, while it is on its way out.
	lease *epoch
	// queued is what waits in it, from when it has a place of the pod's quota.
	queued *queued
	// passage is where a policy finds it again, if it comes in.
	passage *passage
	flow    mesh.Flow
}

// newJourney begins with what is known at accept.
func newJourney(d *pod, inbound bool, c *net.TCPConn) *journey {
	j := &journey{d: d, inbound: inbound, near: relay.Prepared(c), conn: c}
	j.flow.Opened = time.Now()
	j.flow.Security = mesh.Plaintext
	j.flow.Reporter = mesh.BySource
	if inbound {
		j.flow.Reporter = mesh.ByDestination
	}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		p := a.AddrPort()
		j.flow.SourceAddr = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return j
}

// ask notes what the peer of the connection dialled.
func (j *journey) ask() error {
	to, err := dialled(j.conn, j.inbound)
	if err != nil {
		return &refusal{reasonNotCaptured, flagUpstreamFailure, err}
	}
	j.flow.Dialled, j.flow.DestinationAddr = to, to
	return nil
}

// watch tells when who made the connection has gone while it waits for its turn, until stop:
// a reset, or before a handshake of TLS also the end of its input. An application that has
// ended its input may still wait for the answer, or be gone: others go before it. Nobody
// else may read meanwhile.
func (j *journey) watch(tn *turn) (gone <-chan struct{}, stop func()) {
	over := make(chan struct{})
	ended := false
	look := func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} // POLLHUP and POLLERR are always told
		if n, err := unix.Poll(p[:], 0); n <= 0 || err != nil {
			return false
		}
		if j.inbound || p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
			return true
		}
		if !ended {
			ended = true
			tn.stepBack()
		}
		return false
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		raw, err := j.conn.SyscallConn()
		if err == nil {
			err = raw.Read(look)
		}
		if !isTimeout(err) {
			close(over)
		}
	})
	return over, func() {
		j.conn.SetReadDeadline(time.Unix(1, 0))
		wait.Wait()
		j.conn.SetReadDeadline(time.Time{})
	}
}

// line tells which connections it is kept in order with. All that go out of the
// pod come from the pod.
func (j *journey) line() line {
	l := line{to: j.flow.Dialled}
	if j.inbound {
		l.from = j.flow.SourceAddr.Addr()
	}
	return l
}

// self is what the metrics call the pod itself: as the World knows it, or as the
// agent told of it while control has not.
func (d *pod) self(w *mesh.World) *mesh.Peer {
	f := d.facts.Load()
	for _, a := range f.caller.addresses {
		if wl := w.Workload(a); wl != nil {
			return wl
		}
	}
	return f.workload
}

// refuse resets the connection and tells why.
func (j *journey) refuse(r *refusal) {
	j.d.p.metrics.refused(j.inbound, r.reason)
	j.d.counts.refused.Add(1)
	j.near.Abort()
	j.flow.Flags, j.flow.Reason = r.flags, r.Error()
	told, pair := j.d.p.tell.Opened(&j.flow), j.d.p.pairs.begin(&j.flow)
	j.flow.Closed = time.Now()
	j.d.p.pairs.end(pair, &j.flow)
	j.d.p.tell.Closed(&j.flow, told)
}

// join carries bytes between both ends until both have finished, and calls done then. sent
// bytes have gone to far before.
func (j *journey) join(ctx context.Context, far relay.Conn, sent int64, done func()) {
	p := j.d.p
	p.metrics.opened(j.inbound, j.kind)
	j.d.counts.of[j.kind].opened()
	told := p.tell.Opened(&j.flow)
	var pair *pairCount
	if j.kind != within {
		pair = p.pairs.begin(&j.flow)
	}
	j.far = far
	j.queued.reach(far)
	j.place, j.lease = nil, nil // both were left; most connections are quiet for most of their time
	j.queued.carriedBy(relay.Start(ctx, j.near, far, p.relay, func(res relay.Result) {
		j.flow.Sent, j.flow.Received = res.AtoB+sent, res.BtoA
		j.tellEnd(res, told, pair)
		done()
	}))
}

// tellEnd tells what became of the connection.
func (j *journey) tellEnd(res relay.Result, told *series, pair *pairCount) {
	p := j.d.p
	j.flow.Flags, j.flow.Reason = ending(res)
	if why := j.queued.cut.Load(); why != nil {
		j.flow.Flags, j.flow.Reason = why.flags, why.Error()
	}
	j.flow.Closed = time.Now()
	j.d.counts.of[j.kind].closed()
	p.metrics.closed(j.inbound, j.kind)
	p.pairs.end(pair, &j.flow)
	p.tell.Closed(&j.flow, told)
}

// ending names what ended a joined connection. The end that was accepted is
// downstream, the end that was dialled upstream, on either side of the mesh.
func ending(res relay.Result) (flags, reason string) {
	switch res.Ended {
	case relay.Finished:
		return "", ""
	case relay.ByA:
		return flagDownstreamReset, res.Err.Error()
	case relay.ByB:
		return flagUpstreamReset, res.Err.Error()
	case relay.HalfClosedTooLong:
		return flagTimeout, res.Err.Error()
	}
	return flagUpstreamReset, errors.Join(errPodGone, res.Err).Error()
}
