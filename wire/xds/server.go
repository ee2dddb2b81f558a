package xds

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Authenticate tells which node the bearer token proves. An error refuses
	// the stream; its text goes to the log and not to the peer. Required.
	Authenticate func(ctx context.Context, token string) (node string, err error)
	// OnReports gets all that an agent holds, whenever its stream opens: what
	// is not in it is not captured. OnReport gets each change after that. Both
	// are called in order per node, by several goroutines for several nodes; a
	// report is acknowledged when they return. May be nil.
	OnReports func(node string, all []Report)
	OnReport  func(node string, r Report)
	// GoneAfter is how long a proxy that lost its connection is waited for: it
	// still acts on what it knows. Default 30 s.
	GoneAfter time.Duration
	// Expect names nodes that may still act on what an earlier control told
	// them: each counts as if its proxy had left just now.
	Expect []string
	// Log may be nil: silence.
	Log *slog.Logger
	// Registry gets tacit_xds_*; may be nil.
	Registry prometheus.Registerer
}

// Server tells every node what it should know. All methods may be called
// concurrently.
type Server struct {
	cfg ServerConfig
}

// NewServer starts nothing.
func NewServer(cfg ServerConfig) *Server { return &Server{cfg: cfg} }

// Register puts the services on a gRPC server; for ServeConfig.Services.
func (s *Server) Register(r grpc.ServiceRegistrar) {}

// Publish makes snap what every node should know and returns its version.
// Versions count up from 1; a snapshot that changes nothing keeps the version.
// Until the first Publish nodes are told nothing, so that a control that has not
// read its source yet takes nothing away. It does not wait for any node: a slow
// one is later told only the latest. A resource that cannot be encoded is left
// as it was, logged and counted.
func (s *Server) Publish(snap Snapshot) (version uint64) { return 0 }

// Acked lists, sorted, the nodes that may still act on something older than
// version: their proxy is connected and has not settled on it, or left less than
// GoneAfter ago. A node whose proxy refused a resource stays listed until it has
// a good one.
func (s *Server) Acked(version uint64) (waiting []string) { return nil }

// Changed receives after the answer of Acked or Nodes may have changed, several
// changes at once. There is one channel: it is meant for one reader.
func (s *Server) Changed() <-chan struct{} { return nil }

// Nodes lists what is known of the nodes, by name.
func (s *Server) Nodes() []NodeStatus { return nil }
