package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"tacit.dev/pause"
	"tacit.dev/pod/netns"
)

// node is a machine of the lab. What is set when it is made does not change;
// rules belongs to whoever holds Cluster.converging, nextHost and team to Cluster.mu.
type node struct {
	name   string
	number int
	// bare nodes run nothing of Tacit and carry no pods: they are machines
	// outside of the cluster.
	bare bool
	ns   *netns.NS
	path string
	// dir is the run folder of the agent.
	dir string

	rules    string
	nextHost int
	// team is the agent and the proxy that are there.
	team team
}

// addNode makes a reserved node, with everything running, and returns when it is
// ready.
func (c *Cluster) addNode(ctx context.Context, n *node) error {
	if err := c.wire(n); err != nil {
		return fmt.Errorf("plug in node %s: %w", n.name, err)
	}
	if err := c.startNode(ctx, n); err != nil {
		return err
	}
	return errors.Join(c.converge(ctx), c.awaitNode(ctx, n))
}

// wire makes the namespace of a node, and all routes from and to it.
func (c *Cluster) wire(n *node) (err error) {
	c.wiring.Lock()
	defer c.wiring.Unlock()
	if n.ns, err = netns.New(n.path); err != nil {
		return err
	}
	if err := plugIn(n); err != nil {
		return err
	}
	if err := c.routeAll(n); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[n.name] = n
	return nil
}

func (c *Cluster) reserveNode(name string, bare bool) (*node, error) {
	if !validName(name) || len(name) > 12 || name == bridgeName {
		return nil, fmt.Errorf("node %q: want a name of at most 12 of a-z 0-9 -", name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodeCount++
	if _, taken := c.nodes[name]; taken || c.nodeCount > maxNodes {
		return nil, fmt.Errorf("node %s: there is one already, or there are %d", name, maxNodes)
	}
	return &node{
		name: name, number: c.nodeCount, bare: bare, nextHost: 2,
		path: filepath.Join(netnsDir, name), dir: filepath.Join(c.dir, "nodes", name),
	}, nil
}

// routeAll tells the new node of the others, and the others of it.
func (c *Cluster) routeAll(n *node) error {
	c.mu.Lock()
	others := sortedValues(c.nodes)
	c.mu.Unlock()
	errs := []error{routeTo(nil, bridgeName, n)}
	for _, o := range others {
		errs = append(errs, routeTo(o.ns, uplinkName, n), routeTo(n.ns, uplinkName, o))
	}
	return errors.Join(append(errs, defaultRoute(n))...)
}

// awaitNode waits until agent and proxy say that they are ready.
func (c *Cluster) awaitNode(ctx context.Context, n *node) error {
	if !c.options.Mesh || n.bare {
		return nil
	}
	for _, role := range []string{"agent", "proxy"} {
		if err := c.awaitReady(ctx, n.name+"/"+role); err != nil {
			return err
		}
	}
	return nil
}

// awaitReady waits until a process of Tacit answers that it is ready.
func (c *Cluster) awaitReady(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return until(ctx, func() error {
		_, err := c.adminGet(ctx, name, "/readyz")
		return err
	})
}

// patience is how long the lab waits for something that ought to happen.
const patience = 20 * time.Second

// until tries again, in short and growing intervals, until try succeeds or ctx
// ends; the error is then the last one.
func until(ctx context.Context, try func() error) error {
	wait := 5 * time.Millisecond
	for {
		err := try()
		if err == nil {
			return nil
		}
		if !pause.For(ctx, wait) {
			return fmt.Errorf("waited in vain: %w", err)
		}
		wait = min(2*wait, 100*time.Millisecond)
	}
}

func validName(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && (r != '-' || i == 0) {
			return false
		}
	}
	return true
}
