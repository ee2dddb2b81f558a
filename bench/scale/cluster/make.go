package cluster

import (
	"fmt"
	"math/rand/v2"

	"tacit.dev/bench/scale/api"
)

// Words that names are made of.
var (
	teams   = []string{"payments", "search", "identity", "billing", "catalog", "checkout", "shipping", "fraud", "ads", "media", "growth", "support", "platform", "ledger"}
	stages  = []string{"prod", "staging", "canary", "eu", "us", "batch"}
	parts   = []string{"api", "worker", "gateway", "frontend", "cache", "indexer", "scheduler", "consumer", "webhook", "exporter", "proxy", "store"}
	ports   = []int32{8080, 9090, 3000, 50051, 8443, 5432}
	letters = []byte("bcdfghjklmnpqrstvwxz2456789") // of Kubernetes' random suffixes
)

// The first set is large, for a rollout, and the last namespace is large and not enrolled, for
// an enrollment by one label.
const (
	largeSet   = 100 // of so many pods one is in the large set
	largeSpace = 10
)

// New makes the cluster and puts it into the store.
func New(cfg Config) *Cluster {
	c := &Cluster{cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 1)), poke: make(chan struct{}, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range cfg.Nodes {
		c.makeNode(i)
	}
	for i := range max(cfg.Pods/20, 3) {
		c.makeSpace(i)
	}
	c.makeSets()
	return c
}

func (c *Cluster) makeNode(i int) {
	n := &node{name: NodeName(i), zone: "eu-central-1" + string(rune('a'+i%3)), number: i, last: 1}
	c.nodes = append(c.nodes, n)
	c.cfg.Store.Put(api.Nodes, nodeObject(n))
}

func (c *Cluster) makeSpace(i int) {
	team, stage := pick(c.rng, teams), pick(c.rng, stages)
	s := &space{name: fmt.Sprintf("%s-%s-%04d", team, stage, i), labels: map[string]string{"team": team, "stage": stage, MeshLabel: "on"}}
	s.labels["kubernetes.io/metadata.name"] = s.name
	if i == c.last() {
		delete(s.labels, MeshLabel)
	}
	for j := range 4 {
		s.accounts = append(s.accounts, fmt.Sprintf("%s-%s-%d", team, parts[(i+j)%len(parts)], j))
	}
	c.spaces = append(c.spaces, s)
	c.cfg.Store.Put(api.Namespaces, namespaceObject(s))
}

// last is the number of the namespace that is not enrolled.
func (c *Cluster) last() int { return max(c.cfg.Pods/20, 3) - 1 }

// makeSets shares the pods out: a hundredth is in one set, a tenth in the last namespace, and
// the rest in sets of 1 to 9 with and without a service, by turns.
func (c *Cluster) makeSets() {
	large, later := max(c.cfg.Pods/largeSet, 4), max(c.cfg.Pods/largeSpace, 4)
	c.makeSet(c.spaces[0], large, true)
	for made := 0; made < later; {
		n := min(1+c.rng.IntN(9), later-made)
		c.makeSet(c.spaces[c.last()], n, len(c.sets)%2 == 0)
		made += n
	}
	for made := large + later; made < c.cfg.Pods; {
		n := min(1+c.rng.IntN(9), c.cfg.Pods-made)
		c.makeSet(c.spaces[len(c.sets)%c.last()], n, len(c.sets)%2 == 0)
		made += n
	}
}

func (c *Cluster) makeSet(in *space, replicas int, served bool) {
	i := len(c.sets)
	s := &set{
		space: in, name: fmt.Sprintf("%s-%s-%d", in.labels["team"], pick(c.rng, parts), i), hash: c.suffix(10), version: fmt.Sprintf("v%d.%d.%d", c.rng.IntN(4), c.rng.IntN(30), c.rng.IntN(9)),
		account: in.accounts[i%len(in.accounts)], dual: i%10 == 0, port: pick(c.rng, ports), slots: make([]*pod, replicas),
	}
	c.sets = append(c.sets, s)
	for slot := range s.slots {
		p := c.makePod(s, slot, len(c.nodes))
		p.running, p.ready = true, true
		c.cfg.Store.Put(api.Pods, podObject(p))
	}
	if served {
		s.service, s.address = s.name, serviceAddress(i+1).String()
		c.cfg.Store.Put(api.Services, serviceObject(s, i+1))
		for first := 0; first < len(s.slots); first += sliceSize {
			c.putSlices(s, first)
		}
	}
}

// makePod takes a slot of a set, on one of the first nodes.
func (c *Cluster) makePod(s *set, slot, nodes int) *pod {
	n, host := c.place(nodes)
	p := &pod{set: s, slot: slot, name: s.name + "-" + s.hash + "-" + c.suffix(5), uid: c.uid(n, host, s.dual), node: n}
	s.slots[slot] = p
	return p
}

// place finds a node with an address that is free.
func (c *Cluster) place(nodes int) (*node, int) {
	for {
		n := c.nodes[c.rng.IntN(nodes)]
		for range 250 {
			n.last = 2 + (n.last-1)%250
			if !n.used[n.last] {
				n.used[n.last] = true
				return n, n.last
			}
		}
	}
}

func (c *Cluster) suffix(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = pick(c.rng, letters)
	}
	return string(b)
}

func pick[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }
