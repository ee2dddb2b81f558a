package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"crypto/x509/pkix"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"tacit.dev/e2e/build"
)

// Cluster is a running cluster, for its owner. Its methods that change nodes are
// called one at a time; all others at any time.
type Cluster struct {
	View
	// ReadyAfter is how long it took from nothing to all nodes Ready.
	ReadyAfter time.Duration

	options  Options
	programs build.Programs
	images   []string
	client   kubernetes.Interface

	// What Down ends, in the order in which Up made it; nil until then.
	claim        *os.File
	janitor      *janitor
	pki          *pki
	cgroups      cgroups
	starter      *starter
	controlPlane *host
	forwarder    *forwarder
	nodes        []*node
}

// Up makes a cluster and returns when its nodes are Ready. Down must be called; if
// the caller is killed instead, everything ends with it.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	c := &Cluster{options: o}
	if c.programs, err = build.All(ctx, o.Progress); err != nil {
		return nil, err
	}
	if err := build.Packages(); err != nil {
		return nil, err
	}
	if err := c.chooseImages(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.Patience, fmt.Errorf("the cluster is not ready after %s", o.Patience))
	defer cancel()
	if err := c.up(ctx); err != nil {
		err = fmt.Errorf("cluster %s: %w%s", o.Name, err, c.logs(5))
		return nil, errors.Join(err, c.Down(context.WithoutCancel(ctx)))
	}
	return c, nil
}

func (c *Cluster) up(ctx context.Context) error {
	begin := time.Now()
	if err := c.take(ctx); err != nil {
		return err
	}
	if err := c.startControlPlane(); err != nil {
		return err
	}
	var nodes []*node
	for range c.options.Nodes {
		n, err := c.newNode(c.options.Taints...)
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	if err := c.ready(ctx, nodes); err != nil {
		return err
	}
	c.ReadyAfter = time.Since(begin)
	fmt.Fprintf(c.options.Progress, "cluster %s: %d nodes Ready after %.1fs\n", c.Name, len(nodes), c.ReadyAfter.Seconds())
	return c.furnish(ctx)
}

// ready waits for the API server and for the nodes.
func (c *Cluster) ready(ctx context.Context, nodes []*node) error {
	ctx, cancel := c.controlPlane.whileAlive(ctx)
	defer cancel()
	if err := c.waitAPI(ctx); err != nil {
		return err
	}
	all, ctx := errgroup.WithContext(ctx)
	for _, n := range nodes {
		all.Go(func() error { return c.waitReady(ctx, n) })
	}
	return all.Wait()
}

// take claims the cluster's folder, and makes what is needed before any machine.
func (c *Cluster) take(ctx context.Context) error {
	var err error
	if c.claim, c.View, err = claim(ctx, c.options.Name, c.programs); err != nil {
		return err
	}
	if c.janitor, err = startJanitor(c.programs, c.Name); err != nil {
		return err
	}
	if c.cgroups, err = findCgroups(c.dir); err != nil {
		return err
	}
	c.pki, err = newPKI(filepath.Join(c.dir, "pki"))
	return err
}

func (c *Cluster) startControlPlane() error {
	c.starter = newStarter()
	c.controlPlane = c.newHost(controlPlaneName)
	err := c.start(c.controlPlane, c.controlPlanePlan(), func() error {
		return withLinks(c.controlPlane.netns(), func(l links) error { return l.bridge(c.options.controlPlaneAddresses()) })
	})
	if err != nil {
		return err
	}
	f, err := newForwarder(c.controlPlane.netns(), net.JoinHostPort(controlPlane4, strconv.Itoa(apiPort)))
	if err != nil {
		return err
	}
	c.forwarder = f
	go f.run() // close waits for it
	if err := c.pki.kubeconfig("admin", pkix.Name{CommonName: "kubernetes-admin", Organization: []string{"system:masters"}}, f.address()); err != nil {
		return err
	}
	c.client, err = newClient(c.Kubeconfig())
	return err
}

func (c *Cluster) newHost(name string) *host {
	return &host{name: name, dir: c.machineDir(name)}
}

// Client is a typed client of the API server, as administrator.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// Down ends every process of the cluster and removes everything of it. It may be
// called again.
func (c *Cluster) Down(ctx context.Context) error {
	for _, n := range c.nodes {
		n.cut()
	}
	for _, n := range c.nodes {
		n.kill()
	}
	c.nodes = nil
	if c.forwarder != nil {
		c.forwarder.close()
		c.forwarder = nil
	}
	if c.controlPlane != nil {
		c.controlPlane.kill()
		c.controlPlane = nil
	}
	if c.starter != nil {
		c.starter.stop()
		c.starter = nil
	}
	if c.janitor == nil {
		return nil
	}
	err := c.janitor.finish(ctx)
	c.janitor = nil
	return errors.Join(err, c.claim.Close())
}
