// Package proxy is the unprivileged half of a node: every byte from the network
// and from the applications of the node's pods is read here. It stands at both
// ends of the wire:
//
//	app ─► outbound ─► route ─► dial ═══ wire/direct ═══► inbound ─► dial ─► app
//
// The files, in the order of a connection's way: link.go (the agent gives pods
// and sockets), pod.go (listeners of one pod), accept.go, origin.go (what was
// dialled), outbound.go, route.go (where that leads), dial.go with sockets.go and
// seeds.go (from inside the pod's namespace); then, on the other node, inbound.go;
// journey.go tells of it at the end (telemetry.go, series.go, pairs.go), and keep.go keeps what
// crossed the network for the next one. drain.go is the end of a proxy. knowledge.go holds
// the World, limits.go the bounds.
//
// It refuses to enter a namespace, to make a socket, to change a rule, or to
// hold a privilege. It fails closed: a pod of the mesh is reached by mutual TLS
// or not at all, and without a valid certificate of its own nobody is served.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/policy"
	"tacit.dev/relay"
)

// Leaves gives the certificates of the node's pods: an identity.Keeper. It is
// safe for concurrent use.
type Leaves interface {
	// Hold asks for a leaf of id until release is called.
	Hold(id mesh.ID) (release func())
	// Ready blocks until there is a valid leaf of id, or ctx ends.
	Ready(ctx context.Context, id mesh.ID) error
	// Leaf returns the valid leaf of id, or says why there is none. It never blocks.
	Leaf(id mesh.ID) (*identity.Leaf, error)
}

// Config is what a Proxy needs.
type Config struct {
	// Node is the name of the node.
	Node string
	// Handle is the path of the agent's socket (wire/handle).
	Handle string
	// Leaves and TLS come from package identity.
	Leaves Leaves
	TLS    *identity.TLS

	// DialTimeout bounds the way from an accepted connection to the other
	// side's reply, or to the application, without the wait for its turn (see
	// MaxHandshakes). Default 150 s: it is the kernel that gives up, after as many SYNs
	// as the pod's settings say (tcp_syn_retries; 127 s).
	DialTimeout time.Duration
	// EndpointTimeout bounds how long an endpoint of a Service may be silent before the
	// next one is tried. Default 5 s.
	EndpointTimeout time.Duration
	// KeepAlive is for all connections.
	KeepAlive KeepAlive
	// HandshakeTimeout bounds how long a peer may take for its handshake. Default 10 s.
	HandshakeTimeout time.Duration
	// LookLimit bounds how long a connection that may be TLS is looked at
	// before it is taken for plaintext. Default 200 ms.
	LookLimit time.Duration
	// ReadyTimeout is how long a new pod's connections wait in the backlog for
	// certificate and World before they are refused instead. Default 10 s.
	ReadyTimeout time.Duration
	// HalfCloseTimeout is relay.Config's. Default 1 h.
	HalfCloseTimeout time.Duration
	// AnnounceGrace is for how long a peer of the mesh and this node may differ on
	// whether a pod is announced: the peer dials in plaintext since it has not heard
	// yet that the pod entered, or has heard first that it leaves. 0 means not at all.
	AnnounceGrace time.Duration
	// DrainQuiet is how long a draining pod must be without a connection
	// before it counts as drained. Default 1 s.
	DrainQuiet time.Duration
	// Drain bounds how long Drain waits. 0 means not at all.
	Drain time.Duration
	// TrimInterval is how often quiet pods give sockets back. Default 30 s.
	TrimInterval time.Duration
	// MaxConnectionsPerPod bounds those going out and coming in together. Default 32,768.
	MaxConnectionsPerPod int
	// MaxHandshakes bounds the handshakes under way, each of those as client and
	// those as server; one pod may have half of them, one peer of it an eighth. The
	// others wait for their turn. Default 512.
	MaxHandshakes int
	// HandshakePatience bounds the wait for a turn. Default 1 min.
	HandshakePatience time.Duration

	// MaxQueued bounds the memory of bytes that wait in all connections, because an end reads
	// slowly or not at all. Above it the largest ones of the pod that holds most are reset. Default 640 MiB.
	MaxQueued int64

	// AccessLog says which connections have a line in Log. "" means LogAll.
	AccessLog AccessLog
	// Registry gets the metrics. nil means a registry of its own.
	Registry *prometheus.Registry
	// Log gets one line per connection, and what goes wrong. nil means nowhere.
	Log *slog.Logger
}

// withDefaults fills what was left out.
func (c Config) withDefaults() Config {
	c.DialTimeout = orDefault(c.DialTimeout, 150*time.Second)
	c.EndpointTimeout = orDefault(c.EndpointTimeout, 5*time.Second)
	c.HandshakeTimeout = orDefault(c.HandshakeTimeout, 10*time.Second)
	c.LookLimit = orDefault(c.LookLimit, 200*time.Millisecond)
	c.ReadyTimeout = orDefault(c.ReadyTimeout, 10*time.Second)
	c.HalfCloseTimeout = orDefault(c.HalfCloseTimeout, time.Hour)
	c.DrainQuiet = orDefault(c.DrainQuiet, time.Second)
	c.TrimInterval = orDefault(c.TrimInterval, 30*time.Second)
	c.MaxConnectionsPerPod = orDefault(c.MaxConnectionsPerPod, 32768)
	c.MaxHandshakes = orDefault(c.MaxHandshakes, 512)
	c.HandshakePatience = orDefault(c.HandshakePatience, time.Minute)
	c.MaxQueued = orDefault(c.MaxQueued, queuedDefault)
	if c.Registry == nil {
		c.Registry = prometheus.NewRegistry()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// validate says what a Config lacks.
func (c Config) validate() error {
	var errs []error
	if c.Handle == "" {
		errs = append(errs, errors.New("no path of the agent's socket"))
	}
	if c.Leaves == nil || c.TLS == nil {
		errs = append(errs, errors.New("no source of certificates"))
	}
	if c.MaxHandshakes < 0 || c.MaxConnectionsPerPod < 0 || c.MaxQueued < 0 {
		errs = append(errs, fmt.Errorf("limits of %d handshakes, %d connections and %d bytes that wait: want none below 0",
			c.MaxHandshakes, c.MaxConnectionsPerPod, c.MaxQueued))
	}
	if k := c.KeepAlive; k.Idle < 0 || k.Interval < 0 || k.Probes < 0 || k.Probes > 127 {
		errs = append(errs, fmt.Errorf("keepalive after %s, each %s, %d probes: want none below 0, and at most 127 probes", k.Idle, k.Interval, k.Probes))
	}
	return errors.Join(errs...)
}

// Proxy serves the enrolled pods of one node.
type Proxy struct {
	cfg     Config
	log     *slog.Logger
	know    *knowledge
	tell    *telemetry
	pairs   *Pairs
	metrics *metrics
	relay   relay.Config
	// dialling and answering bound the handshakes of either side. They are apart: two
	// pods of one node would otherwise wait for each other.
	dialling, answering *slots
	// chunks lends buffers for first bytes, *[chunkSize]byte.
	chunks sync.Pool
	link   *link

	// mu guards pods and holders.
	mu   sync.Mutex
	pods map[string]*pod
	// holders counts the pods of each identity until their last connection is gone.
	holders map[mesh.ID]int
	// keeps counts the connections that are kept, of all pods.
	keeps quota
	// looking counts the connections that have not said yet what they are, of all pods.
	looking atomic.Int64
	queues  *queues
	laws    laws
	// trusts is the mesh.World.TrustVersion that was reviewed last. It belongs to review.
	trusts uint64
	// departs is how far the end of this proxy is, a departure.
	departs atomic.Int32
	// starved counts the dials that had to wait for a socket.
	starved atomic.Uint64
	// running are the pods' goroutines; Run waits for them.
	running sync.WaitGroup
}

// New returns a Proxy that does nothing before Run.
func New(cfg Config) (*Proxy, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	p := &Proxy{
		cfg:     cfg,
		log:     cfg.Log,
		know:    newKnowledge(),
		relay:   relay.Config{HalfCloseTimeout: cfg.HalfCloseTimeout, Pool: relay.NewPool(), Loops: relay.NewLoops(runtime.GOMAXPROCS(0))},
		keeps:   quota{max: keepMost},
		chunks:  sync.Pool{New: func() any { return new([chunkSize]byte) }},
		pods:    make(map[string]*pod),
		holders: make(map[mesh.ID]int),
	}
	p.tell = newTelemetry(cfg.Registry, cfg.Log, p.know.world)
	p.tell.which = cfg.AccessLog
	p.pairs = newPairs(cfg.Registry, p.know.world)
	p.metrics = newMetrics(cfg.Registry, p)
	p.queues = newQueues(cfg.Registry, cfg.MaxQueued, cfg.Log)
	p.queues.overdue = p.endOverdue
	p.dialling = newSlots(cfg.MaxHandshakes, cfg.HandshakePatience, p.metrics.waited[index(false)])
	p.answering = newSlots(cfg.MaxHandshakes, cfg.HandshakePatience, p.metrics.waited[index(true)])
	p.link = newLink(p)
	p.laws.book = new(policy.Book)
	p.know.review = p.review
	return p, nil
}

// Apply lets the World with c decide about connections from now on. The channel is closed
// when no dial that an older World decided is under way any more: then c may be
// acknowledged.
func (p *Proxy) Apply(c mesh.Changes) <-chan struct{} { return p.know.apply(c) }

// Pairs are between whom connections were, for an xds.PairClient.
func (p *Proxy) Pairs() *Pairs { return p.pairs }

// Ready says why the proxy is not ready, nil if it is: the agent is there, control
// has told of the mesh once, and nobody has told it to end.
func (p *Proxy) Ready() error {
	if p.departs.Load() != int32(staying) {
		return errDraining
	}
	if !p.know.isKnown() {
		return errNoWorld
	}
	if !p.link.up.Load() {
		return fmt.Errorf("no connection to the agent at %s", p.cfg.Handle)
	}
	return nil
}

// Run serves until ctx ends. Then connections are reset, and Run returns when
// the last one is gone. The listeners are the agent's too: new
// connections wait in them for the next proxy. Drain is there to be called before.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.relay.Pool.Close()
	defer p.carry(ctx)()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.link.run(ctx) })
	g.Go(func() error { return p.trimSockets(ctx) })
	g.Go(func() error { return p.tendIdle(ctx) })
	g.Go(func() error { return p.queues.tend(ctx) })
	err := g.Wait()
	p.running.Wait()
	return err
}

// carry has connections carried without goroutines until end, which is called when none is
// left. It is no reason to stop if that cannot be.
func (p *Proxy) carry(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var loops sync.WaitGroup
	loops.Go(func() {
		if err := p.relay.Loops.Run(ctx); err != nil {
			p.log.Error("connections cost goroutines", "err", err)
		}
	})
	return func() {
		cancel()
		loops.Wait()
	}
}

// hold asks for a leaf of id until release. With the last one that has it the key goes, and
// what sessions are remembered.
func (p *Proxy) hold(id mesh.ID) (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.holders[id]++
	letGo := p.cfg.Leaves.Hold(id)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		letGo()
		if p.holders[id]--; p.holders[id] == 0 {
			delete(p.holders, id)
			p.cfg.TLS.Forget(id)
		}
	}
}

// trimSockets gives back, at intervals, the sockets that quiet pods do not need.
func (p *Proxy) trimSockets(ctx context.Context) error {
	tick := time.NewTicker(p.cfg.TrimInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			p.tell.trim(now)
			for _, d := range p.list() {
				d.sockets4.trim()
				d.sockets6.trim()
			}
		}
	}
}
