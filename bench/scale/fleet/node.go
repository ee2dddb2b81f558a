package fleet

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/pause"
	"tacit.dev/wire/xds"
)

// The parts of a node that have to be served.
const (
	addressesServed = 1 << iota
	podsServed
	namespacesServed
	reportsServed

	allServed = addressesServed | podsServed | namespacesServed | reportsServed
)

// node is one node. What is held of a type belongs to the goroutine of its stream.
type node struct {
	fleet *Fleet
	index int
	name  string
	// thawed is closed while the node reads.
	thawed atomic.Pointer[chan struct{}]
	again  atomic.Pointer[func()] // ends the proxy's stream
	proxy  link
	agent  link

	addresses *holding
	versions  []uint8 // generations of addresses, by their number
	pending   []int   // addresses of a publication that is not complete
	forget    atomic.Bool
	resources atomic.Int64 // how many addresses are held
	// These are of the agent's streams.
	ownPods, namespaces *holding

	poke chan struct{} // one slot: there is something to report

	mu              sync.Mutex // guards what follows
	parts           int        // that are served
	served          int64      // when all were, 0 if they are not
	pods            map[string]*pod
	queue           []string // UIDs to report
	enrolled, known int
}

// pod is one of a node's own.
type pod struct {
	name      string
	identity  string
	addresses []netip.Addr
	captured  bool
	told      int64
	knownAt   int64
}

func newNode(f *Fleet, index int, name string) *node {
	n := &node{fleet: f, index: index, name: name, pods: make(map[string]*pod), poke: make(chan struct{}, 1)}
	n.proxy, n.agent = link{node: n, folder: "proxies", next: index}, link{node: n, folder: "agents", next: index}
	n.freeze(false)
	n.addresses, n.ownPods, n.namespaces = newHolding(addresses{n}, addressBuckets), newHolding(few{}, otherBuckets), newHolding(few{}, otherBuckets)
	return n
}

func (n *node) freeze(yes bool) {
	thawed := make(chan struct{})
	if old := n.thawed.Load(); old != nil && !yes {
		select {
		case <-*old:
		default:
			close(*old)
		}
		return
	}
	if !yes {
		close(thawed)
	}
	n.thawed.Store(&thawed)
}

// awaitThaw blocks while the node is frozen.
func (n *node) awaitThaw(ctx context.Context) error {
	select {
	case <-*n.thawed.Load():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// renew has the proxy forget everything and connect again.
func (n *node) renew() {
	n.forget.Store(true)
	n.lost(addressesServed)
	if again := n.again.Load(); again != nil {
		(*again)()
	}
}

func (n *node) serve(part int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.serveLocked(part)
}

// serveLocked is called with mu.
func (n *node) serveLocked(part int) {
	if n.parts |= part; n.parts == allServed && n.served == 0 {
		n.served = time.Now().UnixNano()
	}
}

func (n *node) lost(part int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.parts &^= part
	n.served = 0
}

// identity is that of a pod of the mesh, if there is one.
func (n *node) identity() mesh.ID {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.pods {
		if p.captured {
			id, _ := mesh.ParseID(p.identity)
			return id
		}
	}
	return mesh.ID{}
}

// link is the connection of one process of a node, to one replica after the other.
type link struct {
	node   *node
	folder string // of its token

	mu   sync.Mutex // guards what follows
	conn *xds.Conn
	next int // replica
}

func (l *link) get() (*xds.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		return l.conn, nil
	}
	cfg := l.node.fleet.cfg
	conn, err := xds.Dial(xds.DialConfig{Addr: cfg.Control[l.next%len(cfg.Control)], TokenFile: filepath.Join(cfg.Tokens, l.folder, l.node.name), BundleFile: cfg.Bundle})
	l.next++
	l.conn = conn
	return conn, err
}

// drop closes a connection that is of no use, unless another one is there already.
func (l *link) drop(conn *xds.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == conn && conn != nil {
		conn.Close()
		l.conn = nil
	}
}

// keep has a stream again and again, over the connection that is there. What control refuses does not
// end that; where control is not reached, the other replica is tried.
func (l *link) keep(ctx context.Context, part int, stream func(ctx context.Context, conn *xds.Conn) error) error {
	for failures := 0; ; {
		period, err := l.node.fleet.period(ctx, l.node.index)
		if err != nil {
			return nil
		}
		conn, err := l.get()
		if err != nil {
			return err
		}
		during, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(period, cancel)
		began := time.Now()
		err = stream(during, conn)
		stop()
		cancel()
		l.node.lost(part)
		switch {
		case ctx.Err() != nil:
			l.drop(conn)
			return nil
		case period.Err() != nil || errors.Is(err, errForget):
			l.drop(conn)
			failures = 0
			continue
		case status.Code(err) == codes.Unavailable:
			l.drop(conn)
		}
		l.node.fleet.count.fail(err)
		if failures++; time.Since(began) > 2*time.Second {
			failures = 1
		}
		pause.For(ctx, backoff(failures))
	}
}

// errForget ends a stream whose node has to begin with nothing.
var errForget = errors.New("forget")

// backoff is that of wire/xds.
func backoff(failures int) time.Duration {
	d := min(50*time.Millisecond<<min(failures-1, 10), time.Second)
	return d/2 + rand.N(d/2+1)
}

func (n *node) runProxy(ctx context.Context) error {
	return n.proxy.keep(ctx, addressesServed, func(ctx context.Context, conn *xds.Conn) error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		forget := func() { cancel(errForget) }
		n.again.Store(&forget)
		if n.forget.Swap(false) {
			n.versions, n.addresses = nil, newHolding(addresses{n}, addressBuckets)
			n.resources.Store(0)
		}
		n.pending = nil
		err := n.follow(ctx, conn, addressType, n.addresses, n.takeAddresses)
		if cause := context.Cause(ctx); errors.Is(cause, errForget) {
			return cause
		}
		return err
	})
}

// follow is one stream of deltas; taken is called with each response that was taken in.
func (n *node) follow(ctx context.Context, conn *xds.Conn, typeURL string, h *holding, taken func(b []byte, r response) error) error {
	g, err := open(ctx, conn, deltas)
	if err != nil {
		return err
	}
	if err := g.SendMsg(h.hello(n.name, typeURL)); err != nil {
		return errors.Join(err, g.RecvMsg(receiver(func([]byte) error { return nil })))
	}
	for {
		var answer []byte
		err := g.RecvMsg(receiver(func(b []byte) error {
			if err := n.awaitThaw(ctx); err != nil {
				return err
			}
			n.fleet.count.responses.Add(1)
			r, err := h.take(b)
			if err == nil {
				err = taken(b, r)
			}
			if errors.Is(err, errDiffers) {
				n.fleet.count.differing.Add(1)
			}
			answer = ack(typeURL, r.nonce)
			return err
		}))
		if err != nil {
			return err
		}
		if err := g.SendMsg(answer); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
}

// takeAddresses is the proxy's.
func (n *node) takeAddresses(b []byte, r response) error {
	n.fleet.count.proxyBytes.Add(int64(len(b)))
	if !r.partial {
		n.fleet.book.told(n.index, n.pending)
		n.pending = n.pending[:0]
		n.serve(addressesServed)
	}
	return nil
}

// addresses is the table of a proxy, which is large: a byte for each address.
type addresses struct{ node *node }

func (a addresses) put(name, version []byte) change {
	id, generation, c := a.node.fleet.book.note(name, version, a.node.generation)
	a.node.hold(id, generation)
	return c
}

func (a addresses) drop(name []byte) change {
	id, c := a.node.fleet.book.gone(name, a.node.generation)
	if id >= 0 {
		a.node.hold(id, 0)
	}
	return c
}

func (a addresses) unpack(packed []byte, took func(name string, c change)) error {
	return a.node.fleet.book.unpack(packed, a.node.generation, func(name string, id int, generation uint8, c change) {
		a.node.hold(id, generation)
		took(name, c)
	})
}

func (a addresses) each(f func(name string, bucket int)) { a.node.fleet.book.each(a.node.versions, f) }

func (n *node) generation(id int) uint8 {
	if id >= len(n.versions) {
		return 0
	}
	return n.versions[id]
}

func (n *node) hold(id int, generation uint8) {
	if id >= len(n.versions) {
		grown := make([]uint8, id+1+id/8)
		copy(grown, n.versions)
		n.versions = grown
	}
	switch had := n.versions[id]; {
	case had == 0 && generation != 0:
		n.resources.Add(1)
	case had != 0 && generation == 0:
		n.resources.Add(-1)
	}
	n.versions[id] = generation
	n.pending = append(n.pending, id)
}

func (n *node) runAgent(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return n.agent.keep(ctx, podsServed, func(ctx context.Context, conn *xds.Conn) error {
			return n.follow(ctx, conn, podType, n.ownPods, n.takePods)
		})
	})
	g.Go(func() error {
		return n.agent.keep(ctx, namespacesServed, func(ctx context.Context, conn *xds.Conn) error {
			return n.follow(ctx, conn, namespaceType, n.namespaces, n.takeNamespaces)
		})
	})
	g.Go(func() error { return n.agent.keep(ctx, reportsServed, n.report) })
	return g.Wait()
}

func (n *node) takeNamespaces(b []byte, r response) error {
	n.fleet.count.agentBytes.Add(int64(len(b)))
	if !r.partial {
		n.serve(namespacesServed)
	}
	return nil
}

// takePods is the agent's: what is to be enrolled is captured at once.
func (n *node) takePods(b []byte, r response) error {
	n.fleet.count.agentBytes.Add(int64(len(b)))
	n.mu.Lock()
	defer n.mu.Unlock()
	err := fields(b, func(field number, v []byte) error {
		switch field {
		case 2:
			one, err := readResource(v)
			if err != nil {
				return err
			}
			return n.takePod(one)
		case 6:
			n.dropPod(v)
		}
		return nil
	})
	if err == nil && !r.partial {
		n.dropOthers()
		n.serveLocked(podsServed)
	}
	return err
}

// dropOthers drops pods that went while the node was away. Called with mu.
func (n *node) dropOthers() {
	held := n.ownPods.table.(few)
	if len(held) == len(n.pods) {
		return
	}
	for uid := range n.pods {
		if _, is := held[uid]; !is {
			n.dropPod([]byte(uid))
		}
	}
}

// takePod is called with mu.
func (n *node) takePod(one resource) error {
	t, err := readPod(one.body)
	if err != nil {
		return err
	}
	uid := string(one.name)
	p := n.pods[uid]
	if p == nil {
		p = &pod{name: t.namespace + "/" + t.name, identity: t.identity, addresses: n.fleet.cfg.Addresses(uid)}
		n.pods[uid] = p
	}
	now := time.Now().UnixNano()
	if t.enroll != p.captured {
		if p.captured = t.enroll; t.enroll {
			p.told = now
			n.enrolled++
		} else {
			n.enrolled--
			n.fleet.count.released.Add(1)
		}
		n.queue = append(n.queue, uid)
		n.ring()
	}
	switch {
	case t.known && p.knownAt == 0:
		p.knownAt = now
		n.known++
	case !t.known && p.knownAt != 0:
		p.knownAt = 0
		n.known--
	}
	return nil
}

// dropPod is called with mu.
func (n *node) dropPod(name []byte) {
	p := n.pods[string(name)]
	if p == nil {
		return
	}
	if p.captured {
		n.enrolled--
	}
	if p.knownAt != 0 {
		n.known--
	}
	delete(n.pods, string(name))
}

func (n *node) ring() {
	select {
	case n.poke <- struct{}{}:
	default:
	}
}

// report sends what is captured, and then what changes.
func (n *node) report(ctx context.Context, conn *xds.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, err := open(ctx, conn, reports)
	if err != nil {
		return err
	}
	sequence := uint64(0)
	for _, m := range n.opening(&sequence) {
		if err := g.SendMsg(m); err != nil {
			return errors.Join(err, g.RecvMsg(receiver(func([]byte) error { return nil })))
		}
	}
	failed := make(chan error, 1)
	var acks sync.WaitGroup
	defer acks.Wait()
	defer cancel()
	acks.Go(func() { failed <- n.acks(ctx, g) })
	for {
		select {
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-n.poke:
		}
		for _, m := range n.changes(&sequence) {
			if err := g.SendMsg(m); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
	}
}

// acks reads until the stream ends, which the end of the connection sees to.
func (n *node) acks(ctx context.Context, g grpc.ClientStream) error {
	for {
		if err := n.awaitThaw(ctx); err != nil {
			return err
		}
		if err := g.RecvMsg(receiver(func(b []byte) error {
			n.fleet.count.agentBytes.Add(int64(len(b)))
			return nil
		})); err != nil {
			return err
		}
		n.serve(reportsServed)
	}
}

func (n *node) opening(sequence *uint64) (list [][]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.queue = nil
	for uid, p := range n.pods {
		if p.captured {
			*sequence++
			list = append(list, report(*sequence, p, uid, true))
		}
	}
	*sequence++
	return append(list, synced(*sequence))
}

func (n *node) changes(sequence *uint64) (list [][]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, uid := range n.queue {
		if p := n.pods[uid]; p != nil {
			*sequence++
			list = append(list, report(*sequence, p, uid, p.captured))
		}
	}
	n.queue = nil
	return list
}
