package xds

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// seen is what a client knows, as it was last applied.
type seen struct {
	mu    sync.Mutex
	world mesh.World
	pods  []mesh.Pod
	count int
}

func (s *seen) change(c mesh.Changes) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world = *s.world.With(c, time.Now())
	if !c.Part {
		s.count++
	}
	return nil
}

func (s *seen) setPods(pods []mesh.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods = pods
	s.count++
}

// Any sequence of deltas equals the snapshot, over connections that break at any
// moment, a control that begins again, and clients that join late.
func TestDeltasEqualSnapshot(t *testing.T) {
	seed := rand.Uint64()
	if testing.Short() {
		seed = 1
	}
	t.Logf("seed %d", seed)
	r := newRandomMesh(seed)
	c := startControl(t, ServerConfig{Log: testLog(t)})
	nodes := []string{"n1", "n2", "n3"}
	worlds, pods := map[string]*seen{}, map[string]*seen{}
	for _, node := range nodes {
		worlds[node], pods[node] = &seen{}, &seen{}
		cut := newCutter(t, c, node)
		run(t, NewWorldClient(ClientConfig{Conn: cut.proxy, Node: node}, worlds[node].change))
		run(t, NewPodClient(ClientConfig{Conn: cut.agent, Node: node}, pods[node].setPods))
		for range 100 {
			r.step(6)
			version := c.Publish(r.snapshot())
			switch r.IntN(20) {
			case 0:
				cut.cut()
			case 1:
				c.stop()
				c.start(t, ServerConfig{Log: testLog(t)})
			case 2, 3, 4, 5:
				c.settle(t, version)
			}
		}
	}
	snap := r.snapshot()
	version := c.Publish(snap)
	c.connected(t, nodes...)
	c.settle(t, version)
	want := mesh.NewWorld(snap.Workloads, snap.Services).All()
	want.Policies = snap.Policies
	for _, node := range nodes {
		worlds[node].mu.Lock()
		if got := worlds[node].world.All(); !reflect.DeepEqual(got, want) {
			t.Errorf("seed %d: %s knows another World:\n%+v\nwant\n%+v", seed, node, got, want)
		}
		worlds[node].mu.Unlock()
		c.until(t, node+" knows its pods", func() bool {
			pods[node].mu.Lock()
			defer pods[node].mu.Unlock()
			return pods[node].count > 0 && gocmp.Equal(pods[node].pods, append([]mesh.Pod{}, snap.Pods[node]...), cmpAddr, cmpPrefix)
		})
	}
}

// cutter lets a test break the connections of one node.
type cutter struct {
	proxy, agent *Conn

	mu   sync.Mutex
	open []net.Conn
}

func newCutter(t *testing.T, c *control, node string) *cutter {
	cut := &cutter{}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	to := c.addr
	wg.Go(func() { cut.acceptLoop(lis, to, &wg) })
	via := *c
	via.addr = lis.Addr().String()
	cut.proxy, cut.agent = via.dial(t, node), via.dialAgent(t, node)
	t.Cleanup(func() { cut.proxy.Close(); cut.agent.Close(); lis.Close(); cut.cut(); wg.Wait() })
	return cut
}

func (c *cutter) acceptLoop(lis net.Listener, to string, wg *sync.WaitGroup) {
	for {
		down, err := lis.Accept()
		if err != nil {
			return
		}
		up, err := net.Dial("tcp", to)
		if err != nil {
			down.Close()
			continue
		}
		c.mu.Lock()
		c.open = append(c.open, up, down)
		c.mu.Unlock()
		wg.Go(func() { pipe(up, down) })
		wg.Go(func() { pipe(down, up) })
	}
}

func pipe(dst, src net.Conn) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 1024)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.open {
		conn.Close()
	}
	c.open = nil
}

func workload(i int, change func(*mesh.Workload)) *mesh.Workload {
	w := &mesh.Workload{UID: fmt.Sprintf("Kubernetes//Pod/ns/p%05d", i), Namespace: "ns", Name: fmt.Sprintf("p%05d", i),
		ID: mesh.ID{TrustDomain: "lab", Namespace: "ns", ServiceAccount: "sa"}, Direct: true, Enrolled: true, Ready: true,
		OwnerKind: "pod", Cluster: "Kubernetes", Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})}}
	if change != nil {
		change(w)
	}
	return w
}

func workloads(n int) Snapshot {
	var snap Snapshot
	for i := range n {
		snap.Workloads = append(snap.Workloads, workload(i, nil))
	}
	return snap
}

func count(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// What a node knows already is not sent again, whoever was away.
func TestReconnectResendsNothingKnown(t *testing.T) {
	c := startControl(t, ServerConfig{})
	snap := workloads(50)
	snap.Pods = map[string][]mesh.Pod{"n1": {newRandomMesh(1).pod(1)}}
	c.Publish(snap)
	reg := prometheus.NewRegistry()
	known := &seen{}
	cut := newCutter(t, c, "n1")
	run(t, NewWorldClient(ClientConfig{Conn: cut.proxy, Node: "n1", Registry: reg}, known.change))
	run(t, NewPodClient(ClientConfig{Conn: cut.agent, Node: "n1", Registry: reg}, func([]mesh.Pod) {}))
	c.connected(t, "n1")
	c.settle(t, 1)
	received := func() float64 { return count(t, reg, "tacit_xds_resources_received_total") }
	c.until(t, "all is received", func() bool { return received() == 51 })

	cut.cut()
	c.until(t, "the proxy is missed", func() bool { return len(c.Acked(0)) == 1 })
	c.connected(t, "n1")
	snap.Workloads[7] = workload(7, func(w *mesh.Workload) { w.Ready = false })
	c.settle(t, c.Publish(snap))
	if n := received(); n != 52 {
		t.Errorf("after a cut, one change: %v resources received: want 52", n)
	}

	c.stop()
	snap.Workloads = snap.Workloads[:49]
	c.start(t, ServerConfig{})
	c.Publish(snap)
	c.connected(t, "n1")
	c.settle(t, 1)
	if n := received(); n != 52 {
		t.Errorf("after a new control, one removal: %v resources received: want 52, it is not among those of its bucket", n)
	}
	known.mu.Lock()
	defer known.mu.Unlock()
	if known.count != 3 {
		t.Errorf("%d Worlds applied: want 3", known.count)
	}
}

// An ack says that nothing acts on an older World any more. Acks come in order,
// and do not hold up the next World.
func TestAckAfterSettled(t *testing.T) {
	c := startControl(t, ServerConfig{})
	worlds := make(chan chan struct{}, 10)
	client := NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} {
		settled := make(chan struct{})
		worlds <- settled
		return settled
	})
	run(t, client)
	v1 := c.Publish(workloads(1))
	first := receiveWithin(t, "the first World", worlds)
	v2 := c.Publish(workloads(2))
	second := receiveWithin(t, "the second World, while the first has not settled", worlds)
	for _, v := range []uint64{v1, v2} {
		if got := c.Acked(v); len(got) != 1 {
			t.Errorf("nothing has settled, waiting for version %d: %v", v, got)
		}
	}
	c.until(t, "the second decides", func() bool { return c.Applied(everybody) == v2 })
	close(first)
	c.settle(t, v1)
	if got := c.Acked(v2); len(got) != 1 {
		t.Errorf("the second has not settled, waiting: %v", got)
	}
	// A publication without news for the proxy is settled with what went before.
	v3 := c.Publish(Snapshot{Workloads: workloads(2).Workloads, Pods: map[string][]mesh.Pod{"n9": {newRandomMesh(1).pod(1)}}})
	if got := c.Acked(v3); v3 == v2 || len(got) != 1 {
		t.Errorf("the second has not settled, waiting for version %d: %v", v3, got)
	}
	c.until(t, "the third decides", func() bool { return c.Applied(everybody) == v3 })
	close(second)
	c.settle(t, v3)
}

// One World that is still acted upon does not keep those that follow from deciding.
func TestManyWorldsWithoutAnAck(t *testing.T) {
	c := startControl(t, ServerConfig{})
	first := make(chan struct{})
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} { return first }))
	var v uint64
	for i := range 2 * maxUnapplied {
		v = c.Publish(workloads(1 + i))
		c.until(t, "it decides", func() bool { return c.Applied(everybody) == v })
	}
	if got := c.Acked(v); len(got) != 1 {
		t.Errorf("nothing has settled, waiting: %v", got)
	}
	close(first)
	c.settle(t, v)
}

func everybody(string) bool { return true }

// By what nobody decides that counts, everybody does; and by nothing, who may come back.
func TestApplied(t *testing.T) {
	c := startControl(t, ServerConfig{GoneAfter: time.Hour})
	v := c.Publish(workloads(1))
	if got := c.Applied(everybody); got != math.MaxUint64 {
		t.Errorf("without nodes: %d", got)
	}
	stop := run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} { return nil }))
	c.until(t, "n1 decides", func() bool { return c.Applied(everybody) == v })
	stop()
	c.until(t, "n1 is away", func() bool { return c.Applied(everybody) == 0 })
	if got := c.Applied(func(node string) bool { return node != "n1" }); got != math.MaxUint64 {
		t.Errorf("n1 does not count: %d", got)
	}
}

// A node that takes nothing, or has left, is waited for once, and not again for each
// publication; when it has caught up it counts.
func TestLateNodesAreWaitedForOnce(t *testing.T) {
	c := startControl(t, ServerConfig{GoneAfter: time.Hour, LateAfter: 50 * time.Millisecond})
	frozen := make(chan struct{})
	c.Publish(workloads(1))
	stop := run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} { <-frozen; return nil }))
	c.connected(t, "n1")
	if got := c.Applied(everybody); got != 0 {
		t.Errorf("n1 has not taken anything, applied: %d", got)
	}
	c.until(t, "nobody waits for n1", func() bool { return c.Applied(everybody) == math.MaxUint64 })
	v := c.Publish(workloads(2))
	if got := c.Applied(everybody); got != math.MaxUint64 {
		t.Errorf("n1 is waited for again: %d", got)
	}
	if got := c.Acked(v); len(got) != 1 {
		t.Errorf("a withdrawal waits for %v, want n1 still", got)
	}
	close(frozen)
	c.until(t, "n1 counts again", func() bool { return c.Applied(everybody) == v })
	stop()
	c.until(t, "nobody waits for its return", func() bool { return c.Applied(everybody) == math.MaxUint64 })
}

// After a reconnect an ack still waits for what was applied before.
func TestAckAfterSettledAcrossReconnect(t *testing.T) {
	c := startControl(t, ServerConfig{})
	worlds := make(chan chan struct{}, 10)
	cut := newCutter(t, c, "n1")
	run(t, NewWorldClient(ClientConfig{Conn: cut.proxy, Node: "n1"}, func(mesh.Changes) <-chan struct{} {
		settled := make(chan struct{})
		worlds <- settled
		return settled
	}))
	v := c.Publish(workloads(1))
	settled := receiveWithin(t, "the World", worlds)
	cut.cut()
	c.until(t, "the proxy is missed", func() bool { return !c.Nodes()[0].GoneSince.IsZero() })
	c.connected(t, "n1")
	if got := c.Acked(v); len(got) != 1 {
		t.Errorf("nothing has settled, waiting: %v", got)
	}
	close(settled)
	c.settle(t, v)
}

// A World that does not fit one message is applied once, when it is complete.
func TestLargeWorldIsAppliedOnce(t *testing.T) {
	c := startControl(t, ServerConfig{})
	known := &seen{}
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, known.change))
	c.connected(t, "n1")
	snap := workloads(8000)
	c.settle(t, c.Publish(snap))
	known.mu.Lock()
	defer known.mu.Unlock()
	if want := mesh.NewWorld(snap.Workloads, nil); known.count != 1 || !reflect.DeepEqual(known.world.All(), want.All()) {
		t.Errorf("applied %d times: want once, and everything", known.count)
	}
}

// A resource that a node cannot take keeps its last good form there, is named and
// counted, and the node does not count as settled until it is repaired.
func TestRefusedResource(t *testing.T) {
	c := startControl(t, ServerConfig{})
	reg := prometheus.NewRegistry()
	known := &seen{}
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1", Registry: reg}, known.change))
	c.connected(t, "n1")
	good := workloads(2)
	c.settle(t, c.Publish(good))

	broken := workload(0, nil)
	v := c.publishBroken(t, broken.UID, func(m *message.Workload) { m.TrustDomain = "" })
	c.until(t, "the refusal", func() bool { return c.Nodes()[0].Rejected != "" })
	if got, want := c.Nodes()[0].Rejected, broken.UID+": direct without an identity of its own"; got != want {
		t.Errorf("refusal %q: want %q", got, want)
	}
	if got := c.Acked(v); len(got) != 1 {
		t.Errorf("waiting for %v: want n1", got)
	}
	if n := count(t, reg, "tacit_xds_resources_rejected_total"); n != 1 {
		t.Errorf("the node counts %v refusals: want 1", n)
	}
	if w := known.load().Workload(broken.Addresses[0]); w == nil || w.ID != broken.ID {
		t.Errorf("the last good one is not kept: %+v", w)
	}

	v = c.Publish(Snapshot{Workloads: []*mesh.Workload{broken, workload(1, func(w *mesh.Workload) { w.Ready = false }), workload(2, nil)}})
	c.settle(t, v)
	if got := c.Nodes()[0].Rejected; got != "" {
		t.Errorf("repaired, and still %q", got)
	}
}

// While a refusal stands, other news arrives and is not taken for agreement.
func TestRefusalStands(t *testing.T) {
	c := startControl(t, ServerConfig{})
	known := &seen{}
	cut := newCutter(t, c, "n1")
	run(t, NewWorldClient(ClientConfig{Conn: cut.proxy, Node: "n1"}, known.change))
	c.connected(t, "n1")
	c.settle(t, c.Publish(workloads(1)))
	c.publishBroken(t, workload(0, nil).UID, func(m *message.Workload) { m.Addresses = [][]byte{{1}} })
	v := c.publishBroken(t, workload(0, nil).UID, func(m *message.Workload) { m.Addresses = [][]byte{{1, 2}} })
	c.until(t, "the refusal", func() bool { return strings.Contains(c.Nodes()[0].Rejected, "2 bytes") })
	if got := c.Acked(v); len(got) != 1 {
		t.Errorf("waiting for %v: want n1", got)
	}
	cut.cut()
	c.until(t, "the proxy is missed", func() bool { return !c.Nodes()[0].GoneSince.IsZero() })
	c.until(t, "the refusal is said again", func() bool { return c.Nodes()[0].Rejected != "" })
	c.settle(t, c.Publish(Snapshot{}))
}

func (s *seen) load() *mesh.World {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.world
	return &w
}

// publishBroken publishes, past all checks, a workload that a node must refuse.
func (c *control) publishBroken(t *testing.T, uid string, change func(*message.Workload)) uint64 {
	t.Helper()
	c.publishing.Lock()
	defer c.publishing.Unlock()
	m := c.world.get(uid).address(t)
	change(m.GetWorkload())
	e, err := newEntry(nil, addressType, uid, m)
	if err != nil {
		t.Fatal(err)
	}
	return c.install(map[mesh.Process]edit{everyProxy: {table: c.world, set: []*entry{e}}})
}

// Great parts of the World are told to few at once; the others are told theirs when a seat is
// free.
func TestMuchIsToldInTurn(t *testing.T) {
	c := startControl(t, ServerConfig{})
	c.seats, c.portion = make(chan struct{}, 1), portion{1 << 10, maxScan}
	c.seats <- struct{}{} // somebody else's
	v := c.Publish(workloads(1000))
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} { return nil }))
	agent := make(chan []mesh.Pod, 10)
	run(t, NewPodClient(ClientConfig{Conn: c.dialAgent(t, "n2"), Node: "n2"}, func(pods []mesh.Pod) { agent <- pods }))
	receiveWithin(t, "what is little", agent)
	c.connected(t, "n1")
	if got := c.Applied(everybody); got != 0 {
		t.Errorf("applied %d: want that it waits", got)
	}
	<-c.seats
	c.until(t, "all is told", func() bool { return c.Applied(everybody) == v })
	c.until(t, "the seat is free", func() bool { return len(c.seats) == 0 })
}

// A client that does not read has its seat for a while only.
func TestASeatIsNotForEver(t *testing.T) {
	c := startControl(t, ServerConfig{})
	c.seats, c.seatFor, c.portion = make(chan struct{}, 1), 200*time.Millisecond, portion{1 << 10, maxScan}
	v := c.Publish(workloads(1000))
	open(t, c.dial(t, "n1"), "n1", addressType) // and it answers nothing
	c.until(t, "it has a seat", func() bool { return len(c.seats) == 1 })
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n2"), Node: "n2"}, func(mesh.Changes) <-chan struct{} { return nil }))
	c.until(t, "n2 has all", func() bool { return c.Applied(func(node string) bool { return node == "n2" }) == v })
}
