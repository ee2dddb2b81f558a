package proxy

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/wire/handle"
)

// keeps is how many connections the proxies of c keep: the nodes have one pod each.
func (c *cluster) keeps() float64 {
	sum := 0.0
	for _, n := range c.nodes {
		sum += n.count("tacit_kept_connections")
	}
	return sum
}

// used is how many connections of applications went over one that was kept.
func (c *cluster) used(n int) int {
	reporter := map[int]string{0: "source", 1: "destination"}[n]
	count := 0
	for line := range strings.Lines(c.log.text()) {
		if strings.Contains(line, "reporter="+reporter) && strings.Contains(line, "kept=true") {
			count++
		}
	}
	return count
}

// askKept is askOnce, and waits until both proxies keep the connection.
func askKept(t *testing.T, c *cluster, p *testPod, to netip.AddrPort) {
	t.Helper()
	if err := askOnce(p, to); err != nil {
		t.Fatal(err)
	}
	await(t, "both sides keep a connection", func() bool { return c.keeps() == 2 })
	await(t, "the client has it ready", func() bool { return len(p.node.proxy.pod(p.name).ready()) == 1 })
}

func (d *pod) ready() (all []*peerConn) {
	d.idle.mu.Lock()
	defer d.idle.mu.Unlock()
	for _, idle := range d.idle.idle {
		all = append(all, idle...)
	}
	return all
}

func TestKeptConnectionCarriesTheNext(t *testing.T) {
	c, client, server := pair(t)
	app := server.serve(1, echo)
	for range 5 {
		askKept(t, c, client, server.at(false, 1))
		if from := <-app.seen; from.Addr() != client.v4 {
			t.Errorf("the application saw %s: want the client's own %s", from, client.v4)
		}
	}
	for i := range c.nodes {
		await(t, "four of five went over a kept connection", func() bool { return c.used(i) == 4 })
	}
	if n := c.nodes[1].count("tacit_connections_total", "direction=inbound", "kind=mutual_tls"); n != 5 {
		t.Errorf("%v connections counted: want 5", n)
	}
}

// Another port, another family: another destination.
func TestKeptConnectionLeadsToOneDestination(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	other := server.serve(2, echo)
	askKept(t, c, client, server.at(false, 1))
	for _, to := range []netip.AddrPort{server.at(false, 2), server.at(true, 1)} {
		if err := askOnce(client, to); err != nil {
			t.Error(err)
		}
	}
	if n := c.used(0); n != 0 {
		t.Errorf("%d went over the kept one", n)
	}
	if len(other.seen) != 1 {
		t.Errorf("the other port had %d connections: want 1", len(other.seen))
	}
}

// The server ends its direction first and takes its time with what the client has said. By
// then the connection is over for the client, its pod too, and all of it still arrives.
func TestWhatAFinishedConnectionHasSaidArrives(t *testing.T) {
	ends := map[string]func(client *testPod){
		"kept no longer": func(client *testPod) {
			d := client.node.proxy.pod(client.name)
			d.idle.tick(time.Now().Add(keepIdle))
			d.idle.tick(time.Now().Add(keepIdle + keepTick))
		},
		"removed":     func(client *testPod) { client.node.agent.send(handle.Remove, client.name) },
		"proxy stops": func(client *testPod) { client.node.stop() },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			c, client, server := pair(t)
			client.buffers(4 << 20)
			server.buffers(16 << 10)
			read := make(chan struct{})
			said := make(chan error, 1)
			letRead := sync.OnceFunc(func() { close(read) })
			t.Cleanup(letRead)
			const size = unsentMost / 2 // what the client's proxy can leave to its socket
			server.serve(1, func(c *net.TCPConn) {
				c.CloseWrite()
				<-read
				n, err := io.Copy(io.Discard, c)
				if err == nil && n != size {
					err = io.ErrShortWrite
				}
				said <- err
			})
			conn := mustDial(t, client, server.at(false, 1))
			if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("read %d, %v: want the end", n, err)
			}
			if _, err := conn.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			await(t, "the client's proxy has all of it", func() bool {
				return strings.Contains(c.log.text(), "reporter=source")
			})
			end(client)
			letRead()
			if err := <-said; err != nil {
				t.Errorf("the application: %v, want all %d bytes and the end", err, size)
			}
		})
	}
}

// What is on the way may forget a connection and tell nobody. Then the client dials.
func TestKeptConnectionThatIsForgottenOnTheWay(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	lost := client.node.proxy.pod(client.name).ready()[0]
	c.hub.do(t, func() error {
		return sh(fmt.Sprintf("nft 'table bridge lossy { chain forward { type filter hook forward priority 0; tcp sport %d drop; tcp dport %[1]d drop; }; }'",
			lost.Raw().LocalAddr().(*net.TCPAddr).Port))
	})
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Error(err)
	}
	if n := c.used(0); n != 0 {
		t.Errorf("%d went over the kept connection", n)
	}
}

// A bound on what was carried before is none on what comes next.
func TestKeptConnectionForgetsBounds(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	d := server.node.proxy.pod(server.name)
	await(t, "the server waits for the next one", d.idle.isAwaiting)
	d.idle.mu.Lock()
	for pc := range d.idle.waiting {
		pc.SetWriteDeadline(time.Unix(1, 0))
	}
	d.idle.mu.Unlock()
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Error(err)
	}
	await(t, "it went over the kept connection", func() bool { return c.used(0) == 1 })
}

// Half of a connection takes no place of those that are kept.
func TestHalfClosedIsNotKept(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	server.serve(2, func(c *net.TCPConn) { io.Copy(io.Discard, c); c.Write([]byte("x")); <-t.Context().Done() })
	conn := mustDial(t, client, server.at(false, 2))
	conn.CloseWrite()
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if n := c.keeps(); n != 0 {
		t.Errorf("%v are kept: want none", n)
	}
}

// A server that speaks first and a client that ends without a word, over a kept connection.
func TestKeptConnectionKnowsNoClientFirst(t *testing.T) {
	c, client, server := pair(t)
	server.serve(25, func(c *net.TCPConn) { c.Write([]byte("220 hello")); c.CloseWrite(); io.Copy(io.Discard, c) })
	for i := range 3 {
		conn := mustDial(t, client, server.at(false, 25))
		b, err := io.ReadAll(conn)
		if err != nil || string(b) != "220 hello" {
			t.Errorf("read %q, %v", b, err)
		}
		conn.Close()
		await(t, "it is kept", func() bool {
			return c.keeps() == 2 && c.used(0) == i && len(client.node.proxy.pod(client.name).ready()) == 1
		})
	}
}

// A reset ends the connection that carried it, and none after it.
func TestResetOverAKeptConnection(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, func(c *net.TCPConn) {
		b := make([]byte, 1)
		if io.ReadFull(c, b); b[0] == 'r' {
			c.SetLinger(0)
			return
		}
		c.Write(b)
		io.Copy(c, c)
	})
	askKept(t, c, client, server.at(false, 1))
	conn := mustDial(t, client, server.at(false, 1))
	conn.Write([]byte("r"))
	if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
		t.Errorf("read: %v, want a reset", err)
	}
	await(t, "it is kept no longer", func() bool { return c.keeps() == 0 })
	await(t, "it went over the kept connection", func() bool { return c.used(0) == 1 })
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Error(err)
	}
}

func TestClosedPortIsResetOverAKeptConnection(t *testing.T) {
	c, client, server := pair(t)
	app := server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	app.l.Close()
	if err := firstRead(client.dial(server.at(false, 1))); !isRST(err) {
		t.Errorf("%v: want a reset", err)
	}
	await(t, "the refusal is counted", func() bool { return c.nodes[1].count("tacit_refused_connections_total") == 1 })
	await(t, "it is kept no longer", func() bool { return c.keeps() == 0 })
}

// renewed gives other leaves than a moment ago, of the same identity.
type renewed struct {
	Leaves
	now atomic.Pointer[identity.Leaf]
}

func (r *renewed) Leaf(id mesh.ID) (*identity.Leaf, error) {
	if leaf := r.now.Load(); leaf != nil {
		return leaf, nil
	}
	return r.Leaves.Leaf(id)
}

// renew has everybody use another leaf from now on.
func (r *renewed) renew(t *testing.T, id mesh.ID) {
	leaf, err := r.Leaves.Leaf(id)
	if err != nil {
		t.Fatal(err)
	}
	again := *leaf
	r.now.Store(&again)
}

// A renewed certificate is used by the next connection. That of the server does so
// after the client has said its first bytes: they arrive once.
func TestKeptConnectionEndsWithTheCertificate(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			c := newCluster(t)
			client, server := c.pod("client"), c.pod("server")
			leaves := map[string]*renewed{"client": {}, "server": {}}
			with := func(name string) func(*Config) {
				return func(cfg *Config) { leaves[name].Leaves = cfg.Leaves; cfg.Leaves = leaves[name] }
			}
			c.node(with("client")).enroll(client)
			c.node(with("server")).enroll(server)
			app := server.serve(1, echo)
			askKept(t, c, client, server.at(false, 1))
			leaves[side].renew(t, idOf(side))
			if err := askOnce(client, server.at(false, 1)); err != nil {
				t.Error(err)
			}
			if n := len(app.seen); n != 2 {
				t.Errorf("the application saw %d connections: want 2", n)
			}
			await(t, "the second one is told of", func() bool { return strings.Count(c.log.text(), "reporter=source") == 2 })
			if n := c.used(0); n != 0 {
				t.Errorf("%d went over the kept one", n)
			}
		})
	}
}

func TestKeptConnectionGetsOld(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	d := client.node.proxy.pod(client.name)
	l := d.ready()[0]
	d.idle.mu.Lock()
	l.born = time.Now().Add(-keepAge)
	d.idle.mu.Unlock()
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Error(err)
	}
	await(t, "the second one is told of", func() bool { return strings.Count(c.log.text(), "reporter=source") == 2 })
	if n := c.used(0); n != 0 {
		t.Errorf("%d went over the old one", n)
	}
}

func TestIdleConnectionIsKeptForAWhile(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	d := client.node.proxy.pod(client.name)
	d.idle.tick(d.ready()[0].since.Add(keepIdle - time.Second))
	if len(d.ready()) != 1 {
		t.Error("left too early")
	}
	d.idle.tick(time.Now().Add(keepIdle))
	await(t, "both proxies have closed it", func() bool { return c.keeps() == 0 })
}

// While a handshake is under way, others dial too: what goes over a kept connection
// would overtake it.
func TestKeptConnectionOvertakesNoHandshake(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	d := client.node.proxy.pod(client.name)
	l := d.ready()[0]
	done := d.idle.handshakes(l.to)
	if got := d.idle.take(l.to, l.leaf); got != nil {
		t.Error("taken while a handshake was under way")
	}
	done()
	got := d.idle.take(l.to, l.leaf)
	if got != l {
		t.Fatal("not taken when it was over")
	}
	d.idle.put(got)
}

func TestKeptConnectionsAreBounded(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	p := client.node.proxy
	full := &p.pod(client.name).keeps
	full.open.Store(keepMostOf)
	for range 3 {
		if err := askOnce(client, server.at(false, 1)); err != nil {
			t.Error(err)
		}
	}
	await(t, "all is over", func() bool { return c.nodes[1].count("tacit_connections_open") == 0 })
	if n := len(p.pod(client.name).ready()); n != 0 || full.open.Load() != keepMostOf {
		t.Errorf("%d kept, and %d counted: want none, and %d", n, full.open.Load(), keepMostOf)
	}
	await(t, "the server keeps none that the client has not kept", func() bool { return c.keeps() == 0 })
}

// Who yields its listeners keeps nothing: the next connection is the other proxy's.
func TestYieldKeepsNothing(t *testing.T) {
	for _, side := range []int{0, 1} {
		c, client, server := pair(t)
		app := server.serve(1, echo)
		askKept(t, c, client, server.at(false, 1))
		p := []*testPod{client, server}[side]
		p.node.agent.send(handle.Yield, p.name)
		await(t, "nothing is kept", func() bool { return c.keeps() == 0 })
		p.node.agent.add(p) // in the other proxy's place
		if err := askOnce(client, server.at(false, 1)); err != nil {
			t.Error(err)
		}
		if n := len(app.seen); n != 2 {
			t.Errorf("the application saw %d connections: want 2", n)
		}
	}
}

// A pod is released when nothing is kept any more: its rules translate the packets of
// what it has accepted. Enrolled again, it keeps again.
func TestDrainEndsWhatIsKept(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	n := server.node
	server.capture("drain.nft")
	n.agent.send(handle.Drain, server.name)
	n.agent.expect(t, handle.Drained, server.name)
	if kept := n.count("tacit_kept_connections"); kept != 0 {
		t.Errorf("drained, and %v kept", kept)
	}
	n.agent.add(server)
	n.agent.expect(t, handle.Ready, server.name)
	server.capture("capture.nft")
	await(t, "the client keeps nothing", func() bool { return c.keeps() == 0 })
	for range 2 {
		askKept(t, c, client, server.at(false, 1))
	}
	await(t, "the last one went over a kept connection", func() bool { return c.used(0) == 1 })
}

func TestRemovedPodKeepsNothing(t *testing.T) {
	for _, side := range []int{0, 1} {
		c, client, server := pair(t)
		server.serve(1, echo)
		askKept(t, c, client, server.at(false, 1))
		p := []*testPod{client, server}[side]
		p.node.agent.send(handle.Remove, p.name)
		await(t, "nothing is kept", func() bool { return p.node.count("tacit_kept_connections") == 0 })
		other := c.nodes[1-side]
		if side == 1 { // the client looks when it needs it
			d := client.node.proxy.pod(client.name)
			d.idle.tick(time.Now().Add(keepIdle))
		}
		await(t, "the other side has noticed", func() bool { return other.count("tacit_kept_connections") == 0 })
	}
}

// A proxy that is killed takes nothing with it that its peer has kept.
func TestKeptConnectionToAProxyThatIsGone(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	n := server.node
	n.stop()
	n.agent.stop()
	again := c.node(nil)
	again.proxy.Apply(c.told())
	again.agent.add(server)
	again.agent.expect(t, handle.Ready, server.name)
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Error(err)
	}
	if n := c.used(0); n != 0 {
		t.Errorf("%d went over a connection to the proxy that is gone", n)
	}
}

// A peer that is gone without a word is found out: the end that dialled asks, and the
// one that accepted.
func TestProxiesKeepAlive(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	askKept(t, c, client, server.at(false, 1))
	ends := client.node.proxy.pod(client.name).ready()
	d := server.node.proxy.pod(server.name)
	await(t, "the server waits for the next one", d.idle.isAwaiting)
	d.idle.mu.Lock()
	ends = slices.AppendSeq(ends, maps.Keys(d.idle.waiting))
	d.idle.mu.Unlock()
	for _, end := range ends {
		raw, err := end.Raw().SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 || err != nil {
				t.Errorf("from %s to %s: SO_KEEPALIVE is %d, %v", end.Raw().LocalAddr(), end.Raw().RemoteAddr(), on, err)
			}
		})
	}
	if len(ends) != 2 {
		t.Errorf("looked at %d ends: want 2", len(ends))
	}
}
