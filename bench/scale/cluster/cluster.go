// Package cluster makes up a cluster and lets it live: namespaces, service accounts,
// nodes, services, and pods of Deployments, with names, labels, owners and addresses as a
// real one has them. The same seed makes the same cluster, and the same calls the same changes.
// It puts objects into an api.Store as controllers and kubelets would; it knows nothing of Tacit but
// the label that enrolls a namespace.
package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"tacit.dev/bench/scale/api"
)

// Config is what New needs.
type Config struct {
	// Seed decides every choice.
	Seed uint64
	// Pods is how many there are at the beginning; services are a tenth of them, namespaces
	// a twentieth, service accounts a fifth.
	Pods int
	// Nodes is how many nodes there are.
	Nodes int
	// Store takes the objects.
	Store *api.Store
}

// MeshLabel enrolls the pods of a namespace.
const MeshLabel = "tacit.dev/mesh"

// Times of a pod's life.
const (
	// startTime is from a pod's being bound to a node until it is ready, if nobody holds it up.
	startTime = 500 * time.Millisecond
	// endTime is from its deletion until its object is gone.
	endTime = 500 * time.Millisecond
)

// Cluster is the cluster. Its methods may be called by several goroutines.
type Cluster struct {
	cfg Config

	mu     sync.Mutex // guards what follows
	rng    *rand.Rand
	nodes  []*node
	sets   []*set
	spaces []*space
	serial uint64
	later  []deed // by time
	poke   chan struct{}
}

// deed is something that happens at a time.
type deed struct {
	at time.Time
	do func()
}

type node struct {
	name, zone string
	number     int
	used       [256]bool // host numbers
	last       int
}

type space struct {
	name     string
	labels   map[string]string
	accounts []string
}

// set is a Deployment, with a service before it or without.
type set struct {
	space   *space
	name    string
	hash    string // of its ReplicaSet
	version string
	account string
	service string // "" is none
	address string // of the service
	dual    bool
	port    int32
	slots   []*pod // nil where a pod has gone
}

type pod struct {
	set     *set
	slot    int
	name    string
	uid     string
	node    *node
	ready   bool
	running bool
	ending  bool
	touched bool // by a change of Churn
}

// after has something done later. Called with mu.
func (c *Cluster) after(d time.Duration, do func()) {
	at := time.Now().Add(d)
	i, _ := slices.BinarySearchFunc(c.later, at, func(x deed, t time.Time) int { return x.at.Compare(t) })
	c.later = slices.Insert(c.later, i, deed{at, do})
	select {
	case c.poke <- struct{}{}:
	default:
	}
}

// Run does what happens by itself, until ctx ends.
func (c *Cluster) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(c.due(time.Now()))
		select {
		case <-ctx.Done():
			return nil
		case <-c.poke:
		case <-timer.C:
		}
	}
}

// due does what is due, and returns how long to wait for the next.
func (c *Cluster) due(now time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.later) > 0 && !c.later[0].at.After(now) {
		do := c.later[0].do
		c.later = c.later[1:]
		do()
	}
	if len(c.later) == 0 {
		return time.Hour
	}
	return c.later[0].at.Sub(now)
}

// Enrolled is how many pods are in namespaces that are enrolled.
func (c *Cluster) Enrolled() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.sets {
		if s.space.labels[MeshLabel] != "on" {
			continue
		}
		for _, p := range s.slots {
			if p != nil {
				n++
			}
		}
	}
	return n
}

// NodeName is the name of the n-th node.
func NodeName(n int) string {
	return fmt.Sprintf("ip-172-20-%d-%d.eu-central-1.compute.internal", n>>8, n&255)
}
