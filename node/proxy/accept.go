package proxy

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"tacit.dev/pause"
	"tacit.dev/relay"
)

const (
	acceptDelayFirst = 5 * time.Millisecond
	acceptDelayMax   = time.Second
)

// acceptLoop accepts from l until it is closed. all waits for it and for what
// it starts. When there are no descriptors or no memory it waits and tries
// again: the connections wait in the backlog meanwhile.
func (d *pod) acceptLoop(ctx context.Context, all *sync.WaitGroup, l *listener) {
	delay := acceptDelayFirst
	for {
		c, err := l.AcceptTCP()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if errors.Is(err, net.ErrClosed) { // yielded
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) { // departed
			d.emptyBacklog(ctx, all, l)
			return
		}
		if err != nil {
			d.p.metrics.acceptErrors.Inc()
			d.log.Error("accept", "role", string(l.role), "err", err, "retry", delay)
			if !pause.For(ctx, delay) {
				return
			}
			delay = min(2*delay, acceptDelayMax)
			continue
		}
		delay = acceptDelayFirst
		d.accepted.Add(1)
		d.start(ctx, all, l, c)
	}
}

// start reserves one of the pod's connections and starts it, or refuses it.
func (d *pod) start(ctx context.Context, all *sync.WaitGroup, l *listener, c *net.TCPConn) {
	j := newJourney(d, l.role.Inbound(), c)
	if err := j.ask(); err != nil {
		j.refuse(refusalOf(err))
		return
	}
	if !d.reserve(j) {
		j.refuse(&refusal{reasonConnectionLimit, flagOverload, errConnectionLimit})
		return
	}
	j.place = d.lines.join(j.line())
	j.queued = d.p.queues.join(d, c)
	all.Go(func() {
		far, sent, err := d.connect(ctx, j)
		j.place.leave()
		if err != nil {
			j.refuse(j.refusalOf(err))
			d.finished(j)
			return
		}
		d.carry(ctx, all, j, far, sent)
	})
}

// carry joins j and far, and sees to what follows when that is over. It does not wait.
func (d *pod) carry(ctx context.Context, all *sync.WaitGroup, j *journey, far relay.Conn, sent int64) {
	all.Add(1)
	j.join(ctx, far, sent, func() {
		defer all.Done()
		d.finished(j)
		if pc, ok := far.(*peerConn); ok {
			d.idle.put(pc)
		}
		d.carryOn(ctx, all, j)
	})
}

// connect takes a connection to its other end.
func (d *pod) connect(ctx context.Context, j *journey) (far relay.Conn, sent int64, err error) {
	if j.inbound {
		far, err = d.inbound(ctx, j)
		return far, 0, err
	}
	return d.outbound(ctx, j)
}

// reserve takes a place for a connection, or reports false if there is none for it.
func (d *pod) reserve(j *journey) bool {
	if j.inbound && !d.arrivals.begin(j.flow.SourceAddr.Addr()) {
		return false
	}
	if !d.quota.take() {
		if j.inbound {
			d.arrivals.end(j.flow.SourceAddr.Addr())
		}
		return false
	}
	return true
}

// refusalOf is why j does not reach its other end.
func (j *journey) refusalOf(err error) *refusal {
	if why := j.queued.cut.Load(); why != nil {
		return why
	}
	return refusalOf(err)
}

// finished gives the place of a connection back, and its socket for another one.
func (d *pod) finished(j *journey) {
	if j.inbound {
		d.arrivals.end(j.flow.SourceAddr.Addr())
	}
	d.passages.leave(j.passage)
	d.p.queues.leave(j.queued) // nobody else looks at the sockets from here on
	d.retire(j.far)
	if d.quota.give() && d.drains.Load() {
		d.wake()
	}
}
