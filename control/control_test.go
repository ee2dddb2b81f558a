package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/wire/csr"
	"tacit.dev/wire/xds"
)

// bench is one control with everything around it, in this process.
type bench struct {
	t      *testing.T
	dir    string
	source string
	tokens string
	addr   string
	gone   time.Duration
	stop   func()
}

func newBench(t *testing.T, nodes ...string) *bench {
	dir := t.TempDir()
	b := &bench{t: t, dir: filepath.Join(dir, "state"), source: filepath.Join(dir, "source"), tokens: filepath.Join(dir, "tokens"), gone: 10 * time.Second}
	b.must(os.Mkdir(b.source, 0o755), os.MkdirAll(filepath.Join(b.tokens, "proxies"), 0o700), os.Mkdir(filepath.Join(b.tokens, "agents"), 0o700))
	for _, n := range nodes {
		b.token(n)
	}
	return b
}

func (b *bench) must(errs ...error) {
	b.t.Helper()
	if err := errors.Join(errs...); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) token(node string) {
	b.t.Helper()
	for _, p := range []mesh.Process{{Node: node}, {Node: node, Agent: true}} {
		b.must(os.WriteFile(b.tokenFile(p), []byte(p.String()+" 0123456789abcdef\n"), 0o600))
	}
}

// write replaces a file of the source at once.
func (b *bench) write(name, content string) {
	b.t.Helper()
	temp := filepath.Join(b.source, "."+name)
	b.must(os.WriteFile(temp, []byte(content), 0o644), os.Rename(temp, filepath.Join(b.source, name)))
}

func (b *bench) namespace(label string) {
	b.write("namespace.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {tacit.dev/mesh: \""+label+"\"}}\n")
}

func (b *bench) pod(name, node, ip string) {
	b.write("pod-"+name+".yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: "+name+", namespace: default, uid: uid-"+name+"}\n"+
		"spec: {nodeName: "+node+", serviceAccountName: "+name+"}\nstatus: {podIP: "+ip+", conditions: [{type: Ready, status: \"True\"}]}\n")
}

// lost has the objects of two nodes, of which one is said to be lost.
func (b *bench) lost(node, mark string) {
	b.write("nodes.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: "+node+", annotations: {"+kube.AnnotationLost+": "+mark+"}}\n")
}

// start runs control until the test ends, or stop is called. It listens where it
// listened before.
func (b *bench) start() {
	b.t.Helper()
	addr := b.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	b.must(err)
	b.addr = l.Addr().String()
	c, err := New(Config{
		Source: kube.NewFolder(kube.FolderConfig{Dir: b.source}), Keys: ca.Folder(filepath.Join(b.dir, "ca")), Storage: b.storage(), Listener: l, Nodes: b.nodes(),
		TrustDomain: "lab", GoneAfter: b.gone, Log: slog.New(slog.NewTextHandler(b.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go runControl(ctx, c, ended)
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			b.t.Errorf("run: %v", err)
		}
	})
	b.t.Cleanup(b.stop)
}

func runControl(ctx context.Context, c *Control, ended chan<- error) { ended <- c.Run(ctx) }

// testNode is a node's agent and proxy, without pods.
type testNode struct {
	t      *testing.T
	conns  []*xds.Conn
	world  chan *mesh.World
	pods   chan []mesh.Pod
	agent  *xds.PodClient
	held   chan struct{} // if not nil, Worlds settle when it is closed
	signer *csr.Client
	leave  func()
}

func (b *bench) tokenFile(p mesh.Process) string {
	if p.Agent {
		return filepath.Join(b.tokens, "agents", p.Node)
	}
	return filepath.Join(b.tokens, "proxies", p.Node)
}

func (b *bench) dial(as mesh.Process) *xds.Conn {
	b.t.Helper()
	conn, err := xds.Dial(xds.DialConfig{Addr: b.addr, TokenFile: b.tokenFile(as), BundleFile: filepath.Join(b.dir, "bundle.pem")})
	b.must(err)
	return conn
}

func (b *bench) node(name string, held chan struct{}) *testNode {
	b.t.Helper()
	proxy, agent := b.dial(mesh.Process{Node: name}), b.dial(mesh.Process{Node: name, Agent: true})
	n := &testNode{t: b.t, conns: []*xds.Conn{proxy, agent}, world: make(chan *mesh.World, 1000), pods: make(chan []mesh.Pod, 1000), held: held}
	n.signer = csr.NewClient(proxy)
	n.agent = xds.NewPodClient(xds.ClientConfig{Conn: agent, Node: name}, func(p []mesh.Pod) { n.pods <- p })
	known := &mesh.World{}
	world := xds.NewWorldClient(xds.ClientConfig{Conn: proxy, Node: name}, func(c mesh.Changes) <-chan struct{} {
		known = known.With(c, time.Now())
		n.world <- known
		return n.held
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { world.Run(ctx) })
	running.Go(func() { n.agent.Run(ctx) })
	n.leave = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		for _, conn := range n.conns {
			conn.Close()
		}
	})
	b.t.Cleanup(n.leave)
	return n
}

func (n *testNode) report(pod string, s xds.PodState) {
	n.agent.Report(xds.Report{UID: "uid-" + pod, Namespace: "default", Name: pod, State: s})
}

const patience = 20 * time.Second

// awaitEnroll waits until the agent is told so about the pod.
func (n *testNode) awaitEnroll(pod string, want bool) {
	n.t.Helper()
	for limit := time.After(patience); ; {
		select {
		case list := <-n.pods:
			for _, p := range list {
				if p.Name == pod && p.Enroll == want {
					return
				}
			}
		case <-limit:
			n.t.Fatalf("agent was not told that %s is enrolled: %v", pod, want)
		}
	}
}

// awaitKnown waits until the agent is told that every node knows the pod at this address.
func (n *testNode) awaitKnown(pod, ip string) {
	n.t.Helper()
	for limit := time.After(patience); ; {
		select {
		case list := <-n.pods:
			if isKnown(list, pod, ip) {
				return
			}
		case <-limit:
			n.t.Fatalf("agent was not told that every node knows %s at %s", pod, ip)
		}
	}
}

func (n *testNode) neverKnown(pod, ip string) {
	n.t.Helper()
	for {
		select {
		case list := <-n.pods:
			if isKnown(list, pod, ip) {
				n.t.Fatalf("agent was told that every node knows %s at %s", pod, ip)
			}
		default:
			return
		}
	}
}

func isKnown(list []mesh.Pod, pod, ip string) bool {
	return slices.ContainsFunc(list, func(p mesh.Pod) bool {
		return p.Name == pod && slices.Contains(p.Known, netip.MustParseAddr(ip))
	})
}

// awaitDirect waits for a World in which the address is direct, or is not.
func (n *testNode) awaitDirect(ip string, want bool) {
	n.t.Helper()
	n.awaitWorkload(ip, fmt.Sprintf("direct: %v", want), func(w *mesh.Peer) bool { return w.Direct == want })
}

// awaitBetween waits for a World in which the address is enrolled, and not direct.
func (n *testNode) awaitBetween(ip string) {
	n.t.Helper()
	n.awaitWorkload(ip, "enrolled and not direct", func(w *mesh.Peer) bool { return w.Enrolled && !w.Direct })
}

// awaitWorkload waits for a World in which the workload at the address is so.
func (n *testNode) awaitWorkload(ip, what string, is func(*mesh.Peer) bool) {
	n.t.Helper()
	for limit := time.After(patience); ; {
		select {
		case w := <-n.world:
			if wl := w.Workload(netip.MustParseAddr(ip)); wl != nil && is(wl) {
				return
			}
		case <-limit:
			n.t.Fatalf("no World in which %s is %s", ip, what)
		}
	}
}

// never tells that nothing of this kind has arrived so far.
func (n *testNode) neverDirect(ip string) {
	n.t.Helper()
	for {
		select {
		case w := <-n.world:
			if wl := w.Workload(netip.MustParseAddr(ip)); wl != nil && wl.Direct {
				n.t.Fatalf("%s is direct", ip)
			}
		default:
			return
		}
	}
}

func (n *testNode) neverReleased(pod string) {
	n.t.Helper()
	for {
		select {
		case list := <-n.pods:
			for _, p := range list {
				if p.Name == pod && !p.Enroll {
					n.t.Fatalf("%s was released", pod)
				}
			}
		default:
			return
		}
	}
}

// The whole way: label, enrollment, announcement, withdrawal, acknowledgement, release.
func TestEnrollAndRelease(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("off")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	held := make(chan struct{})
	n1, n2 := b.node("n1", nil), b.node("n2", held)
	n1.awaitEnroll("server", false)
	n2.awaitDirect("10.30.1.2", false)

	began := time.Now()
	b.namespace("on")
	n1.awaitEnroll("server", true)
	enrolled := time.Since(began)
	n2.awaitBetween("10.30.1.2")
	n2.neverDirect("10.30.1.2")
	began = time.Now()
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)
	t.Logf("label to agent %v, captured to announced %v", enrolled, time.Since(began))
	n1.awaitDirect("10.30.1.2", true)

	b.namespace("off")
	n2.awaitBetween("10.30.1.2")
	n1.awaitBetween("10.30.1.2")
	n1.neverReleased("server") // n2 still has a handshake under way
	close(held)
	n1.awaitEnroll("server", false)
	n1.report("server", xds.Released)
	n2.awaitWorkload("10.30.1.2", "outside", func(w *mesh.Peer) bool { return !w.Enrolled })

	b.namespace("on")
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)
}

// A pod that begins is known by its agent's word before its object says where it is; and
// the agent hears when every node has it, also one that still acts on something older.
func TestKnownBeforeItsObjectSays(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.gone = time.Hour
	b.namespace("on")
	b.pod("server", "n1", "")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	<-n2.world // control counts with n2
	n2.leave()
	const at = "10.30.1.9"
	n1.agent.Report(xds.Report{UID: "uid-server", Namespace: "default", Name: "server", State: xds.Captured, Addresses: []netip.Addr{netip.MustParseAddr(at)}})
	n1.awaitDirect(at, true)
	n1.neverKnown("server", at)            // n2 is away
	n2 = b.node("n2", make(chan struct{})) // never settled
	n2.awaitDirect(at, true)
	n1.awaitKnown("server", at)
}

// Who has left the cluster has not to know its pods.
func TestKnownWithoutANodeThatHasLeft(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.gone = time.Hour
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.9")
	b.write("nodes.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	<-n2.world
	n2.leave()
	n1.report("server", xds.Captured)
	n1.awaitKnown("server", "10.30.1.9")
}

// A node that is gone does not hold a withdrawal up for ever.
func TestGoneNodeIsNotWaitedForLong(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.gone = 300 * time.Millisecond
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)
	n2.leave()
	b.namespace("off")
	n1.awaitEnroll("server", false)
}

// A node that somebody has named as lost is waited for neither by a withdrawal nor, after a
// restart, by the next one; once it has come back it is again.
func TestLostNodeIsNotWaitedFor(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.gone = time.Hour
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)
	n2.leave()
	b.namespace("off")
	n1.awaitBetween("10.30.1.2")
	n1.neverReleased("server")
	b.lost("n2", "once")
	n1.awaitEnroll("server", false)
	n1.report("server", xds.Released)

	again := func() {
		t.Helper()
		b.namespace("on")
		n1.awaitEnroll("server", true)
		n1.report("server", xds.Captured)
		n1.awaitDirect("10.30.1.2", true)
	}
	again()
	b.stop()
	b.namespace("off")
	b.start()
	n1.awaitEnroll("server", false)
	n1.report("server", xds.Released)

	n2 = b.node("n2", nil)
	again()
	n2.awaitDirect("10.30.1.2", true)
	n2.leave()
	b.namespace("off")
	n1.awaitBetween("10.30.1.2")
	b.pod("other", "n1", "10.30.1.3")
	n1.awaitWorkload("10.30.1.3", "known", func(*mesh.Peer) bool { return true })
	n1.neverReleased("server")
	b.lost("n2", "twice")
	n1.awaitEnroll("server", false)
}

// control that restarts withdraws nobody: not before its agents have come back,
// and not if the agent of a pod never does.
func TestRestartWithdrawsNobody(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)

	n1.leave() // its agent does not come back
	b.stop()
	b.pod("other", "n2", "10.30.2.2")
	b.start()
	w := <-n2.world
	if wl := w.Workload(netip.MustParseAddr("10.30.1.2")); wl == nil || !wl.Direct {
		t.Fatalf("after the restart the first World has %+v, want it direct", wl)
	}
	if w.Workload(netip.MustParseAddr("10.30.2.2")) == nil {
		t.Fatal("the first World is not that of the new control")
	}
}

// What an earlier control announced, its nodes may still act on: one that has not
// come back yet is waited for.
func TestRestartWaitsForNodesOfThePast(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.gone = time.Second
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n1.report("server", xds.Captured)
	n2.awaitDirect("10.30.1.2", true)
	n2.leave()
	b.stop()
	b.namespace("off")
	began := time.Now()
	b.start()
	n1.awaitEnroll("server", false)
	if took := time.Since(began); took < b.gone {
		t.Errorf("released after %v, want not before %v: n2 may still dial by direct", took, b.gone)
	}
}

func TestUnknownTokenIsRefused(t *testing.T) {
	b := newBench(t, "n1")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	stranger := filepath.Join(t.TempDir(), "token")
	b.must(os.WriteFile(stranger, []byte("n1-0123456789abcdeX"), 0o600))
	conn, err := xds.Dial(xds.DialConfig{Addr: b.addr, TokenFile: stranger, BundleFile: filepath.Join(b.dir, "bundle.pem")})
	b.must(err)
	defer conn.Close()
	n := &testNode{t: t, signer: csr.NewClient(conn)}
	n1 := b.node("n1", nil)
	n1.awaitEnroll("server", true)
	if _, err := n.sign(labID("server")); err == nil || !strings.Contains(err.Error(), "proves no node") {
		t.Errorf("error %v, want that the token proves no node", err)
	}
}

// An agent is heard about pods of its own node only.
func TestForeignReportIsNotHeard(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.pod("client", "n2", "10.30.2.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n2.awaitEnroll("client", true)
	n2.report("server", xds.Captured) // a lie
	n2.report("client", xds.Captured)
	for limit := time.After(patience); ; {
		select {
		case w := <-n2.world:
			if w.Workload(netip.MustParseAddr("10.30.1.2")).Direct {
				t.Fatal("server is announced on the word of another node")
			}
			if w.Workload(netip.MustParseAddr("10.30.2.2")).Direct {
				return
			}
		case <-limit:
			t.Fatal("client was not announced")
		}
	}
}

func TestOneProcessPerFolder(t *testing.T) {
	s := folder(t)
	if _, err := OpenStorageFolder(s.String()); err == nil || !strings.Contains(err.Error(), "another tacit-control") {
		t.Errorf("error %v, want that another one uses it", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := OpenStorageFolder(s.String())
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestNewRefuses(t *testing.T) {
	_, err := New(Config{LeafTTL: -1, Admin: "x"})
	for _, text := range []string{"source", "storage", "nodes prove", "trust domain", "listen address", "admin address", "negative"} {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("error %v, want also %q", err, text)
		}
	}
}

func TestBrokenMemoryIsNotForgotten(t *testing.T) {
	for _, content := range []string{"", "{", `[{"uid":"a","state":"enrolling"}]`, `[{"uid":"a","state":"else"}]`} {
		storage := folder(t)
		if err := storage.Save(3, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if list, err := (&store{storage: storage}).load(); err == nil {
			t.Errorf("%q: read as %v, want an error", content, list)
		}
	}
}

func folder(t *testing.T) *StorageFolder {
	t.Helper()
	s, err := OpenStorageFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (b *bench) nodes() Nodes {
	b.t.Helper()
	n, err := OpenTokens(b.tokens, nil)
	b.must(err)
	return n
}

func (b *bench) storage() Storage {
	b.t.Helper()
	s, err := OpenStorageFolder(b.dir)
	b.must(err)
	return s
}
