package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

// dialFrom connects as the pod's application does that wants a port of its own.
func (p *testPod) dialFrom(port uint16, to netip.AddrPort) (*net.TCPConn, error) {
	return p.dialWith(net.Dialer{
		Timeout: limit, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.addr(to.Addr().Is6()), port)),
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			return err
		},
	}, to)
}

// privileged gives the pod's namespace the ports that take a privilege, as it mostly has them.
func (p *testPod) privileged() {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error { return sh("echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start") })
}

// TestApplicationsSeeTheClientsPort: that of the client's application, whoever speaks, also
// over a connection that was kept, and where the port takes a privilege.
func TestApplicationsSeeTheClientsPort(t *testing.T) {
	c, client, server := pair(t)
	stranger := c.pod("stranger")
	c.publish()
	app := server.serve(8080, echo)
	server.privileged()
	for i, r := range []struct {
		from *testPod
		v6   bool
		port uint16
	}{
		{client, false, 40123}, {client, false, 40124}, {client, false, 20}, {client, false, 21},
		{client, false, 64000}, {client, false, 15107}, {client, true, 40125}, {client, true, 22},
		{stranger, false, 40126}, {stranger, false, 20}, {stranger, true, 21}, {stranger, false, 20000},
	} {
		to := server.at(r.v6, 8080)
		conn, err := r.from.dialFrom(r.port, to)
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		say(t, conn, "hello")
		conn.Close()
		if got, want := <-app.seen, netip.AddrPortFrom(r.from.addr(r.v6), r.port); got != want {
			t.Errorf("the application sees %s: want %s", got, want)
		}
		await(t, "it has ended", func() bool { return c.nodes[len(c.nodes)-1].count("tacit_connections_open") == 0 })
	}
	if kept := strings.Count(c.log.text(), "kept=true"); kept == 0 {
		t.Error("no connection was kept, so that is not tested")
	}
	if n := c.nodes[len(c.nodes)-1].count("tacit_source_ports_changed_total"); n != 0 {
		t.Errorf("%v ports changed", n)
	}
}

// TestPortThatCannotBeHad: the application sees another one, and nobody is reset.
func TestPortThatCannotBeHad(t *testing.T) {
	c := newCluster(t)
	stranger, server := c.pod("stranger"), c.pod("server")
	n := c.node(nil)
	n.enroll(server)
	server.privileged()
	app := server.serve(8080, echo)
	server.serve(40200, echo) // a listener has the port for itself
	dial := func(port uint16, reason string) {
		t.Helper()
		before := n.count("tacit_source_ports_changed_total", "reason="+reason)
		conn, err := stranger.dialFrom(port, server.at(false, 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		say(t, conn, "hello")
		if seen := <-app.seen; seen.Addr() != stranger.v4 || seen.Port() == port {
			t.Errorf("the application sees %s: want another port than %d", seen, port)
		}
		if got := n.count("tacit_source_ports_changed_total", "reason="+reason) - before; got != 1 {
			t.Errorf("%v ports changed because of %s: want 1", got, reason)
		}
	}
	dial(40200, "in_use")
	n.agent.mu.Lock()
	n.agent.broken = true
	n.agent.mu.Unlock()
	dial(20, "not_bound")
	n.agent.stop()
	await(t, "the agent is away", func() bool { return !n.proxy.link.up.Load() })
	dial(21, "no_agent")
	await(t, "that is logged", func() bool { return strings.Contains(c.log.text(), "seen_port_reason=no_agent") })
	if got := n.count("tacit_refused_connections_total"); got != 0 {
		t.Errorf("%v connections refused", got)
	}
}

// TestPlainDialsAreNotMarked: where the pod's kernel gives every port, or those that are
// marked alone, a plain dial takes another one.
func TestPlainDialsAreNotMarked(t *testing.T) {
	for _, first := range []int{1024, 61000, 60990} {
		t.Run(fmt.Sprint(first), func(t *testing.T) {
			c := newCluster(t)
			client, stranger := c.pod("client"), c.pod("stranger")
			n := c.node(nil)
			n.enroll(client) // a runtime sets the ports later
			client.setPorts(first, 65535)
			app := stranger.serve(8080, echo)
			for range 60 {
				conn, err := client.dial(stranger.at(false, 8080))
				if err != nil {
					t.Fatal(err)
				}
				say(t, conn, "hello")
				conn.Close()
				if seen := <-app.seen; mesh.IsDirectPort(seen.Port()) {
					t.Fatalf("a plain dial from %s", seen)
				}
			}
		})
	}
}

// TestPortsOfClientsAreNotTaken counts whom the ports of a pod's clients, which the proxy uses
// in the pod, keep from a port: nobody who connects, nobody who listens with SO_REUSEADDR
// or at an address, and who listens at all addresses without it only at those ports.
func TestPortsOfClientsAreNotTaken(t *testing.T) {
	const first, n, more = 40000, 50, 450
	c := newCluster(t)
	stranger, server := c.pod("stranger"), c.pod("server")
	node := c.node(nil)
	node.enroll(server)
	server.setPorts(first, first+n-1)
	app := server.serve(8080, echo)
	outside := stranger.serve(9090, echo)
	var conns []*net.TCPConn
	for i := range n {
		conn, err := stranger.dialFrom(uint16(first+i), server.at(false, 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		say(t, conn, "hello")
		if seen := <-app.seen; seen.Port() != uint16(first+i) {
			t.Errorf("client %d is seen as %s", first+i, seen)
		}
		conns = append(conns, conn)
	}
	conn, err := server.dial(stranger.at(false, 9090))
	if err != nil {
		t.Fatalf("a pod with %d clients cannot dial: %v", n, err)
	}
	say(t, conn, "hello")
	<-outside.seen
	conn.SetLinger(0) // else it has a port after its end, as anywhere
	conn.Close()
	await(t, "it has ended", func() bool { return node.count("tacit_connections_open") == n })
	for _, when := range []string{"open", "just ended"} {
		for _, r := range []struct {
			name  string
			at    netip.Addr
			reuse bool
			want  int
		}{
			{"all addresses, SO_REUSEADDR", netip.IPv4Unspecified(), true, 0},
			{"own address", server.v4, false, 0},
			{"all addresses", netip.IPv4Unspecified(), false, n},
		} {
			failed := server.cannotListen(r.at, first, first+n+more-1, r.reuse)
			t.Logf("%d connections %s: listening at %s fails at %d of %d ports", n, when, r.name, failed, n+more)
			if failed > r.want {
				t.Errorf("%d failed: want %d", failed, r.want)
			}
		}
		for _, conn := range conns {
			conn.Close()
		}
		await(t, "all have ended", func() bool { return node.count("tacit_connections_open") == 0 })
	}
}

// TestPortsOfServersAreShared: the proxy has the address and port that an application of the pod
// is connected to. Who listens with SO_REUSEADDR, or at an address, does not meet that.
func TestPortsOfServersAreShared(t *testing.T) {
	c := newCluster(t)
	stranger, client := c.pod("stranger"), c.pod("client")
	c.node(nil).enroll(client)
	stranger.serve(9090, echo)
	conn := mustDial(t, client, stranger.at(false, 9090))
	defer conn.Close()
	say(t, conn, "hello")
	all := netip.IPv4Unspecified()
	t.Logf("listening at all addresses without SO_REUSEADDR fails at %d port of 1", client.cannotListen(all, 9090, 9090, false))
	if client.cannotListen(all, 9090, 9090, true)+client.cannotListen(client.v4, 9090, 9090, false) > 0 {
		t.Error("a connection to a port of others keeps the application from its own")
	}
}

// TestPortsOfDirectConnectionsAreFreed: a marked port is in use for as long as its connection, and
// only in the eyes of who listens without SO_REUSEADDR.
func TestPortsOfDirectConnectionsAreFreed(t *testing.T) {
	const n = 20
	c, client, server := pair(t)
	server.serve(8080, echo)
	var conns []*net.TCPConn
	for range n {
		conn := mustDial(t, client, server.at(false, 8080))
		say(t, conn, "hello")
		conns = append(conns, conn)
	}
	all := netip.IPv4Unspecified()
	if failed := client.cannotListen(all, mesh.DirectPortFirst, mesh.DirectPortLast, true); failed != 0 {
		t.Errorf("listening with SO_REUSEADDR fails at %d marked ports", failed)
	}
	failed := client.cannotListen(all, mesh.DirectPortFirst, mesh.DirectPortLast, false)
	t.Logf("%d direct connections open: listening at all addresses without SO_REUSEADDR fails at %d of %d marked ports", n, failed, mesh.DirectPortLast-mesh.DirectPortFirst+1)
	if failed > n {
		t.Errorf("%d failed: want %d", failed, n)
	}
	for _, conn := range conns {
		conn.Close()
	}
	proxy := c.nodes[0].proxy
	await(t, "they are kept", func() bool { return proxy.keeps.open.Load() > 0 })
	proxy.pod(client.name).idle.close()
	await(t, "all marked ports are free again", func() bool {
		return client.cannotListen(all, mesh.DirectPortFirst, mesh.DirectPortLast, false) == 0
	})
}

// cannotListen counts the ports from first to last that cannot be listened at, as an application does.
func (p *testPod) cannotListen(at netip.Addr, first, last uint16, reuse bool) (failed int) {
	p.c.t.Helper()
	value := 0
	if reuse {
		value = 1
	}
	l := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, value) })
		return err
	}}
	p.space.do(p.c.t, func() error {
		for port := int(first); port <= int(last); port++ {
			got, err := l.Listen(context.Background(), "tcp4", netip.AddrPortFrom(at, uint16(port)).String())
			if errors.Is(err, unix.EADDRINUSE) {
				failed++
				continue
			}
			if err != nil {
				return err
			}
			got.Close()
		}
		return nil
	})
	return failed
}
