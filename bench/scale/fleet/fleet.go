// Package fleet is the nodes of a large cluster, as control sees them: an agent and a proxy
// each, with a connection, a token and streams of their own. A simulated node reports
// captured what it is told to enroll, acknowledges all that it is told, and keeps of it only what it needs to
// say where it is when it comes back: a byte for each resource. It carries no traffic and
// refuses nothing.
package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"tacit.dev/mesh"
	"tacit.dev/pause"
	"tacit.dev/wire/csr"
)

// Config is what New needs.
type Config struct {
	// Names are those of the nodes.
	Names []string
	// Control are HOST:PORT of the replicas of control. A node tries one after the other.
	Control []string
	// Tokens is a folder with folders proxies and agents, each with a file per node.
	Tokens string
	// Bundle is the file of the roots by which control proves itself.
	Bundle string
	// Addresses tells where a pod is, by its UID, as the network plugins of its node would.
	Addresses func(uid string) []netip.Addr
}

// Fleet is all the nodes.
type Fleet struct {
	cfg   Config
	book  *book
	nodes []*node
	count counters

	mu     sync.Mutex    // guards what follows
	held   bool          // no node may connect
	joined chan struct{} // closed by the next Join
	began  time.Time     // of the last Join, and over how long nodes come
	spread time.Duration
	during context.Context
	cut    context.CancelFunc // ends during
}

// counters are those of all nodes together.
type counters struct {
	proxyBytes, agentBytes, responses, failures atomic.Int64
	released, differing                         atomic.Int64
	failure                                     atomic.Pointer[error] // the last
}

func (c *counters) fail(err error) {
	c.failures.Add(1)
	c.failure.Store(&err)
}

// New starts nothing.
func New(cfg Config) *Fleet {
	f := &Fleet{cfg: cfg, book: newBook(len(cfg.Names)), held: true, joined: make(chan struct{})}
	for i, name := range cfg.Names {
		f.nodes = append(f.nodes, newNode(f, i, name))
	}
	return f
}

// Run runs all nodes until ctx ends. They wait for Join.
func (f *Fleet) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range f.nodes {
		g.Go(func() error { return n.runProxy(ctx) })
		g.Go(func() error { return n.runAgent(ctx) })
	}
	return g.Wait()
}

// period is a time in which a node may be connected: until Cut. It waits for one to begin.
func (f *Fleet) period(ctx context.Context, node int) (context.Context, error) {
	for {
		f.mu.Lock()
		held, joined, during := f.held, f.joined, f.during
		turn := f.began.Add(f.spread * time.Duration(node) / time.Duration(len(f.nodes)))
		f.mu.Unlock()
		if !held {
			pause.For(ctx, time.Until(turn))
			return during, ctx.Err()
		}
		select {
		case <-joined:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Join lets all nodes connect, one after the other over a time.
func (f *Fleet) Join(spread time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held {
		f.held, f.began, f.spread = false, time.Now(), spread
		f.during, f.cut = context.WithCancel(context.Background())
		close(f.joined)
		f.joined = make(chan struct{})
	}
}

// Cut ends all connections; no node connects until Join.
func (f *Fleet) Cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.held {
		f.held = true
		f.cut()
	}
}

// Status is how far the nodes are.
type Status struct {
	Nodes, Served int
	// First and Last are when the first and the last of the nodes served now was, in
	// nanoseconds of the machine's clock.
	First, Last int64
	// Told are the pods that agents were told to enroll, Known those of them that every node
	// knows, as control says; Released is how often an agent was told to let go of one.
	Told, Known int
	Released    int64
	// Bytes that proxies and agents have received as messages, and how many responses.
	ProxyBytes, AgentBytes, Responses int64
	// Failures of streams, and why the last of them failed.
	Failures int64
	Failure  string
	// Differing is how often a node held something else than control said that there is.
	Differing int64
	// Resources that the first node holds.
	Resources int
}

// Status looks at every node.
func (f *Fleet) Status() (s Status) {
	s.Nodes = len(f.nodes)
	s.ProxyBytes, s.AgentBytes, s.Responses = f.count.proxyBytes.Load(), f.count.agentBytes.Load(), f.count.responses.Load()
	s.Failures, s.Released, s.Differing = f.count.failures.Load(), f.count.released.Load(), f.count.differing.Load()
	if err := f.count.failure.Load(); err != nil {
		s.Failure = fmt.Sprint(*err)
	}
	for i, n := range f.nodes {
		n.mu.Lock()
		if at := n.served; at != 0 {
			s.Served++
			s.Last = max(s.Last, at)
			if s.First == 0 || at < s.First {
				s.First = at
			}
		}
		s.Told += n.enrolled
		s.Known += n.known
		n.mu.Unlock()
		if i == 0 {
			s.Resources = int(n.resources.Load())
		}
	}
	return s
}

// Start is a pod that began on a node.
type Start struct {
	// Pod is NAMESPACE/NAME.
	Pod string
	// Told is when its agent was told to enroll it, Known when it was told that every node knows it, or 0.
	Told, Known int64
}

// Starts are the pods that agents were told of since a time.
func (f *Fleet) Starts(since int64) (all []Start) {
	for _, n := range f.nodes {
		n.mu.Lock()
		for _, p := range n.pods {
			if p.told >= since {
				all = append(all, Start{p.name, p.told, p.knownAt})
			}
		}
		n.mu.Unlock()
	}
	return all
}

// Freeze has the last n nodes read nothing any more, with all streams open; Freeze(0) thaws
// them all.
func (f *Fleet) Freeze(n int) {
	for i, node := range f.nodes {
		node.freeze(i >= len(f.nodes)-n)
	}
}

// Fresh has a node forget all that it knows and come again.
func (f *Fleet) Fresh(i int) { f.nodes[i].renew() }

// Served is when a node was served that connected last, 0 if it is not.
func (f *Fleet) Served(i int) int64 {
	n := f.nodes[i]
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.served
}

// Renewals are certificates that were asked for.
type Renewals struct {
	Done, Failed int
	Error        string
}

// renewTime bounds one.
const renewTime = 20 * time.Second

// Renew has every node that has a pod of the mesh ask for a certificate of its identity, as often as it
// takes, until the time is over.
func (f *Fleet) Renew(ctx context.Context) (r Renewals) {
	ctx, cancel := context.WithTimeout(ctx, renewTime)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Renewals{Failed: len(f.nodes), Error: err.Error()}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return Renewals{Failed: len(f.nodes), Error: err.Error()}
	}
	request := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	var g errgroup.Group
	g.SetLimit(64)
	var mu sync.Mutex
	for _, n := range f.nodes {
		g.Go(func() error {
			err := n.sign(ctx, request)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				r.Failed, r.Error = r.Failed+1, err.Error()
			} else {
				r.Done++
			}
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return r
}

// sign asks until there is an answer; a node without a pod of the mesh has nothing to ask for.
func (n *node) sign(ctx context.Context, request []byte) error {
	for {
		id := n.identity()
		if id == (mesh.ID{}) {
			return nil
		}
		conn, err := n.proxy.get()
		if err == nil {
			_, err = csr.NewClient(conn).Sign(ctx, id, request)
		}
		if err == nil || errors.Is(err, csr.ErrDenied) || errors.Is(err, csr.ErrBadRequest) {
			return err
		}
		if !pause.For(ctx, 200*time.Millisecond) {
			return fmt.Errorf("node %s: %w", n.name, err)
		}
	}
}
