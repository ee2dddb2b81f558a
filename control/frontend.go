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

	"tacit.dev/pause"
	"tacit.dev/relay"
)

const (
	// maxForwarded bounds the connections that wait for a leader or are forwarded to
	// it; a node has two.
	maxForwarded = 16 << 10
	// leaderLimit is how long a connection waits for a leader. Whoever dialled gives
	// up after 4 s, one of which its name server may have taken.
	leaderLimit = 2 * time.Second
	// dialLimit bounds the dial to the leader.
	dialLimit = 2 * time.Second
)

// alive finds a dead peer of a quiet connection, as nodes do: see wire/xds.
var alive = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: 2 * time.Second, Count: 3}

// frontend takes in nodes' connections for as long as the process lives. While this
// process leads, its own server accepts them; otherwise their bytes go to the leader,
// with whom the node speaks TLS: the frontend cannot read them. When the leader
// changes, the connections to the one before are cut, and nodes come again. It is
// safe for concurrent use.
type frontend struct {
	listener net.Listener
	self     string // never forwarded to
	log      *slog.Logger
	pool     *relay.Pool
	places   chan struct{}
	forwards prometheus.Gauge
	refused  prometheus.Counter

	mu  sync.Mutex // guards way
	way *way
}

// way is where connections go, until changed is closed.
type way struct {
	local   *localListener // not nil while this process serves nodes
	leader  string         // who does otherwise, "" if nobody
	changed chan struct{}
}

// newFrontend owns l.
func newFrontend(l net.Listener, log *slog.Logger, r prometheus.Registerer) *frontend {
	f := &frontend{
		listener: l, log: log, pool: relay.NewPool(), places: make(chan struct{}, maxForwarded), way: &way{changed: make(chan struct{})},
		forwards: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_forwarded_connections", Help: "Connections of nodes that wait for the leader, or are forwarded to it."}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_refused_connections_total", Help: "Connections of nodes that were closed: no leader, or too many."}),
	}
	r.MustRegister(f.forwards, f.refused)
	return f
}

func (f *frontend) close() {
	f.listener.Close()
	f.pool.Close()
}

// run takes connections in until ctx ends, and waits for those it forwards.
func (f *frontend) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { f.listener.Close() })
	defer stop()
	var forwarded sync.WaitGroup
	defer forwarded.Wait()
	defer cancel()
	for {
		c, err := f.listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // out of descriptors, most likely
			f.log.Warn("connection not accepted", "error", err)
			pause.For(ctx, 50*time.Millisecond)
			continue
		}
		f.receive(ctx, c, &forwarded)
	}
}

// receive gives c to our own server if there is one. It owns c.
func (f *frontend) receive(ctx context.Context, c net.Conn, forwarded *sync.WaitGroup) {
	if l := f.now().local; l != nil && l.offer(c) {
		return
	}
	select {
	case f.places <- struct{}{}:
	default:
		f.refuse(c)
		return
	}
	f.forwards.Inc()
	forwarded.Go(func() {
		defer func() { f.forwards.Dec(); <-f.places }()
		f.forwardToLeader(ctx, c)
	})
}

func (f *frontend) refuse(c net.Conn) {
	f.refused.Inc()
	c.Close()
}

// forwardToLeader waits until somebody leads, and brings c there.
func (f *frontend) forwardToLeader(ctx context.Context, c net.Conn) {
	limit := time.NewTimer(leaderLimit)
	defer limit.Stop()
	for {
		w := f.now()
		switch {
		case w.local != nil && w.local.offer(c):
			return
		case w.leader != "" && !cameFrom(c, w.leader):
			f.forward(ctx, c, w)
			return
		}
		select {
		case <-w.changed:
		case <-limit.C:
			f.refuse(c)
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

// forward carries bytes between c and the leader until either ends, or it leads no more.
func (f *frontend) forward(ctx context.Context, c net.Conn, w *way) {
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
	dialer := net.Dialer{Timeout: dialLimit, KeepAliveConfig: alive}
	far, err := dialer.DialContext(ctx, "tcp", w.leader)
	if err != nil || !ok {
		f.log.Debug("leader not reached", "leader", w.leader, "error", err)
		f.refuse(c)
		return
	}
	_ = node.SetKeepAliveConfig(alive)
	relay.Join(ctx, relay.TCP(node), relay.TCP(far.(*net.TCPConn)), relay.Config{Pool: f.pool, HalfCloseTimeout: 10 * time.Second})
}

func (f *frontend) now() *way {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.way
}

func (f *frontend) change(next way) {
	close(f.way.changed)
	next.changed = make(chan struct{})
	f.way = &next
}

// follow says who leads, "" if nobody. If we are meant, open says when we serve.
func (f *frontend) follow(leader string) {
	if leader == f.self {
		leader = ""
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.way.leader == leader {
		return
	}
	f.log.Info("leader changed", "leader", leader)
	f.change(way{local: f.way.local, leader: leader})
}

// leader is who leads, "" if nobody or we do.
func (f *frontend) leader() string { return f.now().leader }

// open has a server of our own accept the connections.
func (f *frontend) open() *localListener {
	l := &localListener{addr: f.listener.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.change(way{local: l})
	return l
}

// shut is called by who opened. What the server has accepted stays its own.
func (f *frontend) shut(l *localListener) {
	l.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.change(way{leader: f.way.leader})
}

// localListener is a net.Listener of connections that the frontend has taken in.
type localListener struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// offer gives c to who accepts; false if l is closed, and c still ours.
func (l *localListener) offer(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.closed:
		return false
	}
}

func (l *localListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *localListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *localListener) Addr() net.Addr { return l.addr }
