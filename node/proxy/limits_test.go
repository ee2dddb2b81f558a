package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

func testSlots(most int, patience time.Duration) *slots {
	return newSlots(most, patience, prometheus.NewHistogram(prometheus.HistogramOpts{}))
}

func peerNo(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }

// One peer has an eighth; who waits is served when a slot is free, and refused when patience is over.
func TestTurnsDelayAndThenRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSlots(16, time.Minute)
		pod := s.share()
		first, second, third := pod.join(peerNo(1)), pod.join(peerNo(1)), pod.join(peerNo(1))
		if !first.isHeld() || !second.isHeld() || third.isHeld() {
			t.Error("want two slots of 16 for one peer")
		}
		first.leave()
		first.leave()
		if _, err := third.await(t.Context(), nil, nil); err != nil {
			t.Errorf("after one has left: %v", err)
		}
		late := pod.join(peerNo(1))
		began := time.Now()
		if _, err := late.await(t.Context(), nil, nil); !errors.Is(err, errHandshakeLimit) || time.Since(began) != time.Minute {
			t.Errorf("%v after %v: want to be refused after a minute", err, time.Since(began))
		}
		gone := make(chan struct{})
		close(gone)
		if _, err := late.await(t.Context(), gone, nil); err == nil {
			t.Error("served though nothing is free")
		}
		for _, tn := range []*turn{second, third, late} {
			tn.leave()
		}
		if used, waiting := s.counts(); used != 0 || waiting != 0 || len(pod.peers) != 0 {
			t.Errorf("%d used, %d wait, %d peers known in the end", used, waiting, len(pod.peers))
		}
	})
}

// However many peers of a pod hold what they can get, the next peer has a slot at once, and
// so has the next pod, however many of those there are.
func TestTurnsOfOthersAreKept(t *testing.T) {
	s := testSlots(512, time.Minute)
	flood := func(pod *share) {
		for i := range 24 * 64 {
			pod.join(peerNo(i % 24))
		}
	}
	flooded := s.share()
	flood(flooded)
	if used, _ := s.counts(); used < 512/4 || used > 512/2 {
		t.Errorf("%d of 512 are taken by 24 peers of one pod: want a good part, and half at most", used)
	}
	for i := range 40 {
		if !flooded.join(peerNo(1000 + i)).isHeld() {
			t.Error("another peer of a flooded pod waits")
		}
	}
	for range 600 { // more pods than slots
		pod := s.share()
		if !pod.join(peerNo(1)).isHeld() {
			t.Fatal("a pod without a slot waits")
		}
		flood(pod)
	}
}

// Turns come and go at random: nobody waits who fits, and the counts are what the turns say.
func TestTurnsAtRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	s := testSlots(16, time.Minute)
	pods := []*share{s.share(), s.share(), s.share()}
	var turns []*turn
	for range 20_000 {
		switch n := random.IntN(4); {
		case n < 2 && len(turns) < 100:
			turns = append(turns, pods[random.IntN(3)].join(peerNo(random.IntN(5))))
		case len(turns) == 0:
		case n == 2:
			i := random.IntN(len(turns))
			turns[i].leave()
			turns = slices.Delete(turns, i, i+1)
		default:
			tn := turns[random.IntN(len(turns))]
			if tn.isHeld() {
				tn.setMayRest(true)
				tn.rest()
				tn.setMayRest(false)
				tn.claim()
			}
		}
		used, waiting := 0, 0
		for _, tn := range turns {
			switch {
			case tn.held:
				used++
			case tn.of.fitsLocked(tn.peer):
				t.Fatal("somebody waits who fits")
			default:
				waiting++
			}
		}
		if u, w := s.counts(); u != used || w != waiting || u > 16+len(pods) {
			t.Fatalf("%d used and %d waiting are counted: want %d and %d", u, w, used, waiting)
		}
	}
	for _, tn := range turns {
		tn.leave()
	}
	if u, w := s.counts(); u != 0 || w != 0 || s.pods.Len() != 0 {
		t.Errorf("%d used, %d waiting, %d pods in line in the end", u, w, s.pods.Len())
	}
}

// Peers that begin a handshake and say no more hold a slot each, and no longer
// than the limit. Others get their turn then.
func TestHalfOpenHandshakesAreBounded(t *testing.T) {
	c := newCluster(t)
	client, server, loris := c.pod("client"), c.pod("server"), c.pod("loris")
	const slots = 4 // of 32: one peer has an eighth
	n1 := c.node(nil)
	n2 := c.node(func(cfg *Config) {
		cfg.MaxHandshakes, cfg.HandshakeTimeout, cfg.HandshakePatience = 8*slots, 3*time.Second, 3*time.Second
	})
	n1.enroll(client)
	n2.enroll(server)
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
	await(t, "all slots are taken", func() bool { return n2.count("tacit_inbound_handshakes") == slots })
	say(t, mustDial(t, client, server.at(false, 1)), "others go on meanwhile")
	wg.Wait()
	refused := func(reason string) float64 {
		return n2.count("tacit_refused_connections_total", "direction=inbound", "reason="+reason)
	}
	await(t, "all are counted", func() bool { return refused("timeout")+refused("handshake_limit") == 5*slots })
	if refused("timeout") < slots {
		t.Errorf("%v timed out: want at least %d", refused("timeout"), slots)
	}
	await(t, "all slots are free", func() bool { return n2.count("tacit_inbound_handshakes") == 0 })
}

// Peers that say nothing are waited for, up to a number of them from one address and to
// one pod. Beyond it they are refused, and others are let in.
func TestSilentConnectionsAreBounded(t *testing.T) {
	c := newCluster(t)
	server, loris, other := c.pod("server"), c.pod("loris"), c.pod("other")
	n := c.node(func(cfg *Config) { cfg.MaxConnectionsPerPod = 24 }) // 3 of one address
	n.enroll(server)
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

// at gives p more addresses, of which the World knows, and returns them.
func (p *testPod) more(n int) (all []netip.Addr) {
	p.c.t.Helper()
	var script strings.Builder
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, 77, byte(100 + len(p.c.pods)), byte(i + 1)})
		fmt.Fprintf(&script, "ip addr add %s/16 dev eth0; ", a)
		all = append(all, a)
	}
	p.wl.Addresses = append(p.wl.Addresses, all...)
	p.space.do(p.c.t, func() error { return sh(script.String()) })
	return all
}

// 24 peers stall in their handshakes with one pod. Another pod of the node is not delayed, and nor is
// another peer of that pod.
func TestStalledPeersDelayNobodyElse(t *testing.T) {
	c := newCluster(t)
	client, flooded, other, loris := c.pod("client"), c.pod("flooded"), c.pod("other"), c.pod("loris")
	const peers, most = 24, 256
	n1 := c.node(nil)
	n2 := c.node(func(cfg *Config) { cfg.MaxHandshakes, cfg.HandshakeTimeout = most, time.Minute })
	n1.enroll(client)
	n2.enroll(flooded)
	n2.enroll(other)
	loris.wl.Direct = true
	from := loris.more(peers)
	c.publish()
	flooded.serve(1, echo)
	other.serve(1, echo)
	hello := recordedHello(t)
	for _, addr := range from {
		for i := range most / 8 {
			conn, err := loris.bareFrom(netip.AddrPortFrom(addr, uint16(62000+i)), flooded.at(false, 1))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Write(hello)
		}
	}
	await(t, "they wait", func() bool { return n2.count("tacit_inbound_handshakes_waiting") >= most })
	for _, to := range []*testPod{other, flooded} {
		began := time.Now()
		say(t, mustDial(t, client, to.at(false, 1)), "not delayed")
		if d := time.Since(began); d > limit/4 {
			t.Errorf("to %s it took %v", to.name, d)
		}
	}
	n2.stop()
}

// 24 destinations stall, and others do not even answer a SYN. Another pod of the node is not
// delayed, and nor is that pod on its way to a destination that is well.
func TestStalledDestinationsDelayNobodyElse(t *testing.T) {
	c := newCluster(t)
	client, other, server, tarpit := c.pod("client"), c.pod("other"), c.pod("server"), c.pod("tarpit")
	const peers, most = 24, 256
	n1 := c.node(func(cfg *Config) { cfg.MaxHandshakes, cfg.DialTimeout = most, time.Minute })
	n2 := c.node(nil)
	n1.enroll(client)
	n1.enroll(other)
	n2.enroll(server)
	tarpit.wl.Direct = true
	to := tarpit.more(peers)
	c.publish()
	server.serve(1, echo)
	stalls := make(chan struct{})
	tarpit.serve(1, func(*net.TCPConn) { <-stalls })
	t.Cleanup(func() { close(stalls) })
	tarpit.space.do(t, func() error {
		return sh("nft 'table ip silence { chain c { type filter hook prerouting priority -500; tcp dport 2 drop; }; }'")
	})
	for port := range uint16(2) { // silence at 2, and then 1, where TCP is answered
		for _, addr := range to {
			for range most / 8 {
				conn, err := client.dial(netip.AddrPortFrom(addr, 2-port))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
			}
		}
		if port == 0 {
			await(t, "dials into silence hold nothing", func() bool {
				return n1.proxy.pod(client.name).quota.open.Load() == peers*most/8 && n1.count("tacit_outbound_handshakes")+n1.count("tacit_outbound_handshakes_waiting") == 0
			})
		}
	}
	await(t, "they wait", func() bool { return n1.count("tacit_outbound_handshakes_waiting") >= most })
	for _, from := range []*testPod{other, client} {
		began := time.Now()
		say(t, mustDial(t, from, server.at(false, 1)), "not delayed")
		if d := time.Since(began); d > limit/4 {
			t.Errorf("from %s it took %v", from.name, d)
		}
	}
	n1.stop()
}

// A burst of 5,000 connections from one pod to one other is served, all of it: part by
// handshakes, and part over connections that were kept from those before.
func TestBurstIsServed(t *testing.T) {
	const many = 5000
	if raceEnabled {
		return // it is about load; the other tests are about races
	}
	needDescriptors(t, 3*many)
	c, client, server := pair(t)
	server.serve(1, echo)
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range many {
		conn := mustDial(t, client, server.at(false, 1))
		wg.Go(func() {
			if err := ask(conn); err != nil {
				failed.Add(1)
				t.Log(err)
			}
		})
	}
	most := c.nodes[0].count("tacit_outbound_handshakes_waiting")
	wg.Wait()
	t.Logf("%v waited at once", most)
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d failed", n, many)
	}
	for i, n := range c.nodes {
		if refused := n.count("tacit_refused_connections_total"); refused > 0 {
			t.Errorf("%v were refused by node %d", refused, i+1)
		}
	}
	if n := c.used(0); n < many/10 {
		t.Errorf("%d went over a kept connection: want many", n)
	}
}

// Who waits for a turn does not hold up a World, and goes on under the one of then: the pod
// that it was to reach by direct has left the mesh meanwhile.
func TestWaitingHoldsNoWorld(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.MaxHandshakes, cfg.DialTimeout = 8, time.Minute })
	n.enroll(client)
	server.wl.Direct = true
	c.publish()
	stalls, first := make(chan struct{}), make(chan struct{}, 1)
	first <- struct{}{}
	server.serve(1, func(conn *net.TCPConn) {
		select {
		case <-first:
			<-stalls
		default:
			echo(conn)
		}
	})
	stuck := mustDial(t, client, server.at(false, 1))
	await(t, "one has the slot", func() bool { return n.count("tacit_outbound_handshakes") == 1 })
	waits := mustDial(t, client, server.at(false, 1))
	await(t, "one waits", func() bool { return n.count("tacit_outbound_handshakes_waiting") == 1 })
	if leases := n.proxy.know.current.Load().leases.Load(); leases != 2 {
		t.Errorf("%d leases: want that of the World itself, and that of the handshake", leases)
	}
	server.wl.Direct = false
	before := weak.Make(n.proxy.know.world())
	settled := n.proxy.Apply(c.told())
	for i := 0; i < 100 && before.Value() != nil; i++ {
		runtime.GC()
	}
	if before.Value() != nil {
		t.Error("the World before is kept")
	}
	close(stalls)
	say(t, waits, "in the clear, as it has to be now")
	if err := firstRead(stuck, nil); !isRST(err) {
		t.Errorf("the one that was stuck: %v, want a reset", err)
	}
	<-settled
}

// In a burst those that wait go over what others have left.
func TestWaitersTakeWhatIsKept(t *testing.T) {
	const many = 40
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(func(cfg *Config) { cfg.MaxHandshakes = 8 }), c.node(nil) // one with a peer
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	var wg sync.WaitGroup
	for range many {
		conn := mustDial(t, client, server.at(false, 1))
		wg.Go(func() {
			if err := ask(conn); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := c.used(0); n < many/2 {
		t.Errorf("%d of %d went over a kept connection: want most", n, many)
	}
	await(t, "nobody waits, and nothing is asked for", func() bool {
		d := n1.proxy.pod(client.name)
		d.idle.mu.Lock()
		defer d.idle.mu.Unlock()
		return n1.count("tacit_outbound_handshakes_waiting")+n1.count("tacit_outbound_handshakes") == 0 && len(d.idle.wishes) == 0
	})
}

// An application that resets its connection while that waits gives its place to others. One
// that ends its input may have gone, or wait for an answer: it is served after them.
func TestWhoHasGoneWaitsNoMore(t *testing.T) {
	c := newCluster(t)
	client, tarpit := c.pod("client"), c.pod("tarpit")
	n := c.node(func(cfg *Config) { cfg.MaxHandshakes, cfg.DialTimeout = 8, time.Minute })
	n.enroll(client)
	tarpit.wl.Direct = true
	c.publish()
	stalls := make(chan struct{})
	tarpit.serve(1, func(*net.TCPConn) { <-stalls })
	t.Cleanup(func() { close(stalls) })
	var open []*net.TCPConn
	for range 3 {
		open = append(open, mustDial(t, client, tarpit.at(false, 1)))
	}
	await(t, "two wait", func() bool { return n.count("tacit_outbound_handshakes_waiting") == 2 })
	before := func() *turn { // who is served next
		n.proxy.dialling.mu.Lock()
		defer n.proxy.dialling.mu.Unlock()
		return n.proxy.pod(client.name).dialling.peers[tarpit.v4].queue.Front().Value.(*turn)
	}
	first := before()
	open[1].CloseWrite()
	await(t, "one that may have gone lets the other go first", func() bool { return before() != first })
	open[2].SetLinger(0)
	open[2].Close()
	open[1].SetLinger(0)
	open[1].Close()
	await(t, "none waits", func() bool {
		return n.count("tacit_outbound_handshakes_waiting") == 0 && n.count("tacit_refused_connections_total", "reason=reset") == 2
	})
	n.stop()
}

func TestConnectionsOfAPodAreLimited(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(func(cfg *Config) { cfg.MaxConnectionsPerPod = 3 }), c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
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

// Whoever holds as many connections to a pod as it can get, by one address or by several,
// leaves some for another client and for what the pod itself dials.
func TestConnectionsOfOneClientAreBounded(t *testing.T) {
	c := newCluster(t)
	greedy, other, server := c.pod("greedy"), c.pod("other"), c.pod("server")
	n1, n2 := c.node(nil), c.node(func(cfg *Config) { cfg.MaxConnectionsPerPod = 16 }) // 14 inbound, 8 of one address
	n1.enroll(greedy)
	n1.enroll(other)
	n2.enroll(server)
	server.serve(1, echo)
	other.serve(1, echo)
	fill := func(client *testPod, want int) (open []*net.TCPConn) {
		t.Helper()
		for range want {
			conn := mustDial(t, client, server.at(false, 1))
			say(t, conn, "x")
			open = append(open, conn)
		}
		if err := firstRead(client.dial(server.at(false, 1))); !isRST(err) {
			t.Errorf("%s, connection %d: %v, want a reset", client.name, want+1, err)
		}
		return open
	}
	open := fill(greedy, 8)
	fill(other, 6)
	say(t, mustDial(t, server, other.at(false, 1)), "of the pod itself")
	if n := n2.count("tacit_refused_connections_total", "direction=inbound", "reason=connection_limit"); n != 2 {
		t.Errorf("%v refused: want 2", n)
	}
	for _, conn := range open {
		conn.Close()
	}
	arrivals := n2.proxy.pod(server.name).arrivals
	await(t, "there is room", func() bool { return arrivals.count() == 6 })
}

// Without a free descriptor the accept loop waits, and goes on when there is one.
func TestAcceptSurvivesWithoutDescriptors(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	say(t, mustDial(t, client, server.at(false, 1)), "before")
	waiting := mustDial(t, client, server.at(false, 1)) // has a descriptor before there is none
	say(t, waiting, "open")
	fd := client.plainSockets(t, 4, 1)[0]
	n := c.nodes[0]
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	c.making.Lock() // agents share the proxies' descriptors here
	giveBack := sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
		c.making.Unlock()
	})
	defer giveBack()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	unix.Connect(fd, socket.Address(server.at(false, 1)))
	failures := func() float64 { return n.count("tacit_accept_errors_total") }
	await(t, "accepting has failed twice", func() bool { return failures() >= 2 })
	giveBack()
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
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err := cmp.Or(err, os.NewSyscallError("connect", errno(n))); err != nil {
			return nil, err
		}
		if _, err := unix.Getpeername(fd); err == nil {
			break
		}
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 10)
	}
	return connOf(fd)
}

// errno is nil for 0.
func errno(n int) error {
	if n == 0 {
		return nil
	}
	return unix.Errno(n)
}
