package redirect

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// each runs a test for IPv4 and for IPv6, in a world of its own.
func each(t *testing.T, f func(t *testing.T, w *world, f family)) {
	for _, fam := range families() {
		t.Run(fam.name, func(t *testing.T) { f(t, newWorld(t), fam) })
	}
}

func TestOutboundIsRedirected(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound := w.listen(w.pod, f.loopback, mesh.OutboundPort)
		w.apply(Config{})
		app := w.dial(w.pod, f.peer, 9000) // nobody listens there
		proxy := w.accept(outbound)
		want := netip.AddrPortFrom(f.peer, 9000)
		if got := addrPort(proxy.LocalAddr()); got != want {
			t.Errorf("original destination %s, want %s", got, want)
		}
		if got := addrPort(app.RemoteAddr()); got != want {
			t.Errorf("the application sees %s as its peer, want %s", got, want)
		}
		talk(t, "outbound", app, proxy)
	})
}

func TestInboundIsRedirected(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		w.apply(Config{})
		client := w.dial(w.peer, f.pod, 8080)
		proxy := w.accept(inbound)
		if got, want := dialled(t, f, proxy), netip.AddrPortFrom(f.pod, 8080); got != want {
			t.Errorf("original destination %s, want %s", got, want)
		}
		if got, want := addrPort(proxy.RemoteAddr()), addrPort(client.LocalAddr()); got != want {
			t.Errorf("the proxy sees %s as its peer, want %s", got, want)
		}
		talk(t, "inbound", client, proxy)
	})
}

// A connection that came in is open until both ends have ended it; one that waits to be
// forgotten is not, and a listener is none.
// A client has one port for two ports of the pod: the two connections stay apart.
func TestOnePortForTwo(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		w.apply(Config{})
		first := w.dial(w.peer, f.pod, 8080)
		atFirst := w.accept(inbound)
		second := w.dialFrom(w.peer, int(addrPort(first.LocalAddr()).Port()), netip.AddrPortFrom(f.pod, 8081))
		atSecond := w.accept(inbound)
		talk(t, "the second", second, atSecond)
		talk(t, "the first", first, atFirst)
	})
}

func TestHasOpen(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		is := func(want bool) {
			t.Helper()
			var open bool
			var err error
			for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); { // the last ACK may be on its way
				if open, err = HasOpen(w.pod); open == want || err != nil {
					break
				}
			}
			if open != want || err != nil {
				t.Errorf("open: %v, %v, want %v", open, err, want)
			}
		}
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		w.apply(Config{})
		is(false)
		client := w.dial(w.peer, f.pod, 8080)
		proxy := w.accept(inbound)
		is(true)
		proxy.Close() // first: it keeps TIME_WAIT
		is(true)
		client.Close()
		is(false)
	})
}

// The application sees the client's address, and its port as well: the outer and
// the inner connection have both in common.
func TestInnerConnectionHasTheClientsAddress(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		listener := w.listen(w.pod, f.any, 8080)
		w.apply(Config{})
		client := w.dial(w.peer, f.pod, 8080)
		outer := w.accept(inbound)
		from := addrPort(client.LocalAddr())
		inner, err := w.inner(f, from, netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		app := w.accept(listener)
		if got := addrPort(app.RemoteAddr()); got != from {
			t.Errorf("the application sees %s as its peer, want %s", got, from)
		}
		for range 3 {
			talk(t, "inner", inner, app)
			talk(t, "outer", client, outer)
		}
		app.SetLinger(0)
		app.Close()
		if _, err := inner.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read after the application's reset: %v", err)
		}
		talk(t, "outer, after the inner one", client, outer)
	})
}

// The kernel answers a SYN to a closed port by itself, without a socket.
func TestClosedPortIsRefusedAtOnce(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.apply(Config{})
		for range 3 {
			begin := time.Now()
			_, err := w.inner(f, netip.AddrPortFrom(f.peer, 40000), netip.AddrPortFrom(f.pod, 8080))
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatalf("dial of a closed port: %v", err)
			}
			if d := time.Since(begin); d > time.Second {
				t.Errorf("refused after %v", d)
			}
		}
	})
}

func TestLeftAlone(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.apply(Config{
			ExcludeOutbound: []mesh.Exclusion{{Port: 25}, {Prefix: netip.PrefixFrom(f.peer, f.peer.BitLen()), Port: 26}},
			ExcludeInbound:  []uint16{22},
		})
		// Nobody listens at the capture ports: what is captured is refused.
		for what, dial := range map[string]func() (net.Conn, net.Conn){
			"loopback": func() (net.Conn, net.Conn) {
				l := w.listen(w.pod, f.loopback, 5000)
				return w.dial(w.pod, f.loopback, 5000), w.accept(l)
			},
			"own address": func() (net.Conn, net.Conn) {
				l := w.listen(w.pod, f.pod, 5001)
				return w.dial(w.pod, f.pod, 5001), w.accept(l)
			},
			"excluded port": func() (net.Conn, net.Conn) {
				l := w.listen(w.peer, f.any, 25)
				return w.dial(w.pod, f.peer, 25), w.accept(l)
			},
			"excluded address": func() (net.Conn, net.Conn) {
				l := w.listen(w.peer, f.any, 26)
				return w.dial(w.pod, f.peer, 26), w.accept(l)
			},
			"excluded inbound": func() (net.Conn, net.Conn) {
				l := w.listen(w.pod, f.any, 22)
				return w.dial(w.peer, f.pod, 22), w.accept(l)
			},
			"the proxy's own": func() (net.Conn, net.Conn) {
				l := w.listen(w.peer, f.any, 5002)
				c, err := w.inner(f, netip.AddrPort{}, netip.AddrPortFrom(f.peer, 5002))
				if err != nil {
					t.Fatal(err)
				}
				return c, w.accept(l)
			},
		} {
			a, b := dial()
			talk(t, what, a, b)
		}
	})
}

// TestProbes: the node reaches what it probes, past the proxy, and is refused where
// nobody listens; at other ports it is captured like everybody.
func TestProbes(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.apply(Config{ProbePorts: []uint16{8080, 8081}})
		l := w.listen(w.pod, f.any, 8080)
		a, b := w.dial(w.peer, f.pod, 8080), w.accept(l)
		talk(t, "probe", a, b)
		proxy := w.listen(w.pod, f.any, mesh.InboundPort)
		for port, want := range map[uint16]error{8081: unix.ECONNREFUSED, 8082: nil} {
			err := w.peer.Do(func() error { return try(netip.AddrPortFrom(f.pod, port)) })
			if !errors.Is(err, want) {
				t.Errorf("port %d: %v, want %v", port, err, want)
			}
		}
		w.accept(proxy)
	})
}

// TestProbesOfOthers: who is not the node is captured at probed ports too.
func TestProbesOfOthers(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.kernel.refuse = func() bool { return true } // to see at once where it went
		w.apply(Config{ProbePorts: []uint16{8080}})
		w.listen(w.pod, f.any, 8080)
		other := netip.MustParseAddr(map[int]string{4: "10.77.0.9", 6: "fd77::9"}[f.number])
		w.do(w.peer, func() error { return addAddress("toPod", other) })
		err := w.peer.Do(func() error { return tryFrom(other, netip.AddrPortFrom(f.pod, 8080)) })
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v, want refused: it went past the proxy", err)
		}
	})
}

// While agent and proxy are replaced, a connection waits for the next.
func TestCapturedWithoutProxyWaits(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.apply(Config{})
		for what, c := range map[string]struct {
			from *netns.NS
			to   netip.AddrPort
			at   netip.AddrPort
		}{
			"outbound": {w.pod, netip.AddrPortFrom(f.peer, 9000), netip.AddrPortFrom(f.loopback, mesh.OutboundPort)},
			"inbound":  {w.peer, netip.AddrPortFrom(f.pod, 8080), netip.AddrPortFrom(f.any, mesh.InboundPort)},
		} {
			dialled := make(chan error, 1)
			go func() { dialled <- c.from.Do(func() error { return try(c.to) }) }()
			select {
			case err := <-dialled:
				t.Fatalf("%s: %v before anybody listens", what, err)
			case <-time.After(100 * time.Millisecond): // the SYN is on its way, and lost
			}
			w.listen(w.pod, c.at.Addr(), c.at.Port())
			if err := <-dialled; err != nil {
				t.Errorf("%s: %v, want that it waits", what, err)
			}
		}
	})
}

// A client's port that is used again meets what the last connection has left: a socket
// in TIME_WAIT, and the connection waits for nothing.
func TestUsedPortsWaitForNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		l := w.listen(w.pod, f.any, mesh.InboundPort)
		w.apply(Config{})
		for range 3 {
			began := time.Now()
			client := w.dialFrom(w.peer, 45678, netip.AddrPortFrom(f.pod, 8080))
			if took := time.Since(began); took > 900*time.Millisecond {
				t.Errorf("connected after %v: the SYN was lost", took)
			}
			server := w.accept(l)
			closeBoth(t, server, client) // so it is the server's end that waits
		}
	})
}

// Where the kernel cannot tell whether somebody listens, it is refused.
func TestCapturedWithoutProxyIsRefused(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.kernel.refuse = func() bool { return true }
		w.listen(w.pod, f.any, 8080)
		w.apply(Config{})
		err := w.peer.Do(func() error { return try(netip.AddrPortFrom(f.pod, 8080)) })
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v, want refused: it went past the proxy", err)
		}
	})
}

func try(a netip.AddrPort) error { return tryFrom(netip.Addr{}, a) }

func tryFrom(own netip.Addr, a netip.AddrPort) error {
	d := net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{IP: own.AsSlice()}}
	c, err := d.Dial("tcp", a.String())
	if err == nil {
		c.Close()
	}
	return err
}

// What was there before enrolling goes on through every change of the rules.
func TestEstablishedIsUntouched(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		atPeer, atPod := w.listen(w.peer, f.any, 9000), w.listen(w.pod, f.any, 8080)
		out := w.dial(w.pod, f.peer, 9000)
		outPeer := w.accept(atPeer)
		in := w.dial(w.peer, f.pod, 8080)
		inPod := w.accept(atPod)
		check := func(when string) {
			talk(t, when+": outgoing", out, outPeer)
			talk(t, when+": incoming", in, inPod)
		}
		check("before")
		w.apply(Config{})
		check("captured")
		w.apply(Config{})
		check("captured again")
		w.apply(Config{Drain: true})
		check("draining")
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		check("removed")
	})
}

// Draining captures nothing new, and what goes through the proxy goes on.
func TestDrainKeepsRelayedConnections(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPeer, atPod := w.listen(w.peer, f.any, 9000), w.listen(w.pod, f.any, 8080)
		w.apply(Config{})
		app := w.dial(w.pod, f.peer, 9000)
		proxyOut := w.accept(outbound)
		client := w.dial(w.peer, f.pod, 8080)
		proxyIn := w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		served := w.accept(atPod)
		for _, c := range []Config{{Drain: true}, {}, {Drain: true}} {
			w.apply(c)
			talk(t, "outbound", app, proxyOut)
			talk(t, "inbound", client, proxyIn)
			talk(t, "inner", inner, served)
		}
		talk(t, "new outgoing", w.dial(w.pod, f.peer, 9000), w.accept(atPeer))
		talk(t, "new incoming", w.dial(w.peer, f.pod, 8080), w.accept(atPod))
		proxyIn.CloseWrite()
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("end of a draining connection: %v, want EOF", err)
		}
	})
}

// state is all of the pod that rules could be found in, less the routes that the
// kernel makes by itself, some of them a moment after the address.
func (w *world) state() string {
	w.t.Helper()
	var all strings.Builder
	for _, c := range []string{
		"nft list ruleset", "ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all", "ss -Hltn",
		"tc filter show dev toPeer egress",
	} {
		w.do(w.pod, func() error {
			arg := strings.Fields(c)
			out, err := exec.Command(arg[0], arg[1:]...).CombinedOutput()
			all.WriteString("# " + c + "\n")
			for line := range strings.Lines(string(out)) {
				if !strings.Contains(line, "proto kernel") {
					all.WriteString(line)
				}
			}
			return err
		})
	}
	return all.String()
}

func TestRemoveLeavesNothing(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	w.apply(Config{})
	if w.state() == before {
		t.Fatal("Apply changed nothing that this test sees")
	}
	for range 2 {
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, w.state()); d != "" {
			t.Errorf("left after Remove (-before +after):\n%s", d)
		}
	}
}

// A pod that leaves and comes back: what conntrack knew of its connections must
// not be applied to others that have the same ports now.
func TestRemoveForgetsConnections(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		const port = 40001
		to := netip.AddrPortFrom(f.pod, 8080)
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		atPod := w.listen(w.pod, f.any, 8080)
		before := w.dialFrom(w.peer, port+1, to)
		beforeApp := w.accept(atPod)
		w.apply(Config{})
		talk(t, "older than the capture", before, beforeApp)
		client := w.dialFrom(w.peer, port, to)
		outer := w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), to)
		if err != nil {
			t.Fatal(err)
		}
		app := w.accept(atPod)
		talk(t, "captured", client, outer)
		talk(t, "inner", inner, app)
		closeBoth(t, outer, client)
		closeBoth(t, app, inner)
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		closeBoth(t, beforeApp, before)

		plain := w.dialFrom(w.peer, port, to)
		plainApp := w.accept(atPod)
		talk(t, "outside the mesh", plain, plainApp)
		w.apply(Config{})
		talk(t, "in again", plain, plainApp)
		w.dialFrom(w.peer, port+1, to)
		w.accept(inbound) // and not the application
	})
}

// A pod may translate connections of its own; they outlive us.
func TestRemoveLeavesOthersTranslations(t *testing.T) {
	w, f := newWorld(t), families()[0]
	w.do(w.pod, func() error {
		return exec.Command("nft", "add table ip other; add chain ip other theirs { type nat hook prerouting priority -150; }; add rule ip other theirs tcp dport 7000 redirect to :7001").Run()
	})
	atPod := w.listen(w.pod, f.any, 7001)
	client := w.dial(w.peer, f.pod, 7000)
	app := w.accept(atPod)
	w.apply(Config{})
	talk(t, "captured", client, app)
	if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
		t.Fatal(err)
	}
	talk(t, "removed", client, app)
}

// Somebody deletes the table, and it is put back: what is relayed goes on, and
// what ended meanwhile leaves no hole. (With a gate nothing ends meanwhile.)
func TestRepair(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.withoutGate()
		const port = 40001
		to := netip.AddrPortFrom(f.pod, 8080)
		inbound, atPod := w.listen(w.pod, f.any, mesh.InboundPort), w.listen(w.pod, f.any, 8080)
		old := w.dialFrom(w.peer, port, to)
		oldApp := w.accept(atPod)
		w.apply(Config{})
		talk(t, "older than the capture", old, oldApp)
		client := w.dial(w.peer, f.pod, 8080)
		outer := w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), to)
		if err != nil {
			t.Fatal(err)
		}
		app := w.accept(atPod)
		w.do(w.pod, func() error { return exec.Command("nft", "delete", "table", "inet", "tacit").Run() })
		closeBoth(t, oldApp, old)
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		talk(t, "outer", client, outer)
		talk(t, "inner", inner, app)
		w.dialFrom(w.peer, port, to)
		w.accept(inbound) // and not the application
	})
}

func TestCheckSeesEveryChange(t *testing.T) {
	w := newWorld(t)
	for _, c := range []Config{{}, {ExcludeInbound: []uint16{22}}, {Drain: true}} {
		if err := w.kernel.Check(t.Context(), w.pod, c); !errors.Is(err, ErrRules) {
			t.Errorf("before: %v, want ErrRules", err)
		}
		w.apply(c)
	}
	w.apply(Config{})
	for _, change := range []string{
		"nft delete table inet tacit",
		"nft flush chain inet tacit outbound",
		"nft insert rule inet tacit inbound accept",
		"nft add chain inet tacit more",
		"nft add table inet tacit { flags dormant ; }",
		"ip rule del priority 100",
		"ip -6 rule del priority 100",
		"ip route flush table 31425",
		"ip -6 route flush table 31425",
		"tc filter del dev toPeer egress",
		"tc qdisc del dev toPeer clsact",
	} {
		arg := strings.Fields(change)
		w.do(w.pod, func() error {
			out, err := exec.Command(arg[0], arg[1:]...).CombinedOutput()
			if err != nil {
				t.Errorf("%s: %s", change, out)
			}
			return nil
		})
		if err := w.kernel.Check(t.Context(), w.pod, Config{}); !errors.Is(err, ErrRules) {
			t.Errorf("after %s: %v, want ErrRules", change, err)
		}
		w.apply(Config{}) // checks
	}
}

func TestWatchSeesOthers(t *testing.T) {
	w := newWorld(t)
	w.apply(Config{})
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		done <- Watch(ctx, w.pod, func() {
			select {
			case seen <- struct{}{}:
			default:
			}
		})
	}()
	for i, change := range []string{"nft add table inet other", "ip rule del priority 100", "ip -6 route flush table 31425"} {
		// The first change may come before the watch: it is made until it is seen.
		for end := time.Now().Add(limit); ; {
			arg := strings.Fields(change)
			w.do(w.pod, func() error { exec.Command(arg[0], arg[1:]...).Run(); return nil })
			patience := limit
			if i == 0 {
				patience = 50 * time.Millisecond
			}
			select {
			case <-seen:
			case <-time.After(patience):
				if i == 0 && time.Now().Before(end) {
					continue
				}
				t.Fatalf("%s: not seen", change)
			}
			break
		}
		for len(seen) > 0 {
			<-seen
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch after its end: %v", err)
	}
}

func TestWithoutIPv6(t *testing.T) {
	w := newWorld(t)
	w.do(w.pod, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	before := w.state()
	w.apply(Config{})
	if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, w.state()); d != "" {
		t.Errorf("left after Remove (-before +after):\n%s", d)
	}
}
