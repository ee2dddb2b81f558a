// Package control is the way of knowledge: it reads the objects of a cluster,
// decides which pods are enrolled and announced, tells every node what it has to
// know, and signs certificates for the identities that live on a node. It
// stands above all nodes and beside the bytes: no application byte comes
// through it, and nodes keep serving without it. It refuses to sign for a node
// what has no pod there, and to announce a pod that is not captured.
package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/admin"
	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/wire/csr"
	"tacit.dev/wire/xds"
)

// Source brings the objects. Run calls apply with all of them as soon as they
// are all known, and again after each change, never twice at the same time; what
// it handed out it never changes. It returns nil when ctx ended.
type Source interface {
	Run(ctx context.Context, apply func(kube.Objects)) error
}

// Nodes knows the nodes and how they prove themselves. It is safe for concurrent use.
type Nodes interface {
	// Authenticate tells which node has the token. An error refuses it, and is
	// logged, not told to the peer.
	Authenticate(ctx context.Context, token string) (node string, err error)
	// Names names the nodes that there are.
	Names(ctx context.Context) ([]string, error)
}

// Config is what New needs.
type Config struct {
	// Source brings the objects.
	Source Source
	// Keys keeps those of the CA.
	Keys ca.Store
	// Storage keeps what outlives the process. Run closes it.
	Storage Storage
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
		errs = append(errs, admin.Config{Addr: c.Admin}.Validate())
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
		cfg.Registry = admin.NewRegistry()
	}
	return &Control{cfg: cfg}, nil
}

// Run serves until ctx ends, then ends all streams. It returns nil when ctx ended
// it. It is called once.
func (c *Control) Run(ctx context.Context) error {
	p, err := open(ctx, c.cfg)
	if err != nil {
		return fmt.Errorf("start control: %w", err)
	}
	defer p.close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.cfg.Source.Run(ctx, p.reconciler.inbox.putObjects) })
	g.Go(func() error { return p.reconciler.run(ctx) })
	g.Go(func() error { return p.serve(ctx) })
	if p.cfg.Admin != "" {
		g.Go(func() error { return p.admin(ctx) })
	}
	return g.Wait()
}

// plane is a control plane that has its files open.
type plane struct {
	cfg        Config
	log        *slog.Logger
	ca         *ca.CA
	listener   net.Listener
	server     *xds.Server
	reconciler *reconciler
}

// open takes the storage, and leaves nothing open if it fails.
func open(ctx context.Context, cfg Config) (*plane, error) {
	p := &plane{cfg: cfg, log: cfg.Log, listener: cfg.Listener}
	if err := errors.Join(p.openCA(), p.listen()); err != nil {
		p.close()
		return nil, err
	}
	if err := p.prepare(ctx); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *plane) openCA() (err error) {
	p.ca, err = ca.Open(ca.Config{
		Store:       p.cfg.Keys,
		TrustDomain: p.cfg.TrustDomain,
		LeafTTL:     p.cfg.LeafTTL,
		Log:         p.log,
	})
	if err != nil {
		return err
	}
	return p.cfg.Storage.PublishBundle(p.ca.Bundle())
}

func (p *plane) listen() (err error) {
	if p.listener == nil {
		p.listener, err = net.Listen("tcp", p.cfg.Listen)
	}
	return err
}

// prepare makes what brings knowledge together.
func (p *plane) prepare(ctx context.Context) error {
	memories := &store{storage: p.cfg.Storage}
	past, err := memories.load()
	if err != nil {
		return fmt.Errorf("remember captured pods: %w", err)
	}
	// What an earlier process announced, nodes may still act on.
	var expect []string
	if len(past) > 0 {
		if expect, err = p.cfg.Nodes.Names(ctx); err != nil {
			return fmt.Errorf("name the nodes: %w", err)
		}
	}
	box := newInbox()
	p.server = xds.NewServer(xds.ServerConfig{
		Authenticate: p.cfg.Nodes.Authenticate,
		OnReports:    box.putReports,
		OnReport:     box.putReport,
		GoneAfter:    p.cfg.GoneAfter,
		Expect:       expect,
		Log:          p.log,
		Registry:     p.cfg.Registry,
	})
	p.reconciler = &reconciler{
		build:     kube.BuildConfig{TrustDomain: p.cfg.TrustDomain, Cluster: p.cfg.Cluster},
		inbox:     box,
		roster:    newRoster(past, p.log),
		server:    p.server,
		store:     memories,
		metrics:   newMetrics(p.cfg.Registry),
		log:       p.log,
		published: make(chan struct{}),
	}
	return nil
}

// close may be called on a plane that is half open.
func (p *plane) close() {
	if p.listener != nil {
		p.listener.Close()
	}
	if err := p.cfg.Storage.Close(); err != nil {
		p.log.Warn("storage not closed", "error", err)
	}
}

// serve serves nodes, once there is something to tell them.
func (p *plane) serve(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-p.reconciler.published:
	}
	names, err := serverNames(p.listener.Addr(), p.cfg.Names)
	if err != nil {
		return err
	}
	p.log.Info("serving nodes", "address", p.listener.Addr().String(), "names", names, "trust_domain", p.cfg.TrustDomain)
	cert := &serverCertificate{ca: p.ca, names: names}
	signer := &csr.Server{Authenticate: p.cfg.Nodes.Authenticate, Sign: p.sign, Log: p.log}
	cfg := xds.ServeConfig{Listener: p.listener, TLS: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cert.get}}
	cfg.Services = append(cfg.Services, p.server.Register, signer.Register)
	return xds.Serve(ctx, cfg)
}

func (p *plane) admin(ctx context.Context) error {
	return admin.Run(ctx, admin.Config{
		Addr:     p.cfg.Admin,
		Registry: p.cfg.Registry,
		Ready:    p.ready,
		Dump:     map[string]func() any{"status": p.status},
		Log:      p.log,
	})
}

func (p *plane) ready() error {
	if !p.reconciler.started() {
		return errors.New("the objects are not known yet")
	}
	return nil
}

func (p *plane) status() any {
	s := p.reconciler.status.Load()
	if s == nil {
		s = &Status{TrustDomain: p.cfg.TrustDomain, Pods: []PodStatus{}, Problems: []string{}}
	}
	return s.complete(p.server)
}
