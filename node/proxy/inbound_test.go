package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/wire/direct"
)

// TestNewsTakesTime: a member that has not heard yet that the server is in the mesh
// dials in plaintext, and a NAT gave it a marked port. It is passed on.
func TestNewsTakesTime(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace = time.Minute })
	n.enrol(server)
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
	n.enrol(server)
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

// TestMembersSpeakTLS: plaintext from a member with a marked port is refused where
// nothing tells that the server leaves, and only when that could have become known.
func TestMembersSpeakTLS(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.AnnounceGrace = 50 * time.Millisecond })
	n.enrol(server)
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
	n.enrol(server)
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

// TestLateClientHello: a member without a marked port says nothing for longer than
// the look lasts, and then begins with TLS. The application must not get it.
func TestLateClientHello(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(nil)
	n.enrol(server)
	member.wl.Direct = true
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
	n.enrol(server)
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
	n.enrol(server)
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
