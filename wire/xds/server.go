package xds

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/bearer"
	"tacit.dev/wire/xds/message"
)

// maxStreams bounds the streams of one process of a node: an agent's pods, namespaces and
// reports, each twice while a restarted one has not been missed yet, and some. A proxy in
// other hands takes none of its agent's.
const maxStreams = 16

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Authenticate tells which process the bearer token proves. An error refuses
	// the stream; its text goes to the log and not to the peer. Required.
	Authenticate func(ctx context.Context, token string) (mesh.Process, error)
	// OnReports gets all that an agent holds, whenever its stream opens: what
	// is not in it is not captured. OnReport gets each change after that. Both
	// are called in order per node, by several goroutines for several nodes; a
	// report is acknowledged when they return. Either may be nil.
	OnReports func(node string, all []Report)
	OnReport  func(node string, r Report)
	// OnPairs gets what a proxy has seen, in order per node, by several goroutines for several
	// nodes. May be nil.
	OnPairs func(node string, seen mesh.Pairs)
	// GoneAfter is how long a proxy that lost its connection is waited for: it
	// still acts on what it knows. Default 30 s.
	GoneAfter time.Duration
	// LateAfter is how long Applied counts a node that has left, or that takes nothing of what
	// it is told. Default 5 s.
	LateAfter time.Duration
	// Expect names nodes that may still act on what an earlier control told
	// them: each counts as if its proxy had left, and nobody is gone while they gather.
	Expect []string
	// Secret keys the hashes of resources: servers that have the same one find by them
	// what a node holds already, whoever told it. Nobody else should know it.
	Secret []byte
	// Log may be nil: silence.
	Log *slog.Logger
	// Registry gets tacit_xds_*; may be nil.
	Registry prometheus.Registerer
}

// Server tells every node what it should know. All methods may be called
// concurrently.
type Server struct {
	cfg     ServerConfig
	metrics *serverMetrics
	changed chan struct{}
	// origin tells its versions from those of another Server.
	origin  []byte
	portion portion

	// seats has one for each stream that is told much, for seatFor.
	seats   chan struct{}
	seatFor time.Duration

	publishing sync.Mutex        // one Update at a time; held while encoding
	invalid    map[string]string // resources that could not be published, and why; guarded by publishing

	// told guards what is published, which only Update changes. Whoever reads it for a
	// response holds it for that long. It may be locked with mu held, not the other way.
	told    sync.RWMutex
	version uint64
	world   *table
	// namespaces is for every agent, pods for that of one node.
	namespaces *table
	pods       map[string]*table

	mu    sync.Mutex // guards all below, for no longer than a look at one node takes
	nodes map[string]*node
	// movedAgents are nodes whose agent has come or gone, until Agents tells of it.
	movedAgents map[string]bool
	// away are nodes whose proxy has left and is waited for; see there.
	away map[string]bool
	// gathering: nodes gather as yet, until gatherBy or the next of expected comes.
	gathering             bool
	expected              map[string]bool // those of Expect that have not come
	gatherBy, gatherLimit time.Time
	gatherTimer           *time.Timer
	// acks and applies are the proxies, the one that is most behind first.
	acks, applies queue
}

// node is what a Server remembers of a node; guarded by Server.mu.
type node struct {
	streams map[*stream]bool
	opened  map[mesh.Process]int // streams, those of reports too; not 0
	reports *reportStream
	pairs   bool // a proxy tells of its connections
	proxies []*standing
	// gone is when the last proxy left, zero if none was ever there or one is.
	gone  time.Time
	timer *time.Timer
}

// NewServer starts nothing.
func NewServer(cfg ServerConfig) *Server {
	if cfg.LateAfter <= 0 {
		cfg.LateAfter = 5 * time.Second
	}
	if cfg.GoneAfter <= 0 {
		cfg.GoneAfter = 30 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:         cfg,
		metrics:     newServerMetrics(cfg.Registry),
		changed:     make(chan struct{}, 1),
		origin:      make([]byte, 16),
		portion:     portion{chunkBytes, maxScan},
		seats:       make(chan struct{}, maxSeats),
		seatFor:     seatFor,
		invalid:     map[string]string{},
		world:       newTable(addressType, 0),
		namespaces:  newTable(namespaceType, 0),
		pods:        map[string]*table{},
		nodes:       map[string]*node{},
		away:        map[string]bool{},
		movedAgents: map[string]bool{},
		gathering:   true,
		expected:    map[string]bool{},
		acks:        queue{of: func(p *standing) *place { return &p.acked }},
		applies:     queue{of: func(p *standing) *place { return &p.applied }},
	}
	s.world.packs = newPacks()
	rand.Read(s.origin) // never fails
	for _, name := range cfg.Expect {
		s.node(name).gone = time.Now()
		s.away[name], s.expected[name] = true, true
	}
	return s
}

// Register puts the services on a gRPC server; for ServeConfig.Services.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	message.RegisterAggregatedDiscoveryServiceServer(r, discovery{server: s})
	message.RegisterEnrollmentServer(r, enrollment{server: s})
	message.RegisterObservationsServer(r, observations{server: s})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gather()
}

// node finds or makes the record. Called with mu.
func (s *Server) node(name string) *node {
	if s.nodes[name] == nil {
		s.nodes[name] = &node{streams: map[*stream]bool{}, opened: map[mesh.Process]int{}}
	}
	return s.nodes[name]
}

// admit authenticates a stream and makes room for it. Whoever is admitted calls
// dismiss.
func (s *Server) admit(ctx context.Context) (from mesh.Process, err error) {
	defer func() {
		if err != nil {
			s.metrics.refused.Inc()
		}
	}()
	from, err = s.cfg.Authenticate(ctx, bearer.Token(ctx))
	if err != nil || from.Node == "" {
		s.cfg.Log.Warn("node refused", "peer", peerAddr(ctx), "error", cmp.Or(err, errors.New("no such node")))
		return from, status.Error(codes.Unauthenticated, "the token proves no node")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.node(from.Node)
	if n.opened[from] >= maxStreams {
		s.cfg.Log.Warn("node refused", "node", from.Node, "agent", from.Agent, "peer", peerAddr(ctx), "error", "too many streams")
		return from, status.Errorf(codes.ResourceExhausted, "the %s has %d streams already", from, maxStreams)
	}
	n.opened[from]++
	return from, nil
}

func (s *Server) dismiss(from mesh.Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[from.Node]
	if n.opened[from]--; n.opened[from] == 0 {
		delete(n.opened, from)
	}
	s.forget(from.Node)
	s.tidy(from.Node)
}

// forget drops a node of which nothing is left, so that names do not pile up.
// Called with mu.
func (s *Server) forget(name string) {
	if n := s.nodes[name]; n != nil && len(n.opened) == 0 && !s.away[name] {
		delete(s.nodes, name)
	}
}

func peerAddr(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
