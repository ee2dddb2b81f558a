// Package control is the way of knowledge: it reads the objects of a cluster,
// decides which pods are enrolled and announced, tells every node what it has to
// know, and signs certificates for the identities that live on a node. It
// stands above all nodes and beside the bytes: no application byte comes
// through it, and nodes keep serving without it. It refuses to sign for a node
// what has no pod there, and to announce a pod that is not captured.
package control

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/control/kube"
)

// Source brings the objects. Run calls apply with all of them as soon as they
// are all known, and again after each change, never twice at the same time; what
// it handed out it never changes. It returns nil when ctx ended.
type Source interface {
	Run(ctx context.Context, apply func(kube.Objects)) error
}

// Config is what New needs.
type Config struct {
	// Source brings the objects.
	Source Source
	// StateDir keeps the CA, what is announced, and bundle.pem for the nodes. It
	// is made with mode 0700 if missing; one process at a time.
	StateDir string
	// Listen is HOST:PORT for the nodes (gRPC over TLS).
	Listen string
	// Listener is used instead of Listen if it is not nil. Run closes it.
	Listener net.Listener
	// Admin is HOST:PORT for metrics and dumps. "" means none.
	Admin string
	// Names are the DNS names and IP addresses by which nodes reach control,
	// besides the host of Listen.
	Names []string
	// TrustDomain of all identities.
	TrustDomain string
	// Cluster is the cluster's name. "" means Kubernetes.
	Cluster string
	// LeafTTL is how long a leaf lives. 0 means 24 h.
	LeafTTL time.Duration
	// TokenDir has one file per node: its name is the node's, its content the
	// token with which the node proves itself.
	TokenDir string
	// GoneAfter is how long a withdrawal waits for a node that is not
	// connected. 0 means 30 s.
	GoneAfter time.Duration
	// Registry gets the metrics. nil means a new one.
	Registry *prometheus.Registry
	// Log is told what control does. nil means nowhere.
	Log *slog.Logger
}

// Control is one control plane.
type Control struct{ cfg Config }

// New checks cfg, and starts nothing.
func New(cfg Config) (*Control, error) { return &Control{cfg: cfg}, nil }

// Run serves until ctx ends, then lets open calls finish for a moment. It
// returns nil when ctx ended it.
func (c *Control) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
