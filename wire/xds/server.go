package xds

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"math"
	"slices"
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
	// GoneAfter is how long a proxy that lost its connection is waited for: it
	// still acts on what it knows. Default 30 s.
	GoneAfter time.Duration
	// Expect names nodes that may still act on what an earlier control told
	// them: each counts as if its proxy had left when the Server is made.
	Expect []string
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

	publishing sync.Mutex // one Publish at a time; held while encoding

	mu      sync.Mutex // guards all below
	version uint64
	world   *table
	pods    map[string]*table
	// namespaces is for every agent.
	namespaces *table
	nodes      map[string]*node
	invalid    map[string]string // resources that could not be published, and why
}

// node is what a Server remembers of a node; guarded by Server.mu.
type node struct {
	streams map[*stream]bool
	opened  map[mesh.Process]int // streams, those of reports too; not 0
	reports *reportStream
	// gone is when the last proxy left, zero if none was ever there or one is.
	gone  time.Time
	timer *time.Timer
}

// NewServer starts nothing.
func NewServer(cfg ServerConfig) *Server {
	if cfg.GoneAfter <= 0 {
		cfg.GoneAfter = 30 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:     cfg,
		metrics: newServerMetrics(cfg.Registry),
		changed: make(chan struct{}, 1),
		world:   &table{},
		pods:    map[string]*table{},

		namespaces: &table{},

		nodes:   map[string]*node{},
		invalid: map[string]string{},
	}
	for _, name := range cfg.Expect {
		s.node(name).gone = time.Now()
	}
	return s
}

// Register puts the services on a gRPC server; for ServeConfig.Services.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	message.RegisterAggregatedDiscoveryServiceServer(r, discovery{server: s})
	message.RegisterEnrolmentServer(r, enrolment{server: s})
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.nodes {
		s.await(name)
	}
}

// Publish makes snap what every node should know and returns its version.
// Versions count up from 1; a snapshot that changes nothing keeps the version.
// Until the first Publish nodes are told nothing, so that a control that has not
// read its source yet takes nothing away. It does not wait for any node: a slow
// one is later told only the latest. A resource that cannot be encoded is left
// as it was, logged and counted.
func (s *Server) Publish(snap Snapshot) (version uint64) {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	// Only Publish writes the tables' entries, and a map of entries is never
	// changed: reading them here needs no s.mu.
	invalid := map[string]string{}
	bad := func(name string, err error) { invalid[name] = err.Error() }
	world := encodeAll(worldResources(snap), s.world.all(), bad)
	pods := make(map[string]map[string]*entry, len(snap.Pods))
	for name, list := range snap.Pods {
		pods[name] = encodeAll(podResources(list), s.pods[name].all(), bad)
	}
	namespaces := encodeAll(namespaceResources(snap.Namespaces), s.namespaces.all(), bad)
	s.tellInvalid(invalid)
	return s.install(world, namespaces, pods)
}

// tellInvalid logs what was not known to be invalid before. Called with publishing.
func (s *Server) tellInvalid(invalid map[string]string) {
	for name, why := range invalid {
		if s.invalid[name] != why {
			s.metrics.invalid.Inc()
			s.cfg.Log.Error("resource not published, left as it was", "resource", name, "error", why)
		}
	}
	s.invalid = invalid
}

func (s *Server) install(world, namespaces map[string]*entry, pods map[string]map[string]*entry) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.version + 1
	changed := s.world.replace(next, world)
	changed = s.namespaces.replace(next, namespaces) || changed
	for name, entries := range pods {
		if s.pods[name] == nil {
			s.pods[name] = &table{since: s.version}
		}
		changed = s.pods[name].replace(next, entries) || changed
	}
	for name, t := range s.pods {
		if pods[name] == nil {
			changed = changed || len(t.entries) > 0
			delete(s.pods, name)
		}
	}
	if changed || s.version == 0 {
		s.version = next
		s.metrics.version.Set(float64(next))
		s.wake()
	}
	return s.version
}

// wake lets every stream look. Called with mu.
func (s *Server) wake() {
	for _, n := range s.nodes {
		for st := range n.streams {
			st.wake()
		}
	}
}

// node finds or makes the record. Called with mu.
func (s *Server) node(name string) *node {
	if s.nodes[name] == nil {
		s.nodes[name] = &node{streams: map[*stream]bool{}, opened: map[mesh.Process]int{}}
	}
	return s.nodes[name]
}

// left notes that no proxy of the node is connected any more. Called with mu.
func (s *Server) left(name string) {
	s.nodes[name].gone = time.Now()
	s.await(name)
	s.notify()
}

// await sees to it that Changed tells when the node counts as gone. Called with mu.
func (s *Server) await(name string) {
	s.nodes[name].timer = time.AfterFunc(s.cfg.GoneAfter, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forget(name)
		s.notify()
	})
}

// returned is the opposite of left. Called with mu.
func (n *node) returned() {
	n.gone = time.Time{}
	if n.timer != nil {
		n.timer.Stop()
		n.timer = nil
	}
}

func (s *Server) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Acked lists, sorted, the nodes that may still act on something older than
// version: their proxy is connected and has not settled on it, or left less than
// GoneAfter ago. A node whose proxy refused a resource stays listed until it has
// a good one.
func (s *Server) Acked(version uint64) (waiting []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, n := range s.nodes {
		acked, proxy := n.acked()
		away := !n.gone.IsZero() && time.Since(n.gone) < s.cfg.GoneAfter
		if proxy && acked < version || away {
			waiting = append(waiting, name)
		}
	}
	slices.Sort(waiting)
	return waiting
}

// Applied is the oldest publication that a node decides by, be it that it still acts on
// an older one: MaxUint64 if there is no node, 0 if one that has left may come back before
// GoneAfter. Nodes that do not count are left out.
func (s *Server) Applied(counts func(node string) bool) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	oldest := uint64(math.MaxUint64)
	for name, n := range s.nodes {
		if !counts(name) {
			continue
		}
		if !n.gone.IsZero() && time.Since(n.gone) < s.cfg.GoneAfter {
			return 0
		}
		for st := range n.streams {
			if sub := st.subs[addressType]; sub != nil {
				oldest = min(oldest, max(sub.acked, sub.applied))
			}
		}
	}
	return oldest
}

// acked is the oldest publication that a connected proxy of n has settled on.
func (n *node) acked() (version uint64, proxy bool) {
	for st := range n.streams {
		if sub := st.subs[addressType]; sub != nil && (!proxy || sub.acked < version) {
			version, proxy = sub.acked, true
		}
	}
	return version, proxy
}

func (n *node) rejected() string {
	for st := range n.streams {
		for _, sub := range st.subs {
			if sub.nack != "" {
				return sub.nack
			}
		}
	}
	return ""
}

// Changed receives after the answer of Acked or Nodes may have changed, several
// changes at once. There is one channel: it is meant for one reader.
func (s *Server) Changed() <-chan struct{} { return s.changed }

// Nodes lists what is known of the nodes, by name.
func (s *Server) Nodes() []NodeStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]NodeStatus, 0, len(s.nodes))
	for _, name := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[name]
		st := NodeStatus{Node: name, Rejected: n.rejected(), GoneSince: n.gone}
		st.Acked, st.Proxy = n.acked()
		st.Behind = st.Proxy && st.Acked < s.version
		st.Agent = n.reports != nil
		out = append(out, st)
	}
	return out
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
}

// forget drops a node of which nothing is left, so that names do not pile up.
// Called with mu.
func (s *Server) forget(name string) {
	n := s.nodes[name]
	if n != nil && len(n.opened) == 0 && (n.gone.IsZero() || time.Since(n.gone) >= s.cfg.GoneAfter) {
		delete(s.nodes, name)
	}
}

func peerAddr(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
