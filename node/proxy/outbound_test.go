package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func TestSameNodeAndHairpin(t *testing.T) {
	c := newCluster(t)
	a, b := c.pod("a"), c.pod("b")
	n := c.node(nil)
	svc := c.service("self", 8080, a)
	n.enroll(a)
	n.enroll(b)
	a.serve(8080, echo)
	both(t, func(t *testing.T, v6 bool) {
		say(t, mustDial(t, b, a.at(v6, 8080)), "from the same node")
		say(t, mustDial(t, a, a.at(v6, 8080)), "to itself")
		vip := svc.Addresses[0]
		if v6 {
			vip = svc.Addresses[1]
		}
		say(t, mustDial(t, a, netip.AddrPortFrom(vip, 80)), "to its own service")
		say(t, mustDial(t, b, netip.AddrPortFrom(vip, 80)), "to a service")
	})
}

func TestServiceTriesTheNextEndpoint(t *testing.T) {
	c := newCluster(t)
	client := c.pod("client")
	var servers []*testPod
	for i := range 3 {
		servers = append(servers, c.pod(fmt.Sprintf("server%d", i)))
	}
	svc := c.service("svc", 8080, servers...)
	n1, n2 := c.node(nil), c.node(nil)
	n1.enroll(client)
	for _, s := range servers {
		n2.enroll(s)
	}
	// The first refuses, the other two serve: the second speaks only when spoken to.
	var apps []*app
	for _, s := range servers[1:] {
		apps = append(apps, s.serve(8080, echo))
	}
	const rounds = 60
	for i := range rounds {
		c := mustDial(t, client, netip.AddrPortFrom(svc.Addresses[i%2], 80))
		say(t, c, fmt.Sprintf("request %d, sent before anybody answered", i))
		c.Close()
	}
	for i, a := range apps {
		if n := len(a.seen); n < rounds/6 {
			t.Errorf("endpoint %d got %d of %d: want about half", i+1, n, rounds)
		}
	}
	if n1.count("tacit_endpoint_retries_total") == 0 {
		t.Error("nothing was tried again")
	}
	if n := n1.count("tacit_refused_connections_total"); n != 0 {
		t.Errorf("%v refused: want none", n)
	}
}

func TestServiceWithoutEndpointIsReset(t *testing.T) {
	c, client, _ := pair(t)
	svc := c.service("empty", 80)
	c.publish()
	if err := firstRead(client.dial(netip.AddrPortFrom(svc.Addresses[0], 80))); !isRST(err) {
		t.Errorf("read: %v, want a reset", err)
	}
	await(t, "it is counted", func() bool {
		return c.nodes[0].count("tacit_refused_connections_total", "reason=no_endpoint") == 1
	})
}

func TestOutsideTheMesh(t *testing.T) {
	c, client, server := pair(t)
	stranger := c.pod("stranger")
	c.publish()
	server.serve(8080, echo)
	app := stranger.serve(8080, echo)
	both(t, func(t *testing.T, v6 bool) {
		say(t, mustDial(t, client, stranger.at(v6, 8080)), "out")
		if from := <-app.seen; from.Addr() != client.addr(v6) {
			t.Errorf("the stranger saw %s: want %s", from, client.addr(v6))
		}
		say(t, mustDial(t, stranger, server.at(v6, 8080)), "in")
	})
	for i, d := range []string{"outbound", "inbound"} {
		if n := c.nodes[i].count("tacit_connections_total", "direction="+d, "kind=plaintext"); n != 2 {
			t.Errorf("%v %s in plaintext: want 2", n, d)
		}
	}
}

// What passes through stays in the kernel, which moves it by a pipe.
func TestPassThroughIsSpliced(t *testing.T) {
	c, client, server := pair(t)
	stranger := c.pod("stranger")
	c.publish()
	for _, to := range []*testPod{stranger, server} {
		to.serve(8080, func(c *net.TCPConn) { // not echo: io.Copy has pipes of its own
			b := make([]byte, 5)
			io.ReadFull(c, b)
			c.Write(b)
		})
	}
	for _, way := range []struct{ from, to *testPod }{{client, stranger}, {stranger, server}} {
		before := pipes(t)
		say(t, mustDial(t, way.from, way.to.at(false, 8080)), "hello")
		isNew := func(pipe string) bool { return !slices.Contains(before, pipe) }
		if !slices.ContainsFunc(pipes(t), isNew) {
			t.Errorf("from %s to %s: no pipe was made", way.from.name, way.to.name)
		}
	}
}

// pipes are those that this process has open.
func pipes(t *testing.T) (all []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if to, err := os.Readlink(file); err == nil && strings.HasPrefix(to, "pipe:") {
			all = append(all, to)
		}
	}
	return all
}

// Only the pod's own listener for what comes from the network is special: nothing else can
// listen there. The other one has a loopback address.
func TestCapturePortsAreRefused(t *testing.T) {
	c, client, server := pair(t)
	both(t, func(t *testing.T, v6 bool) {
		if err := firstRead(client.dial(server.at(v6, mesh.InboundPort))); !isRST(err) {
			t.Errorf("%v, want a reset", err)
		}
		if err := firstRead(client.bare(0, server.at(v6, mesh.InboundPort))); !isRST(err) {
			t.Errorf("from the network: %v, want a reset", err)
		}
		var l net.Listener
		server.space.do(t, func() (err error) {
			l, err = net.Listen("tcp", server.at(v6, mesh.OutboundPort).String())
			return err
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if conn, err := l.Accept(); err == nil {
				conn.Write([]byte("mine"))
				conn.Close()
			}
		})
		conn, err := client.dial(server.at(v6, mesh.OutboundPort))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(conn); string(b) != "mine" {
			t.Errorf("a server of the pod's own on port %d: %q, %v", mesh.OutboundPort, b, err)
		}
		conn.Close()
		l.Close()
		wg.Wait()
	})
	if n := c.nodes[1].count("tacit_refused_connections_total", "direction=inbound", "reason=capture_port"); n != 4 {
		t.Errorf("%v refused inbound: want 4", n)
	}
}

// Where all ports are taken that hint at TLS, a pod dials from another one, and only if the
// receiver waits for TLS from it whatever the port. Else the application there could speak
// first, in clear.
func TestPortsThatDoNotHintAtTLS(t *testing.T) {
	needDescriptors(t, 8000)
	c, client, server := pair(t)
	server.serve(8080, echo)
	client.space.do(t, func() error {
		for port := mesh.DirectPortFirst; port <= mesh.DirectPortLast; port++ {
			l, err := net.Listen("tcp4", netip.AddrPortFrom(client.v4, uint16(port)).String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
		}
		return nil
	})
	say(t, mustDial(t, client, server.at(false, 8080)), "the receiver waits for TLS")
	if c.nodes[1].count("tacit_connections_total", "kind=mutual_tls") != 1 {
		t.Error("it was not by TLS")
	}
	for _, row := range []struct {
		name   string
		change func()
	}{
		{"may exclude the server", func() {
			client.wl.ExcludeOutbound = []mesh.Exclusion{{Prefix: netip.PrefixFrom(server.v4, 32)}}
		}},
		{"not announced", func() { client.wl.Direct, client.wl.Enrolled, client.wl.ExcludeOutbound = false, true, nil }},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.change()
			c.publish()
			for _, conn := range c.nodes[0].proxy.pod(client.name).ready() {
				conn.born = time.Time{} // none that is kept is used
			}
			before := c.nodes[0].count("tacit_refused_connections_total", "reason="+reasonSourcePort)
			if err := firstRead(client.dial(server.at(false, 8080))); !isRST(err) {
				t.Errorf("%v: want a reset", err)
			}
			if n := c.nodes[0].count("tacit_refused_connections_total", "reason="+reasonSourcePort); n != before+1 {
				t.Errorf("%v refused for want of a port: want %v", n, before+1)
			}
		})
	}
}

// A destination that is announced and speaks no TLS is not spoken to in plaintext.
func TestDirectIsNeverDialledInPlaintext(t *testing.T) {
	c, client, _ := pair(t)
	liar := c.pod("liar")
	liar.wl.Direct = true
	c.publish()
	got := make(chan []byte, 10)
	liar.serve(8080, func(c *net.TCPConn) {
		b := make([]byte, 64)
		n, _ := c.Read(b)
		got <- b[:n]
		c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	})
	conn, err := client.dial(liar.at(false, 8080))
	if err == nil {
		_, err = conn.Write([]byte("secret")) // a reset is told once: here, if it is there already
	}
	if err := firstRead(conn, err); !isRST(err) {
		t.Errorf("%v: want a reset", err)
	}
	if b := <-got; bytes.Contains(b, []byte("secret")) || b[0] != 22 {
		t.Errorf("the wire saw %q", b)
	}
	await(t, "it is counted", func() bool {
		return c.nodes[0].count("tacit_refused_connections_total", "reason=not_tls") == 1
	})
}

func TestMissingCertificateIsNamed(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	c.ca.refuse[client.wl.ID] = true
	n1, n2 := c.node(func(cfg *Config) { cfg.ReadyTimeout = 10 * time.Millisecond }), c.node(nil)
	n2.enroll(server)
	server.serve(8080, echo)
	client.listen()
	c.publish()
	n1.agent.add(client)
	if m := n1.agent.expect(t, "failed", "client"); m.Reason == "" {
		t.Error("no reason")
	}
	client.capture("capture.nft")
	if err := firstRead(client.dial(server.at(false, 8080))); !isRST(err) {
		t.Errorf("read: %v, want a reset", err)
	}
	if n := n1.count("tacit_refused_connections_total", "direction=outbound", "reason=own_no_certificate"); n != 1 {
		t.Errorf("%v counted: want 1", n)
	}
	c.ca.mu.Lock()
	c.ca.refuse[client.wl.ID] = false
	c.ca.mu.Unlock()
	n1.agent.expect(t, "ready", "client")
	say(t, mustDial(t, client, server.at(false, 8080)), "hello")
}

func TestDeadAddressTimesOut(t *testing.T) {
	c := newCluster(t)
	client := c.pod("client")
	n := c.node(func(cfg *Config) { cfg.DialTimeout = 200 * time.Millisecond })
	n.enroll(client)
	c.hub.do(t, func() error { return sh("ip neigh add 10.77.9.9 lladdr 02:00:00:00:00:09 dev br0") })
	client.space.do(t, func() error { return sh("ip neigh add 10.77.9.9 lladdr 02:00:00:00:00:09 dev eth0") })
	start := time.Now()
	if err := firstRead(client.dial(netip.MustParseAddrPort("10.77.9.9:80"))); !isRST(err) {
		t.Errorf("%v: want a reset", err)
	}
	if d := time.Since(start); d < 150*time.Millisecond || d > 2*time.Second {
		t.Errorf("after %v: want 200ms", d)
	}
	await(t, "it is counted", func() bool {
		return n.count("tacit_refused_connections_total", "reason=timeout") == 1
	})
}

// A pod that begins at an address while somebody dials that as if it were outside of the
// mesh is spoken to by direct.
func TestBegunWhileItIsDialled(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n2 := c.node(nil)
	n2.enroll(server)
	server.serve(8080, echo)
	all := c.pods
	c.pods = []*testPod{client}
	n1 := c.node(nil)
	n1.enroll(client)
	server.space.do(t, func() error {
		return sh("nft 'table ip late { chain c { type filter hook prerouting priority -500; tcp flags syn / syn,ack drop; }; }'")
	})
	conn := mustDial(t, client, server.at(false, 8080))
	await(t, "the proxy dials", func() (dials bool) {
		client.space.do(t, func() error { dials = sh("ss -Htn state syn-sent | grep .") == nil; return nil })
		return dials
	})
	c.pods = all
	c.publish()
	server.space.do(t, func() error { return sh("nft delete table ip late") })
	say(t, conn, "hello")
	await(t, "it is counted", func() bool { return n1.count("tacit_connections_total", "direction=outbound", "kind=mutual_tls") == 1 })
}

// A pod has an address in a second network: it is reached there by TLS, from the client's own
// address there, for the network may know no other.
func TestFurtherAddressOfAPod(t *testing.T) {
	c, client, server := pair(t)
	further := map[*testPod][]netip.Addr{
		client: {netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd99::1")},
		server: {netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("fd99::2")},
	}
	for p, at := range further {
		p.space.do(t, func() error {
			return sh(fmt.Sprintf("ip addr add %s/24 dev eth0; ip addr add %s/64 dev eth0 nodad", at[0], at[1]))
		})
		p.wl.Addresses = append(p.wl.Addresses, at...)
	}
	c.publish()
	app := server.serve(8080, echo)
	for i, at := range further[server] {
		say(t, mustDial(t, client, netip.AddrPortFrom(at, 8080)), "in the second network")
		if from := <-app.seen; from.Addr() != further[client][i] {
			t.Errorf("the server saw %s: want %s", from, further[client][i])
		}
	}
	for _, n := range c.nodes {
		if n := n.count("tacit_connections_total", "kind=mutual_tls"); n != 2 {
			t.Errorf("%v by TLS: want 2", n)
		}
	}
}
