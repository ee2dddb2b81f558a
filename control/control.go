// Package control is the way of knowledge: it reads the objects of a cluster,
// decides which pods are enrolled and announced, tells every node what it has to
// know, and signs certificates for the identities that live on a node. It
// stands above all nodes and beside the bytes: no application byte comes
// through it, and nodes keep serving without it. It refuses to sign for a node
// what has no pod there, and to announce a pod that is not captured.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/admin"
	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

// Source brings the objects. Run calls apply with all of them as soon as they
// are all known, also if there are none, and after that with what has changed, never
// twice at the same time; what it handed out it never changes. It returns nil when ctx
// ended.
type Source interface {
	Run(ctx context.Context, apply func([]kube.Event)) error
}

// Nodes knows the nodes and how they prove themselves. It is safe for concurrent use.
type Nodes interface {
	// Authenticate tells which process, of which node, has the token. An error
	// refuses it, and is logged, not told to the peer.
	Authenticate(ctx context.Context, token string) (mesh.Process, error)
	// Names names the nodes that there are.
	Names(ctx context.Context) ([]string, error)
}

// Election picks one leader among the processes that take part in it.
type Election interface {
	// Run takes part until ctx ends, and lets go of the lead before it returns.
	// Each time this process has become the leader it calls lead and waits for
	// it; lead's context ends when this process no longer leads, and leads
	// tells whether it certainly does at this moment. If lead fails, the lead is let
	// go of, and tried for again. follow is told the address under which the
	// present leader serves nodes, "" if there is none; address is our own.
	Run(ctx context.Context, address string, lead func(ctx context.Context, leads func() bool) error, follow func(leader string)) error
}

// Config is what New needs.
type Config struct {
	// Source brings the objects.
	Source Source
	// Keys keeps those of the CA.
	Keys ca.Store
	// Storage keeps what outlives the process. Run closes it.
	Storage Storage
	// Election picks who writes and tells the nodes; the others pass nodes'
	// connections on to it. nil means that there is no other process.
	Election Election
	// Advertise is HOST:PORT where other processes reach Listen. "" means the
	// address of Listen or, if that is any address, one of the machine's.
	Advertise string
	// Listen is HOST:PORT for the nodes (gRPC over TLS).
	Listen string
	// Listener is used instead of Listen if it is not nil. Run closes it.
	Listener net.Listener
	// Admin is HOST:PORT for metrics and dumps. "" means none.
	Admin string
	// Profiles has Admin serve profiles of the process, too.
	Profiles bool
	// Metrics is HOST:PORT for readiness and metrics alone, if there is an Admin.
	// "" means none.
	Metrics string
	// Names are the DNS names and IP addresses by which nodes reach control,
	// besides the host of Listen.
	Names []string
	// TrustDomain of all identities.
	TrustDomain string
	// Namespace is that of control and the nodes' processes. It is never enrolled.
	Namespace string
	// RootNamespace is where an AuthorizationPolicy applies to the whole mesh. "" means
	// Namespace.
	RootNamespace string
	// Display shows people how far the mesh is. nil means nowhere.
	Display Display
	// Cluster is the cluster's name. "" means Kubernetes.
	Cluster string
	// Ranges are those of the cluster's pods and services that no object names.
	Ranges []netip.Prefix
	// NodePorts are those out of which Services get ports of nodes.
	NodePorts mesh.NodePorts
	// LeafTTL is how long a leaf lives. 0 means 24 h.
	LeafTTL time.Duration
	// Nodes knows the nodes.
	Nodes Nodes
	// GoneAfter is how long a withdrawal waits for a node that is not
	// connected. 0 means 30 s.
	GoneAfter time.Duration
	// Registry gets the metrics. nil means a new one.
	Registry *prometheus.Registry
	// Log is told what control does. nil means nowhere.
	Log *slog.Logger
}

// Validate joins everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	missing := func(is bool, what string) {
		if is {
			errs = append(errs, errors.New("missing: "+what))
		}
	}
	missing(c.Source == nil, "source of objects")
	missing(c.Keys == nil, "where the keys of the CA are kept")
	missing(c.Storage == nil, "storage")
	missing(c.Nodes == nil, "how nodes prove themselves")
	missing(c.TrustDomain == "", "trust domain")
	if c.Listener == nil {
		if _, _, err := net.SplitHostPort(c.Listen); err != nil {
			errs = append(errs, fmt.Errorf("listen address %q: want HOST:PORT: %w", c.Listen, err))
		}
	}
	if c.Admin != "" {
		errs = append(errs, admin.Config{Addr: c.Admin, Metrics: c.Metrics}.Validate())
	}
	for _, r := range c.Ranges {
		errs = append(errs, kube.CheckRange(r))
	}
	if c.LeafTTL < 0 || c.GoneAfter < 0 {
		errs = append(errs, fmt.Errorf("leaf ttl %v, gone after %v: want none negative", c.LeafTTL, c.GoneAfter))
	}
	return errors.Join(errs...)
}

// Control is one control plane.
type Control struct{ cfg Config }

// New checks cfg, and starts nothing.
func New(cfg Config) (*Control, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure control: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Registry == nil {
		cfg.Registry = admin.NewRegistry("unknown")
	}
	return &Control{cfg: cfg}, nil
}

// Run serves until ctx ends, then ends all streams. It returns nil when ctx ended
// it. It is called once.
func (c *Control) Run(ctx context.Context) error {
	p, err := open(c.cfg)
	if err != nil {
		return fmt.Errorf("start control: %w", err)
	}
	defer p.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.cfg.Source.Run(ctx, p.latest.put) })
	g.Go(func() error { return p.frontend.run(ctx) })
	g.Go(func() error { return p.elect(ctx) })
	if p.cfg.Admin != "" {
		g.Go(func() error { return p.admin(ctx) })
	}
	return g.Wait()
}

// plane is a control plane that is open: it may lead, or not.
type plane struct {
	cfg      Config
	log      *slog.Logger
	frontend *frontend
	latest   *latest
	metrics  *metrics
	// names are what nodes may reach us by, advertised is how the others do.
	names      []string
	advertised string
	// term is not nil while this process leads.
	term atomic.Pointer[term]
}

// open leaves nothing open if it fails.
func open(cfg Config) (*plane, error) {
	p := &plane{cfg: cfg, log: cfg.Log, latest: &latest{}}
	l, err := cfg.Listener, error(nil)
	if l == nil {
		l, err = net.Listen("tcp", cfg.Listen)
	}
	if err != nil {
		return nil, errors.Join(err, cfg.Storage.Close())
	}
	p.frontend = newFrontend(l, cfg.Log, cfg.Registry)
	p.metrics = newMetrics(cfg.Registry)
	cfg.Registry.MustRegister(newExpiry(func() *ca.CA {
		if t := p.term.Load(); t != nil {
			return t.ca
		}
		return nil
	}))
	if p.names, err = serverNames(l.Addr(), cfg.Names); err == nil {
		p.advertised, err = advertised(l.Addr(), cfg.Advertise)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	p.frontend.self = p.advertised
	return p, nil
}

func (p *plane) close() {
	p.frontend.close()
	if err := p.cfg.Storage.Close(); err != nil {
		p.log.Warn("storage not closed", "error", err)
	}
}

// elect leads whenever this process is the leader, which it always is if there is
// nobody else.
func (p *plane) elect(ctx context.Context) error {
	if p.cfg.Election == nil {
		return p.lead(ctx, func() bool { return true })
	}
	return p.cfg.Election.Run(ctx, p.advertised, p.lead, p.frontend.follow)
}

func (p *plane) admin(ctx context.Context) error {
	return admin.Run(ctx, admin.Config{
		Addr:     p.cfg.Admin,
		Metrics:  p.cfg.Metrics,
		Profiles: p.cfg.Profiles,
		Registry: p.cfg.Registry,
		Ready:    p.ready,
		Dump:     map[string]func() any{"status": p.status},
		Log:      p.log,
	})
}

// ready tells whether nodes that come here are served, or passed on to a leader.
func (p *plane) ready() error {
	if !p.latest.known() {
		return errors.New("the objects are not known yet")
	}
	t := p.term.Load()
	switch {
	case t != nil && !t.reconciler.started():
		return errors.New("nothing is published yet")
	case t == nil && p.frontend.leader() == "":
		return errors.New("there is no leader")
	}
	return nil
}

// status waits for the reconciling goroutine, for a while.
func (p *plane) status() any {
	s := &Status{TrustDomain: p.cfg.TrustDomain, Pods: []PodStatus{}, Nodes: []NodeStatus{}, Problems: []string{}, Leader: p.frontend.leader()}
	t := p.term.Load()
	if t == nil {
		return s
	}
	if known := t.reconciler.status(); known != nil {
		s = known
	}
	return s.complete(t.server)
}
