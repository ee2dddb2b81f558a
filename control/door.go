package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/relay"
)

const (
	// maxGuests bounds the connections that wait for a leader or are passed on to
	// it; a node has two.
	maxGuests = 16 << 10
	// guideLimit is how long a connection waits for a leader. Whoever dialled gives
	// up after 3 s.
	guideLimit = 2 * time.Second
	// introduction bounds the dial to the leader.
	introduction = 2 * time.Second
)

// alive finds a dead peer of a quiet connection, as nodes do: see wire/xds.
var alive = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: 2 * time.Second, Count: 3}

// door takes in nodes' connections for as long as the process lives. While this
// process leads they enter its hall; otherwise the bytes are passed on to the leader,
// with whom the node speaks TLS: the door cannot read them. When the leader
// changes, the connections to the one before are cut, and nodes come again. It is
// safe for concurrent use.
type door struct {
	listener net.Listener
	self     string // never passed on to
	log      *slog.Logger
	pool     *relay.Pool
	places   chan struct{}
	passed   prometheus.Gauge
	refused  prometheus.Counter

	mu  sync.Mutex // guards way
	way *way
}

// way is where connections go, until changed is closed.
type way struct {
	hall    *hall  // not nil while this process serves nodes
	leader  string // who does otherwise, "" if nobody
	changed chan struct{}
}

// newDoor owns l.
func newDoor(l net.Listener, log *slog.Logger, r prometheus.Registerer) *door {
	d := &door{
		listener: l, log: log, pool: relay.NewPool(), places: make(chan struct{}, maxGuests), way: &way{changed: make(chan struct{})},
		passed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_passed_connections", Help: "Connections of nodes that wait for the leader, or are passed on to it."}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_refused_connections_total", Help: "Connections of nodes that were closed: no leader, or too many."}),
	}
	r.MustRegister(d.passed, d.refused)
	return d
}

func (d *door) close() {
	d.listener.Close()
	d.pool.Close()
}

// run takes connections in until ctx ends, and waits for those it passes on.
func (d *door) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { d.listener.Close() })
	defer stop()
	var guests sync.WaitGroup
	defer guests.Wait()
	defer cancel()
	for {
		c, err := d.listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // out of descriptors, most likely
			d.log.Warn("connection not accepted", "error", err)
			rest(ctx, 50*time.Millisecond)
			continue
		}
		d.receive(ctx, c, &guests)
	}
}

func rest(ctx context.Context, how time.Duration) {
	t := time.NewTimer(how)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// receive lets c into the hall if there is one. It owns c.
func (d *door) receive(ctx context.Context, c net.Conn, guests *sync.WaitGroup) {
	if h := d.now().hall; h != nil && h.admit(c) {
		return
	}
	select {
	case d.places <- struct{}{}:
	default:
		d.refuse(c)
		return
	}
	d.passed.Inc()
	guests.Go(func() {
		defer func() { d.passed.Dec(); <-d.places }()
		d.guide(ctx, c)
	})
}

func (d *door) refuse(c net.Conn) {
	d.refused.Inc()
	c.Close()
}

// guide waits until somebody leads, and brings c there.
func (d *door) guide(ctx context.Context, c net.Conn) {
	limit := time.NewTimer(guideLimit)
	defer limit.Stop()
	for {
		w := d.now()
		switch {
		case w.hall != nil && w.hall.admit(c):
			return
		case w.leader != "" && !cameFrom(c, w.leader):
			d.pass(ctx, c, w)
			return
		}
		select {
		case <-w.changed:
		case <-limit.C:
			d.refuse(c)
			return
		case <-ctx.Done():
			c.Close()
			return
		}
	}
}

// cameFrom tells whether the leader itself dialled us, who does not know yet that
// it leads: the connection would go round in circles.
func cameFrom(c net.Conn, leader string) bool {
	l, err := netip.ParseAddrPort(leader)
	from, ok := c.RemoteAddr().(*net.TCPAddr)
	return err == nil && ok && from.AddrPort().Addr().Unmap() == l.Addr().Unmap() && !l.Addr().IsLoopback()
}

// pass carries bytes between c and the leader until either ends, or it leads no more.
func (d *door) pass(ctx context.Context, c net.Conn, w *way) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	watch.Go(func() {
		select {
		case <-w.changed:
			cancel()
		case <-ctx.Done():
		}
	})
	node, ok := c.(*net.TCPConn)
	dialer := net.Dialer{Timeout: introduction, KeepAliveConfig: alive}
	far, err := dialer.DialContext(ctx, "tcp", w.leader)
	if err != nil || !ok {
		d.log.Debug("leader not reached", "leader", w.leader, "error", err)
		d.refuse(c)
		return
	}
	_ = node.SetKeepAliveConfig(alive)
	relay.Join(ctx, relay.TCP(node), relay.TCP(far.(*net.TCPConn)), relay.Config{Pool: d.pool, HalfCloseTimeout: 10 * time.Second})
}

func (d *door) now() *way {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.way
}

func (d *door) change(next way) {
	close(d.way.changed)
	next.changed = make(chan struct{})
	d.way = &next
}

// follow says who leads, "" if nobody. If we are meant, open says when we serve.
func (d *door) follow(leader string) {
	if leader == d.self {
		leader = ""
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.way.leader == leader {
		return
	}
	d.log.Info("leader changed", "leader", leader)
	d.change(way{hall: d.way.hall, leader: leader})
}

// leader is who leads, "" if nobody or we do.
func (d *door) leader() string { return d.now().leader }

// open lets connections into a hall of our own.
func (d *door) open() *hall {
	h := &hall{addr: d.listener.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.change(way{hall: h})
	return h
}

// shut is called by who opened. What is in the hall stays its server's.
func (d *door) shut(h *hall) {
	h.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.change(way{leader: d.way.leader})
}

// hall is a net.Listener of connections that the door has taken in.
type hall struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// admit gives c to who accepts; false if the hall is closed, and c still ours.
func (h *hall) admit(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

func (h *hall) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *hall) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *hall) Addr() net.Addr { return h.addr }
