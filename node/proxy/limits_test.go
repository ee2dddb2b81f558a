package proxy

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

func TestSlotsDelayAndThenRefuse(t *testing.T) {
	s := newSlots(8, time.Millisecond)
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	take := func(peer netip.Addr) error { return s.take(t.Context(), peer) }
	if err := errors.Join(take(a), take(b)); err != nil {
		t.Fatal(err)
	}
	if err := take(a); !errors.Is(err, errHandshakeLimit) {
		t.Errorf("a second slot of eight for one peer: %v", err)
	}
	got := make(chan error)
	s.patience = limit
	go func() { got <- s.take(t.Context(), a) }()
	s.give(a)
	if err := <-got; err != nil {
		t.Errorf("take after give: %v", err)
	}
	s.patience = time.Millisecond
	for i := range byte(6) {
		if err := take(netip.AddrFrom4([4]byte{10, 0, 1, i})); err != nil {
			t.Fatal(err)
		}
	}
	if err := take(netip.MustParseAddr("10.0.0.3")); !errors.Is(err, errHandshakeLimit) {
		t.Errorf("a ninth slot of eight: %v", err)
	}
	s.give(a)
	s.give(b)
	for i := range byte(6) {
		s.give(netip.AddrFrom4([4]byte{10, 0, 1, i}))
	}
	if n := s.used.Load(); n != 0 || len(s.peers) != 0 {
		t.Errorf("%d used and %d peers known in the end", n, len(s.peers))
	}
}

// Peers that begin a handshake and say no more hold a slot each, and no longer
// than the limit. Others get their turn then.
func TestHalfOpenHandshakesAreBounded(t *testing.T) {
	c := newCluster(t)
	client, server, loris := c.pod("client"), c.pod("server"), c.pod("loris")
	const slots = 4 // of 32: one peer has an eighth
	n1 := c.node(nil)
	n2 := c.node(func(cfg *Config) { cfg.MaxHandshakes, cfg.HandshakeTimeout = 8*slots, 3*time.Second })
	n1.enrol(client)
	n2.enrol(server)
	loris.wl.Direct = true
	c.publish()
	server.serve(1, echo)
	hello := recordedHello(t)
	var wg sync.WaitGroup
	for i := range 5 * slots {
		conn, err := loris.bare(uint16(62000+i), server.at(false, 1))
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(hello)
		wg.Go(func() {
			conn.SetReadDeadline(time.Now().Add(limit))
			for {
				if _, err := conn.Read(make([]byte, 4096)); err != nil {
					break
				}
			}
			conn.Close()
		})
	}
	await(t, "all slots are taken", func() bool { return n2.proxy.answering.used.Load() == slots })
	say(t, mustDial(t, client, server.at(false, 1)), "others go on meanwhile")
	wg.Wait()
	refused := func(reason string) float64 {
		return n2.count("tacit_refused_connections_total", "direction=inbound", "reason="+reason)
	}
	await(t, "all are counted", func() bool { return refused("timeout")+refused("handshake_limit") == 5*slots })
	if refused("timeout") < slots {
		t.Errorf("%v timed out: want at least %d", refused("timeout"), slots)
	}
	await(t, "all slots are free", func() bool { return n2.proxy.answering.used.Load() == 0 })
}

// Peers that say nothing are waited for, up to a number of them from one address and to
// one pod. Beyond it they are refused, and others are let in.
func TestSilentConnectionsAreBounded(t *testing.T) {
	c := newCluster(t)
	server, loris, other := c.pod("server"), c.pod("loris"), c.pod("other")
	n := c.node(func(cfg *Config) { cfg.MaxConnectionsPerPod = 24 }) // 3 of one address
	n.enrol(server)
	server.serve(1, echo)
	var silent []*net.TCPConn
	for i := range 5 {
		conn, err := loris.bare(uint16(62000+i), server.at(false, 1))
		if isRST(err) { // refused already
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	await(t, "two are refused", func() bool {
		return n.count("tacit_refused_connections_total", "direction=inbound", "reason=quiet_limit") == 2
	})
	if got := n.count("tacit_quiet_connections"); got != 3 {
		t.Errorf("%v are quiet: want 3", got)
	}
	conn, err := other.bare(62000, server.at(false, 1))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	say(t, conn, "of another address")
	for _, conn := range silent {
		conn.Close()
	}
	await(t, "there is room", func() bool { return n.count("tacit_quiet_connections") == 0 })
	if left := len(n.proxy.pod(server.name).looks.from); left != 0 {
		t.Errorf("%d addresses are still known", left)
	}
}

func TestConnectionsOfAPodAreLimited(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(func(cfg *Config) { cfg.MaxConnectionsPerPod = 3 }), c.node(nil)
	n1.enrol(client)
	n2.enrol(server)
	server.serve(1, echo)
	var open []*net.TCPConn
	for range 3 {
		conn := mustDial(t, client, server.at(false, 1))
		say(t, conn, "x")
		open = append(open, conn)
	}
	if err := firstRead(client.dial(server.at(false, 1))); !isRST(err) {
		t.Errorf("the fourth: %v, want a reset", err)
	}
	open[0].Close()
	await(t, "there is room", func() bool { return n1.proxy.pod(client.name).quota.open.Load() == 2 })
	say(t, mustDial(t, client, server.at(false, 1)), "again")
	if n := n1.count("tacit_refused_connections_total", "reason=connection_limit"); n != 1 {
		t.Errorf("%v counted: want 1", n)
	}
}

// Without a free descriptor the accept loop waits, and goes on when there is one.
func TestAcceptSurvivesWithoutDescriptors(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	say(t, mustDial(t, client, server.at(false, 1)), "before")
	waiting := mustDial(t, client, server.at(false, 1)) // has a descriptor before there is none
	say(t, waiting, "open")
	fd := client.plainSockets(t, 4, 1)[0]
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	unix.Connect(fd, socket.Address(server.at(false, 1)))
	n := c.nodes[0]
	failures := func() float64 { return n.count("tacit_accept_errors_total") }
	await(t, "accepting has failed twice", func() bool { return failures() >= 2 })
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if f := failures(); f > 50 {
		t.Errorf("%v failures: that is a busy loop", f)
	}
	conn, err := connectedConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	say(t, conn, "accepted in the end")
	say(t, waiting, "still open")
}

// connectedConn is the connection of a socket whose connect has been begun.
func connectedConn(fd int) (*net.TCPConn, error) {
	for {
		done, err := isConnected(fd)
		if err != nil && !errors.Is(err, syscall.EINPROGRESS) {
			return nil, err
		}
		if done {
			break
		}
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 10)
	}
	return connOf(fd)
}
