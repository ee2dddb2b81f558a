package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/e2e/build"
)

// node is a machine with a number, from which it has its addresses.
type node struct {
	host
	number int
	taints []string // with which it registers
}

// Nodes are the names of the nodes, in the order in which they were added.
func (c *Cluster) Nodes() []string {
	var names []string
	for _, n := range c.nodes {
		names = append(names, n.name)
	}
	return names
}

// AddNode adds a node, which registers with these taints (KEY=VALUE:EFFECT), and returns
// its name when it is Ready.
func (c *Cluster) AddNode(ctx context.Context, taints ...string) (string, error) {
	n, err := c.newNode(taints...)
	if err != nil {
		return "", err
	}
	return n.name, c.waitReady(ctx, n)
}

// newNode starts a node with the lowest number that is free.
func (c *Cluster) newNode(taints ...string) (*node, error) {
	number := 1
	for slices.ContainsFunc(c.nodes, func(n *node) bool { return n.number == number }) {
		number++
	}
	if number > maxNodes {
		return nil, fmt.Errorf("a cluster has at most %d nodes", maxNodes)
	}
	name := fmt.Sprintf("n%d", number)
	n := &node{host: *c.newHost(name), number: number, taints: taints}
	if err := c.pki.node(name, strings.Split(addresses(c.options.nodeAddresses(number)), ",")...); err != nil {
		return nil, err
	}
	if err := c.startNode(n); err != nil {
		return nil, err
	}
	c.nodes = append(c.nodes, n)
	return n, c.everywhereElse(n, func(l links) error { return c.routeTo(l, n) })
}

func (c *Cluster) startNode(n *node) error {
	plan, err := c.nodePlan(n)
	if err != nil {
		return err
	}
	return c.start(&n.host, plan, func() error { return c.plugIn(n) })
}

// RemoveNode takes a node away for good, as when a machine is given back: first
// the power, then the Node object and its pods, then its disk.
func (c *Cluster) RemoveNode(ctx context.Context, name string) error {
	n, err := c.node(name)
	if err != nil {
		return err
	}
	n.kill()
	err = errors.Join(
		withLinks(c.controlPlane.netns(), func(l links) error { return l.unplug(cableName(name)) }),
		c.everywhereElse(n, func(l links) error { return c.unrouteTo(l, n) }))
	c.nodes = slices.DeleteFunc(c.nodes, func(other *node) bool { return other == n })
	return errors.Join(err, c.forget(ctx, name), c.cgroups.remove(ctx, name), os.RemoveAll(n.dir))
}

// forget removes what the API server knows of a node. Nobody else would end its
// pods: that is the kubelet's word.
func (c *Cluster) forget(ctx context.Context, name string) error {
	now := int64(0)
	err := c.client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{})
	if err != nil {
		return fmt.Errorf("delete node %s: %w", name, err)
	}
	pods, err := c.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods.Items {
		err := c.client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		errs = append(errs, ignoreNotFound(err))
	}
	return errors.Join(errs...)
}

// Reboot kills all processes of a node at once and starts it again with its disk.
// It returns when the node is Ready again, by a heartbeat of after the reboot.
func (c *Cluster) Reboot(ctx context.Context, name string) error {
	n, err := c.node(name)
	if err != nil {
		return err
	}
	before, err := c.bootID(ctx, name)
	if err != nil {
		return err
	}
	n.kill()
	if err := c.cgroups.remove(ctx, name); err != nil {
		return err
	}
	if err := c.startNode(n); err != nil {
		return fmt.Errorf("reboot: %w", err)
	}
	err = build.Poll(ctx, func() error {
		after, err := c.bootID(ctx, name)
		if err == nil && after == before {
			err = fmt.Errorf("node %s has not reported its reboot: see %s", name, filepath.Join(n.dir, "var/log/kubelet.log"))
		}
		return err
	})
	return errors.Join(err, c.waitReady(ctx, n))
}

// Freeze stops everything on a node where it is, as if its machine hung: nothing
// answers, and nothing is closed. Thaw lets it go on.
func (c *Cluster) Freeze(name string) error { return c.cgroups.freeze(name, true) }

// Thaw ends what Freeze did. To thaw a node that is not frozen is no error.
func (c *Cluster) Thaw(name string) error { return c.cgroups.freeze(name, false) }

// RestartRuntime kills containerd on a node and returns when it answers again. The
// pods go on: their shims are not its children.
func (c *Cluster) RestartRuntime(ctx context.Context, name string) error {
	return c.Restart(ctx, name, "containerd", func(ctx context.Context) error {
		_, err := c.Run(ctx, name, "ctr", "version")
		return err
	})
}

// Restart kills one of the processes of a node (containerd, kubelet, kube-proxy),
// or of the control plane, and returns when a new one runs and answers, by
// whatever check the caller has; nil for none.
func (c *Cluster) Restart(ctx context.Context, machine, process string, answers func(context.Context) error) error {
	before, err := c.Pid(machine, process)
	if err != nil {
		return err
	}
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill %s on %s: %w", process, machine, err)
	}
	return build.Poll(ctx, func() error {
		after, err := c.Pid(machine, process)
		switch {
		case err != nil:
			return err
		case after == before:
			return fmt.Errorf("%s on %s has not ended", process, machine)
		case answers == nil:
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return answers(ctx)
	})
}

func (c *Cluster) node(name string) (*node, error) {
	for _, n := range c.nodes {
		if n.name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("cluster %s has no node %s, only %s", c.Name, name, strings.Join(c.Nodes(), ", "))
}
