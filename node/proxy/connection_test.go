package proxy

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

// pair is a client and a server on two nodes, both in the mesh.
func pair(t testing.TB) (c *cluster, client, server *testPod) {
	c = newCluster(t)
	client, server = c.pod("client"), c.pod("server")
	n1, n2 := c.node(nil), c.node(nil)
	n1.enrol(client)
	n2.enrol(server)
	return c, client, server
}

func both(t *testing.T, f func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6], func(t *testing.T) { f(t, v6) })
	}
}

func echo(c *net.TCPConn) { io.Copy(c, c); c.CloseWrite() }

// firstRead is the error of dialling, or else of the first read. A reset may
// come so soon that the dial has it already.
func firstRead(c *net.TCPConn, err error) error {
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Read(make([]byte, 1))
	return err
}

// say sends and expects the same back.
func say(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatalf("write: %v", err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q, %v: want %q", b, err, text)
	}
}

func mustDial(t testing.TB, p *testPod, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := p.dial(to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTwoPodsSpeakMutualTLS(t *testing.T) {
	c, client, server := pair(t)
	app := server.serve(8080, echo)
	both(t, func(t *testing.T, v6 bool) {
		conn := mustDial(t, client, server.at(v6, 8080))
		say(t, conn, "hello")
		if from := <-app.seen; from.Addr() != client.addr(v6) {
			t.Errorf("the application saw %s: want the client's own %s", from, client.addr(v6))
		}
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
			t.Errorf("after FIN: %q, %v", b, err)
		}
	})
	for i, d := range []string{"outbound", "inbound"} {
		await(t, d+" connections ended", func() bool {
			return c.nodes[i].count("tacit_connections_open", "direction="+d) == 0
		})
		if n := c.nodes[i].count("tacit_connections_total", "direction="+d, "kind=mutual_tls"); n != 2 {
			t.Errorf("%v %s connections with mutual TLS: want 2", n, d)
		}
	}
}

// Both nodes tell of a connection once, at its end, with the bytes of each direction.
func TestConnectionsAreToldOfOnce(t *testing.T) {
	c, client, server := pair(t)
	const many, question, answer = 3, 5, 1000
	server.serve(8080, func(c *net.TCPConn) {
		io.Copy(io.Discard, c)
		c.Write(make([]byte, answer))
	})
	for range many {
		conn := mustDial(t, client, server.at(false, 8080))
		conn.Write(make([]byte, question))
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || len(b) != answer {
			t.Errorf("%d bytes, %v: want %d", len(b), err, answer)
		}
	}
	for i, reporter := range []string{"source", "destination"} {
		n := c.nodes[i]
		await(t, "they have ended at the "+reporter, func() bool { return n.count("tacit_connections_open") == 0 })
		n.stop() // it tells of nothing any more
		for name, want := range map[string]float64{
			"istio_tcp_connections_opened_total": many,
			"istio_tcp_connections_closed_total": many,
			"istio_tcp_received_bytes_total":     many * question,
			"istio_tcp_sent_bytes_total":         many * answer,
		} {
			if got := n.count(name, "reporter="+reporter); got != want {
				t.Errorf("%s of the %s is %v: want %v", name, reporter, got, want)
			}
		}
		if lines := strings.Count(c.log.text(), `"connection closed" reporter=`+reporter); lines != many {
			t.Errorf("%d lines of the %s: want %d", lines, reporter, many)
		}
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

func TestServerSpeaksFirst(t *testing.T) {
	_, client, server := pair(t)
	server.serve(25, func(c *net.TCPConn) { c.Write([]byte("220 hello")) })
	both(t, func(t *testing.T, v6 bool) {
		b, err := io.ReadAll(mustDial(t, client, server.at(v6, 25)))
		if err != nil || string(b) != "220 hello" {
			t.Errorf("read %q, %v", b, err)
		}
	})
}

func TestHalfCloseThenDataTheOtherWay(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, func(c *net.TCPConn) { // the client ends first
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "got %d", len(b))
	})
	got := make(chan string, 2)
	server.serve(2, func(c *net.TCPConn) { // the server ends first
		c.CloseWrite()
		b, err := io.ReadAll(c)
		got <- fmt.Sprintf("%s %v", b, err)
	})
	both(t, func(t *testing.T, v6 bool) {
		c := mustDial(t, client, server.at(v6, 1))
		c.Write(make([]byte, 100_000))
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "got 100000" {
			t.Errorf("client half-closed: %q, %v", b, err)
		}
		c = mustDial(t, client, server.at(v6, 2))
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Errorf("server half-closed: %q, %v", b, err)
		}
		c.Write([]byte("still here"))
		c.Close()
		if s := <-got; s != "still here <nil>" {
			t.Errorf("server got %q", s)
		}
	})
}

func TestResetIsReset(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, func(c *net.TCPConn) { io.ReadFull(c, make([]byte, 1)); c.SetLinger(0) })
	arrived, got := make(chan struct{}, 2), make(chan error, 2)
	server.serve(2, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		arrived <- struct{}{}
		_, err := c.Read(make([]byte, 1))
		got <- err
	})
	both(t, func(t *testing.T, v6 bool) {
		conn := mustDial(t, client, server.at(v6, 1))
		conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
			t.Errorf("server reset, client read %v", err)
		}
		conn = mustDial(t, client, server.at(v6, 2))
		conn.Write([]byte("x"))
		conn.SetLinger(0)
		<-arrived
		conn.Close()
		if err := <-got; !isRST(err) {
			t.Errorf("client reset, server read %v", err)
		}
	})
}

func TestClosedPortIsReset(t *testing.T) {
	c, client, server := pair(t)
	both(t, func(t *testing.T, v6 bool) {
		quickest := time.Hour // a busy machine can delay one, but not each time
		for range 3 {
			start := time.Now()
			if err := firstRead(client.dial(server.at(v6, 9))); !isRST(err) {
				t.Error(err)
			}
			quickest = min(quickest, time.Since(start))
		}
		if quickest > time.Second {
			t.Errorf("after %v at best", quickest)
		}
	})
	for i, d := range []string{"outbound", "inbound"} {
		await(t, "all six are counted as refused "+d, func() bool {
			return c.nodes[i].count("tacit_refused_connections_total", "direction="+d, "reason=connection_refused") == 6
		})
	}
}

func TestBulkBothWaysAtOnce(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, echo)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	both(t, func(t *testing.T, v6 bool) {
		c := mustDial(t, client, server.at(v6, 1))
		var wg sync.WaitGroup
		wg.Go(func() { c.Write(data); c.CloseWrite() })
		b, err := io.ReadAll(c)
		wg.Wait()
		if err != nil || !bytes.Equal(b, data) {
			t.Errorf("%d bytes, %v: want %d", len(b), err, len(data))
		}
	})
}

func TestSameNodeAndHairpin(t *testing.T) {
	c := newCluster(t)
	a, b := c.pod("a"), c.pod("b")
	n := c.node(nil)
	svc := c.service("self", 8080, a)
	n.enrol(a)
	n.enrol(b)
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
	n1.enrol(client)
	for _, s := range servers {
		n2.enrol(s)
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

func TestServerFirstFromOutsideDoesNotWait(t *testing.T) {
	c, _, server := pair(t)
	stranger := c.pod("stranger")
	c.publish()
	server.serve(25, func(c *net.TCPConn) { c.Write([]byte("220")) })
	// To look takes 200 ms at least, each time; a busy machine can take as long, but not
	// always.
	quickest := time.Hour
	for range 10 {
		conn := mustDial(t, stranger, server.at(false, 25))
		start := time.Now()
		if b, err := io.ReadAll(conn); err != nil || string(b) != "220" {
			t.Errorf("read %q, %v", b, err)
		}
		quickest = min(quickest, time.Since(start))
	}
	if quickest > 150*time.Millisecond {
		t.Errorf("%v: it was looked at", quickest)
	}
}

// What the network may bring to a pod, besides what a proxy of ours sends.
func TestReceiverDecides(t *testing.T) {
	c := newCluster(t)
	member, stranger, unknown, server := c.pod("member"), c.pod("stranger"), c.pod("unknown"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.HandshakeTimeout = 3 * time.Second })
	n.enrol(server)
	member.wl.Direct = true
	unknown.wl.Addresses = nil
	c.publish()
	server.serve(8080, echo)
	otherTLS := clientHello(t)
	for i, row := range []struct {
		name   string
		from   *testPod
		marked bool
		say    string
		reason string // "" is: passed on
		// slow means that nothing decides before a limit.
		slow bool
	}{
		{"member, marked, garbage", member, true, "garbage instead of ClientHello", "not_tls", false},
		{"member, marked, other TLS", member, true, otherTLS, "not_our_protocol", false},
		{"member, marked, silent", member, true, "", "timeout", true},
		{"member, plain", member, false, "GET / HTTP/1.1\r\n\r\n", "", false},
		{"member, its own TLS", member, false, otherTLS, "", false},
		{"stranger, plain", stranger, false, "hello", "", false},
		{"stranger, own TLS", stranger, false, otherTLS, "", false},
		{"stranger, marked, plain", stranger, true, "hello", "", false},
		{"unknown, plain", unknown, false, "hello", "", false},
		{"unknown, marked, plain", unknown, true, "hello", "", false},
		{"unknown, marked, TLS", unknown, true, otherTLS, "", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			port := uint16(40000 + i)
			if row.marked {
				port = uint16(62000 + i)
			}
			before := n.count("tacit_refused_connections_total", "direction=inbound", "reason="+row.reason)
			conn, err := row.from.bare(port, server.at(false, 8080))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			start := time.Now()
			if row.reason == "" {
				say(t, conn, row.say)
				return
			}
			conn.Write([]byte(row.say))
			if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
				t.Errorf("read: %v, want a reset", err)
			}
			if d := time.Since(start); (d > 2*time.Second) != row.slow {
				t.Errorf("decided after %v", d)
			}
			await(t, "it is counted", func() bool {
				return n.count("tacit_refused_connections_total", "direction=inbound", "reason="+row.reason) == before+1
			})
		})
	}
}

func TestExpect(t *testing.T) {
	in, between, out := &mesh.Workload{Direct: true, Enrolled: true}, &mesh.Workload{Enrolled: true}, &mesh.Workload{}
	for _, row := range []struct {
		source *mesh.Workload
		port   uint16
		want   expectation
	}{
		{in, 61000, expectDirect}, {in, 65535, expectDirect}, {in, 60999, expectEither},
		{between, 61000, expectEither}, {between, 60999, expectEither},
		{out, 61000, expectEither}, {out, 60999, expectPlaintext},
		{nil, 61000, expectEither}, {nil, 60999, expectPlaintext},
	} {
		if got := expect(row.source, row.port); got != row.want {
			t.Errorf("expect(%+v, %d) = %d, want %d", row.source, row.port, got, row.want)
		}
	}
}

// clientHello is the first record of a TLS client that is not ours.
func clientHello(t *testing.T) string {
	t.Helper()
	var b bytes.Buffer
	a, z := net.Pipe()
	defer a.Close()
	var wg sync.WaitGroup
	wg.Go(func() { foreignTLS(a) })
	head := make([]byte, 5)
	if _, err := io.ReadFull(z, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(z, body); err != nil {
		t.Fatal(err)
	}
	z.Close()
	wg.Wait()
	b.Write(head)
	b.Write(body)
	return b.String()
}

func TestCapturePortsAreRefused(t *testing.T) {
	c, client, server := pair(t)
	both(t, func(t *testing.T, v6 bool) {
		for _, port := range []uint16{mesh.OutboundPort, mesh.InboundPort} {
			if err := firstRead(client.dial(server.at(v6, port))); !isRST(err) {
				t.Errorf("port %d: %v, want a reset", port, err)
			}
			if err := firstRead(client.bare(0, server.at(v6, port))); !isRST(err) {
				t.Errorf("port %d from the network: %v, want a reset", port, err)
			}
		}
	})
	if n := c.nodes[0].count("tacit_refused_connections_total", "direction=outbound", "reason=capture_port"); n != 4 {
		t.Errorf("%v refused outbound: want 4", n)
	}
	if n := c.nodes[1].count("tacit_refused_connections_total", "direction=inbound", "reason=capture_port"); n != 4 {
		t.Errorf("%v refused inbound: want 4", n)
	}
}

func TestWrongIdentityIsRefused(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	for _, row := range []struct {
		name string
		pod  *testPod
		node int
		side string
		want string
	}{
		{"the server is not who the World says", server, 0, "outbound", "wrong_identity"},
		{"the client is not who the World says", client, 1, "inbound", "wrong_identity"},
	} {
		t.Run(row.name, func(t *testing.T) {
			right := row.pod.wl.ID
			row.pod.wl.ID = idOf("somebody")
			c.publish()
			conn, err := client.dial(server.at(false, 8080))
			if err == nil {
				_, err = conn.Write([]byte("secret")) // a reset is told once: here, if it is there already
			}
			if err := firstRead(conn, err); !isRST(err) {
				t.Errorf("%v: want a reset", err)
			}
			await(t, "it is counted", func() bool {
				return c.nodes[row.node].count("tacit_refused_connections_total", "direction="+row.side, "reason="+row.want) == 1
			})
			row.pod.wl.ID = right
			c.publish()
			say(t, mustDial(t, client, server.at(false, 8080)), "right again")
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
	n2.enrol(server)
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
	n.enrol(client)
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
	n2.enrol(server)
	server.serve(8080, echo)
	all := c.pods
	c.pods = []*testPod{client}
	n1 := c.node(nil)
	n1.enrol(client)
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

func TestManyAtOnce(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	patient := func(cfg *Config) { cfg.DialTimeout, cfg.HandshakeTimeout = 4*limit, 4*limit }
	n1, n2 := c.node(patient), c.node(patient)
	n1.enrol(client)
	n2.enrol(server)
	server.serve(1, echo)
	const many = 300
	var wg sync.WaitGroup
	errs := make(chan error, many)
	for i := range many {
		wg.Go(func() { errs <- askOnce(client, server.at(i%2 == 0, 1)) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

// askOnce is a whole connection: a question, its echo, the end.
func askOnce(p *testPod, to netip.AddrPort) error {
	c, err := p.dial(to)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("read %q", b)
	}
	return err
}
