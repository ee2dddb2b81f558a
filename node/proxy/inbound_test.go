package proxy

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/wire/direct"
)

// TestNewsTakesTime: a member that has not heard yet that the server is in the mesh
// dials in plaintext, and a NAT gave it a marked port. It is passed on.
func TestNewsTakesTime(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace = time.Minute })
	n.enroll(server)
	member.wl.Direct = true
	c.publish()
	server.serve(8080, echo)
	for i, announced := range []bool{false, true} {
		server.wl.Direct = announced
		c.publish()
		conn, err := member.bare(uint16(62000+i), server.at(false, 8080))
		if err != nil {
			t.Fatal(err)
		}
		say(t, conn, "not told yet")
		conn.Close()
	}
	if got := n.count("tacit_connections_total", "direction=inbound", "kind=plaintext"); got != 2 {
		t.Errorf("%v connections counted as plaintext: want 2", got)
	}
}

// TestWithdrawalTakesTime: a member has heard before the server's node that the server
// leaves the mesh. It dials in plaintext, and a NAT gave it a marked port. It is passed on.
func TestWithdrawalTakesTime(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace = time.Minute })
	n.enroll(server)
	member.wl.Direct, server.wl.Direct = true, true
	c.publish()
	server.serve(8080, echo)
	n.announcedLongAgo(server)
	conn, err := member.bare(62000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("he")); err != nil {
		t.Fatal(err)
	}
	await(t, "the proxy has it", func() bool { return n.proxy.pod(server.name).quota.open.Load() == 1 })
	server.wl.Direct = false
	c.publish()
	b := make([]byte, 2)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "he" {
		t.Errorf("read %q, %v: want what was said", b, err)
	}
}

// A peer that says nothing and has heard before us that the server leaves, or after us that
// it is there, hears the server's first word soon, and not the end of all patience.
func TestWhoWaitsForTheServerIsServed(t *testing.T) {
	for name, leaves := range map[string]bool{"it leaves": true, "it has come": false} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			member, server := c.pod("member"), c.pod("server")
			n := c.node(func(cfg *Config) { cfg.AnnounceGrace, cfg.HandshakeTimeout = time.Minute, time.Minute })
			n.enroll(server)
			member.wl.Direct, server.wl.Direct = true, true
			c.publish()
			server.serve(3306, func(conn *net.TCPConn) { conn.Write([]byte("mysql_native_password")) })
			if leaves {
				n.announcedLongAgo(server)
			}
			conn, err := member.bare(40000, server.at(false, 3306))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			await(t, "the proxy has it", func() bool { return n.proxy.pod(server.name).quota.open.Load() == 1 })
			if leaves {
				server.wl.Direct = false
				c.publish()
			}
			conn.SetReadDeadline(time.Now().Add(limit))
			if b, err := io.ReadAll(conn); string(b) != "mysql_native_password" {
				t.Errorf("read %q, %v: want the server's first word", b, err)
			}
		})
	}
}

// TestMembersSpeakTLS: plaintext from a member with a marked port is refused where
// nothing tells that the server leaves, and only when that could have become known.
func TestMembersSpeakTLS(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace = 50 * time.Millisecond })
	n.enroll(server)
	member.wl.Direct, server.wl.Direct = true, true
	c.publish()
	server.serve(8080, echo)
	n.announcedLongAgo(server)
	conn, err := member.bare(62000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); len(b) > 0 || !isRST(err) {
		t.Errorf("read %q, %v: want a reset and nothing before it", b, err)
	}
	if got := n.count("tacit_refused_connections_total", "direction=inbound", "reason=not_tls"); got != 1 {
		t.Errorf("%v refused as plaintext: want 1", got)
	}
}

// announcedLongAgo lets the time pass in which p's announcement is news.
func (n *node) announcedLongAgo(p *testPod) { n.proxy.pod(p.name).announced.Store(1) }

// TestNewsIsNoReasonToSpeakFirst: a member with a marked port says nothing for longer
// than a look lasts, because its node is busy, and the application speaks first. Its
// words must not reach the wire in clear.
func TestNewsIsNoReasonToSpeakFirst(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace, cfg.HandshakeTimeout = time.Minute, time.Second })
	n.enroll(server)
	member.wl.Direct, server.wl.Direct = true, true
	c.publish()
	server.serve(3306, func(conn *net.TCPConn) { conn.Write([]byte("mysql_native_password")) })
	conn, err := member.bare(62000, server.at(false, 3306))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if b, err := io.ReadAll(conn); len(b) > 0 || !isRST(err) {
		t.Errorf("read %q, %v: want a reset and nothing before it", b, err)
	}
	if got := n.count("tacit_refused_connections_total", "direction=inbound", "reason=timeout"); got != 1 {
		t.Errorf("%v refused for silence: want 1", got)
	}
}

// TestNobodySpeaksBeforeALateClientHello: a pod whose proxy dials by direct says nothing for
// many times as long as a look lasts, as on a node without a free processor, and the
// application is one that speaks first. No word of it is on the wire, and the ClientHello meets TLS.
func TestNobodySpeaksBeforeALateClientHello(t *testing.T) {
	c := newCluster(t)
	member, enrolled, server := c.pod("member"), c.pod("enrolled"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.LookLimit = 10 * time.Millisecond })
	n.enroll(server)
	member.wl.Direct, member.wl.Enrolled, enrolled.wl.Enrolled = true, true, true
	c.publish()
	n.announcedLongAgo(server)
	server.serve(3306, func(conn *net.TCPConn) { conn.Write([]byte("mysql_native_password")) })
	for i, row := range []struct {
		name string
		from *testPod
		port uint16
	}{
		{"member, marked", member, 62000},
		{"member, whose marked ports are all taken", member, 40000},
		{"enrolled, marked", enrolled, 62000},
	} {
		t.Run(row.name, func(t *testing.T) {
			conn, err := row.from.bare(row.port, server.at(false, 3306))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			if b, err := io.ReadAll(conn); len(b) > 0 || !isTimeout(err) {
				t.Errorf("read %q, %v: want nothing, and no end", b, err)
			}
			conn.SetDeadline(time.Now().Add(limit))
			_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{direct.ALPN}}).Handshake()
			await(t, "it is refused as TLS without a certificate", func() bool {
				return n.count("tacit_refused_connections_total", "direction=inbound", "reason=no_certificate") == float64(i+1)
			})
		})
	}
}

// TestLateClientHello: a pod that is captured and not announced, without a marked port,
// says nothing for longer than the look lasts, and then begins with TLS. The application
// must not get it.
func TestLateClientHello(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(nil)
	n.enroll(server)
	member.wl.Enrolled = true
	c.publish()
	dialled, got := make(chan struct{}, 1), make(chan []byte, 1)
	server.serve(8080, func(conn *net.TCPConn) {
		dialled <- struct{}{}
		b, _ := io.ReadAll(conn)
		got <- b
	})
	conn, err := member.bare(40000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	<-dialled
	// The client's side of the handshake may end before the refusal is there.
	_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{direct.ALPN}}).Handshake()
	if b := <-got; len(b) > 0 {
		t.Errorf("the application was handed %d bytes of TLS", len(b))
	}
	await(t, "it is refused as TLS without a certificate", func() bool {
		return n.count("tacit_refused_connections_total", "direction=inbound", "reason=no_certificate") == 1
	})
}

// TestUnknownIsWhoItProvesToBe: a pod that is not known yet dials by direct. Whatever
// identity of the trust domain it has is let in, and told of.
func TestUnknownIsWhoItProvesToBe(t *testing.T) {
	c := newCluster(t)
	unknown, server := c.pod("unknown"), c.pod("server")
	n := c.node(nil)
	n.enroll(server)
	unknown.wl.Addresses = nil
	c.publish()
	server.serve(8080, echo)
	who, leaves := idOf("somebody"), n.proxy.cfg.Leaves
	defer leaves.Hold(who)()
	if err := leaves.Ready(t.Context(), who); err != nil {
		t.Fatal(err)
	}
	leaf, err := leaves.Leaf(who)
	if err != nil {
		t.Fatal(err)
	}
	dialled, err := unknown.bare(62000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := direct.Client(t.Context(), dialled, identity.NewTLS(identity.TLSConfig{}).Client(leaf, server.wl.ID, ""), direct.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	if reply, err := conn.AwaitReply(t.Context()); err != nil || reply.Status != direct.StatusOK {
		t.Errorf("the reply is %+v, %v: want ok", reply, err)
	}
	conn.Abort()
	await(t, "its identity is told", func() bool {
		return strings.Contains(c.log.text(), "reporter=destination security=mutual_tls src="+who.String())
	})
}

// TestEnrolledMaySpeakTLS: a pod that is captured and not announced dials by direct, and
// a NAT took the mark from its port. The application must not get its ClientHello.
func TestEnrolledMaySpeakTLS(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n := c.node(nil)
	n.enroll(server)
	client.wl.Enrolled = true
	c.publish()
	app := server.serve(8080, echo)
	conn, err := client.bare(40000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{direct.ALPN}}).Handshake()
	await(t, "it is refused as TLS without a certificate", func() bool {
		return n.count("tacit_refused_connections_total", "direction=inbound", "reason=no_certificate") == 1
	})
	if len(app.seen) > 0 {
		t.Error("the application was dialled")
	}
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
	excluding := c.pod("excluding")
	excluding.wl.ExcludeOutbound = []mesh.Exclusion{{Port: 8080}}
	n := c.node(func(cfg *Config) { cfg.HandshakeTimeout = 3 * time.Second })
	n.enroll(server)
	member.wl.Direct, excluding.wl.Direct = true, true
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
		{"member, plain", member, false, "GET / HTTP/1.1\r\n\r\n", "not_tls", false},
		{"member, its own TLS", member, false, otherTLS, "not_our_protocol", false},
		{"member, not marked, silent", member, false, "", "timeout", true},
		{"member that excludes us, plain", excluding, false, "GET / HTTP/1.1\r\n\r\n", "", false},
		{"member that excludes us, marked, plain", excluding, true, "hello", "", false},
		{"member that excludes us, marked, silent", excluding, true, "", "timeout", true},
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
	peer := func(w mesh.Workload) *mesh.Peer { return w.Peer() }
	in, between, out := peer(mesh.Workload{Direct: true, Enrolled: true}), peer(mesh.Workload{Enrolled: true}), peer(mesh.Workload{})
	wide := peer(mesh.Workload{Direct: true, Enrolled: true, MarkedPorts: true})
	const marked, plain = 61000, 60999
	for _, row := range []struct {
		source   *mesh.Peer
		port     uint16
		self     standing
		excluded bool
		want     expectation
	}{
		{in, marked, announced, false, expectDirect}, {in, 65535, announced, false, expectDirect}, {in, plain, announced, false, expectDirect},
		{in, marked, news, false, expectNews}, {in, plain, news, false, expectEither},
		{in, marked, unannounced, false, expectNews}, {in, plain, unannounced, false, expectEither},
		{in, marked, announced, true, expectNews}, {in, plain, announced, true, expectEither},
		{between, marked, announced, false, expectNews}, {between, marked, unannounced, false, expectNews}, {between, plain, announced, false, expectEither},
		{wide, marked, announced, true, expectEither}, {wide, plain, announced, true, expectEither},
		{wide, marked, announced, false, expectDirect}, {wide, marked, news, false, expectNews},
		{out, marked, announced, false, expectEither}, {out, plain, announced, false, expectPlaintext},
		{nil, marked, announced, false, expectEither}, {nil, plain, announced, false, expectPlaintext},
	} {
		if got := expect(row.source, row.port, row.self, row.excluded); got != row.want {
			t.Errorf("expect(%+v, %d, %d, %v) = %d, want %d", row.source, row.port, row.self, row.excluded, got, row.want)
		}
	}
}

func TestMayExclude(t *testing.T) {
	svc := &mesh.Service{Namespace: "d", Hostname: "s", Addresses: addrs("10.96.0.1")}
	self := &mesh.Workload{Addresses: addrs("10.1.0.2"), Services: map[string][]mesh.Port{"d/s": {{Service: 80, Target: 8080}}}}
	w := mesh.NewWorld([]*mesh.Workload{self}, []*mesh.Service{svc})
	prefix := netip.MustParsePrefix
	for _, row := range []struct {
		dialled string
		exclude mesh.Exclusion
		want    bool
	}{
		{"10.1.0.2:8080", mesh.Exclusion{Port: 8080}, true},
		{"10.1.0.2:8080", mesh.Exclusion{Port: 80}, true}, // the port of the service
		{"10.1.0.2:9090", mesh.Exclusion{Port: 80}, false},
		{"10.1.0.2:8080", mesh.Exclusion{Prefix: prefix("10.1.0.0/24")}, true},
		{"10.1.0.2:8080", mesh.Exclusion{Prefix: prefix("10.96.0.0/16")}, true},
		{"10.1.0.2:8080", mesh.Exclusion{Prefix: prefix("10.96.0.0/16"), Port: 443}, false},
		{"10.1.0.2:9090", mesh.Exclusion{Prefix: prefix("10.96.0.0/16")}, false}, // no service leads there
		{"10.1.0.2:8080", mesh.Exclusion{Prefix: prefix("192.0.2.0/24")}, false},
	} {
		source := &mesh.Workload{ExcludeOutbound: []mesh.Exclusion{row.exclude}}
		if got := mayExclude(w, source.Peer(), self.Peer(), netip.MustParseAddrPort(row.dialled)); got != row.want {
			t.Errorf("%+v and %s: %v", row.exclude, row.dialled, got)
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
