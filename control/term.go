package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/pause"
	"tacit.dev/wire/csr"
	"tacit.dev/wire/xds"
)

// term is a time during which this process leads: it alone writes, and tells nodes
// something. It begins with what the leader before it has kept, and so withdraws
// nobody; it ends with every stream, and nothing of it is used again.
type term struct {
	cfg   Config
	log   *slog.Logger
	names []string
	// leads tells whether this process certainly leads at this moment.
	leads      func() bool
	ca         *ca.CA
	server     *xds.Server
	reconciler *reconciler
	presenter  *presenter
	store      *store
	pairs      *pairs
}

// errDeposed ends a term: somebody else may lead.
var errDeposed = errors.New("this process may not be the leader any more")

// lead serves nodes until ctx ends or something makes that impossible.
func (p *plane) lead(ctx context.Context, leads func() bool) error {
	t, err := p.begin(ctx, leads)
	if err != nil {
		return fmt.Errorf("lead: %w", err)
	}
	p.term.Store(t)
	defer p.term.Store(nil)
	defer t.store.wait()
	p.metrics.leads.Set(1)
	defer p.metrics.follow()
	defer p.metrics.pairs.known.Set(0)
	p.latest.deliver(t.reconciler.inbox)
	defer p.latest.deliver(nil)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return t.reconciler.run(ctx) })
	g.Go(func() error { return p.serve(ctx, t) })
	g.Go(func() error { return t.presenter.run(ctx) })
	g.Go(func() error { return t.keepBundle(ctx) })
	g.Go(func() error { return t.pairs.keep(ctx, t.leads) })
	return g.Wait()
}

// begin reads what an earlier leader has kept.
func (p *plane) begin(ctx context.Context, leads func() bool) (*term, error) {
	t := &term{cfg: p.cfg, log: p.log, names: p.names, leads: leads}
	if err := t.openCA(); err != nil {
		return nil, err
	}
	t.store = &store{storage: p.cfg.Storage}
	past, err := t.store.load()
	if err != nil {
		return nil, fmt.Errorf("remember captured pods: %w", err)
	}
	// What an earlier process announced, nodes may still act on.
	var expect []string
	if len(past) > 0 {
		if expect, err = p.cfg.Nodes.Names(ctx); err != nil {
			return nil, fmt.Errorf("name the nodes: %w", err)
		}
	}
	roster := newRoster(past, t.log)
	t.pairs = newPairs(p.cfg.Storage, roster.hosts, p.metrics.pairs, t.log)
	return t, t.prepare(roster, expect, p.metrics)
}

func (t *term) openCA() (err error) {
	t.ca, err = ca.Open(ca.Config{
		Store:       t.cfg.Keys,
		TrustDomain: t.cfg.TrustDomain,
		LeafTTL:     t.cfg.LeafTTL,
		Log:         t.log,
	})
	if err != nil {
		return err
	}
	return t.cfg.Storage.PublishBundle(t.ca.Bundle())
}

// bundleEvery is how often the bundle is put back where nodes find it, should it have
// gone from there: without it no new node proves control.
const bundleEvery = 10 * time.Second

func (t *term) keepBundle(ctx context.Context) error {
	for {
		if pause.For(ctx, bundleEvery); ctx.Err() != nil {
			return nil
		}
		if !t.leads() {
			continue
		}
		if err := t.cfg.Storage.PublishBundle(t.ca.Bundle()); err != nil {
			t.log.Warn("bundle not published, will try again", "error", err, "after", bundleEvery)
		}
	}
}

// prepare makes what brings knowledge together.
func (t *term) prepare(roster *roster, expect []string, m *metrics) error {
	secret, err := t.ca.Secret("hashes of resources")
	if err != nil {
		return err
	}
	box := newInbox()
	t.server = xds.NewServer(xds.ServerConfig{
		Authenticate: t.cfg.Nodes.Authenticate,
		OnReports:    box.putReports,
		OnReport:     box.putReport,
		OnPairs:      t.pairs.put,
		GoneAfter:    t.cfg.GoneAfter,
		Expect:       expect,
		Secret:       secret,
		Log:          t.log,
		Registry:     t.cfg.Registry,
	})
	t.presenter = newPresenter(t.cfg.Display, t.log)
	t.reconciler = &reconciler{
		build:     kube.BuildConfig{TrustDomain: t.cfg.TrustDomain, Cluster: t.cfg.Cluster, Namespace: t.cfg.Namespace, RootNamespace: t.cfg.RootNamespace, Ranges: t.cfg.Ranges, NodePorts: t.cfg.NodePorts},
		inbox:     box,
		roster:    roster,
		server:    t.server,
		store:     t.store,
		leads:     t.leads,
		presenter: t.presenter,
		metrics:   m,
		log:       t.log,
		published: make(chan struct{}),
		asked:     make(chan chan<- *Status),
		ended:     make(chan struct{}),
	}
	return nil
}

// serve serves nodes, once there is something to tell them.
func (p *plane) serve(ctx context.Context, t *term) error {
	select {
	case <-ctx.Done():
		return nil
	case <-t.reconciler.published:
	}
	local := p.frontend.open()
	defer p.frontend.shut(local)
	t.log.Info("serving nodes", "address", local.Addr().String(), "names", t.names, "trust_domain", t.cfg.TrustDomain)
	cert := &serverCertificate{ca: t.ca, names: t.names}
	signer := &csr.Server{Authenticate: t.cfg.Nodes.Authenticate, Sign: t.sign, Log: t.log}
	cfg := xds.ServeConfig{Listener: local, TLS: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cert.get}}
	cfg.Services = append(cfg.Services, t.server.Register, signer.Register)
	return xds.Serve(ctx, cfg)
}

// latest keeps the objects, for a term that begins later. It is safe for concurrent use.
type latest struct {
	mu      sync.Mutex // guards what follows
	objects kube.Set   // nil until all are known
	to      *inbox
}

// put is what a source calls.
func (l *latest) put(events []kube.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.to != nil {
		l.to.putObjects(events, l.objects)
	}
	if l.objects == nil {
		l.objects = make(kube.Set, len(events))
	}
	l.objects.Apply(events)
}

// deliver gives box what is known, and what comes from now on; nil ends that.
func (l *latest) deliver(box *inbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.to = box; box != nil && l.objects != nil {
		box.putObjects(l.objects.Events(), nil)
	}
}

func (l *latest) known() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.objects != nil
}
