package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A team is an agent and its proxy, which on Kubernetes are one pod. A node has one, or
// two while it is replaced; it is counted from 0.
type team int

// admin is where a process of the team tells of itself; "" if there is none such.
func (p team) admin(n *node, role string) string {
	switch role {
	case "agent":
		return filepath.Join(n.dir, fmt.Sprintf("admin-%d.sock", p))
	case "proxy":
		return fmt.Sprintf("127.0.0.1:%d", 15021+int(p%2)*10)
	}
	return ""
}

// metrics is where the agent of the team tells its proxy of its metrics.
func (p team) metrics(n *node) string { return filepath.Join(n.dir, fmt.Sprintf("metrics-%d.sock", p)) }

// handle is the socket between the two.
func (p team) handle(n *node) string {
	if p == 0 {
		return filepath.Join(n.dir, "handle.sock")
	}
	return filepath.Join(n.dir, fmt.Sprintf("handle-%d.sock", p))
}

// process names one of the two: NODE/ROLE, later NODE/ROLE.2.
func (p team) process(n *node, role string) string {
	if p == 0 {
		return n.name + "/" + role
	}
	return fmt.Sprintf("%s/%s.%d", n.name, role, p)
}

// named is the team that a process's role names, and takes the number off it; p if it
// names none.
func (p team) named(role *string) team {
	name, number, ok := strings.Cut(*role, ".")
	if i, err := strconv.Atoi(number); ok && err == nil {
		*role = name
		return team(i)
	}
	return p
}

// teamOf is the team of a node that is there now.
func (c *Cluster) teamOf(n *node) team {
	c.mu.Lock()
	defer c.mu.Unlock()
	return n.team
}

func doRollout(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(1, -1), call.done()); err != nil {
		return err
	}
	for _, name := range call.words {
		n, err := c.node(name)
		if err == nil {
			err = c.rollOut(ctx, n)
		}
		if err != nil {
			return fmt.Errorf("roll out %s: %w", name, err)
		}
	}
	return nil
}

// rollOut starts the next team of a node, waits until it is ready, and ends the other.
func (c *Cluster) rollOut(ctx context.Context, n *node) error {
	next := c.teamOf(n) + 1
	if err := c.startTeam(ctx, n, next); err != nil {
		return err
	}
	for _, role := range []string{"agent", "proxy"} {
		if err := c.awaitReady(ctx, next.process(n, role)); err != nil {
			return err
		}
	}
	for _, role := range []string{"agent", "proxy"} {
		if err := c.kept(n.name+"/"+role).stop(ctx, syscall.SIGTERM); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n.team = next
	for _, role := range []string{"agent", "proxy"} {
		c.keepers[n.name+"/"+role] = c.keepers[next.process(n, role)]
		delete(c.keepers, next.process(n, role))
	}
	return nil
}
