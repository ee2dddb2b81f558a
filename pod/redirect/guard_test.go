package redirect

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// marker is what must never be on the wire.
const marker = "SECRET-salary-of-Ada"

// A wire is what came out of the pod.
type wire struct {
	w  *world
	fd int
}

// watch begins to listen to what arrives at the peer.
func (w *world) watch() *wire {
	w.t.Helper()
	x := &wire{w: w}
	w.do(w.peer, func() (err error) {
		const all = 0x0300 // ETH_P_ALL in network byte order
		x.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		return err
	})
	w.t.Cleanup(func() { unix.Close(x.fd) })
	unix.SetsockoptInt(x.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	return x
}

// clean fails the test if the marker has been seen.
func (x *wire) clean(when string) {
	x.w.t.Helper()
	if x.seen() {
		x.w.t.Errorf("%s: the marker is on the wire, in clear", when)
	}
}

func (x *wire) seen() (seen bool) {
	buf := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(x.fd, buf, 0)
		if err != nil {
			return seen
		}
		seen = seen || bytes.Contains(buf[:n], []byte(marker))
	}
}

// The tests below see what they look for.
func TestWireSeesTheMarker(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		atPeer, wire := w.listen(w.peer, f.any, 9000), w.watch()
		hears(t, "without rules", w.dial(w.pod, f.peer, 9000), w.accept(atPeer))
		if !wire.seen() {
			t.Error("not seen")
		}
	})
}

// flush has conntrack forget everything, as conntrack -F does.
func (w *world) flush() {
	w.t.Helper()
	if err := forget(w.pod, func(*netlink.ConntrackFlow) bool { return true }); err != nil {
		w.t.Fatal(err)
	}
}

// hears waits for the marker at c.
func hears(t *testing.T, what string, from, to net.Conn) {
	t.Helper()
	if _, err := from.Write([]byte(marker)); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	buf := make([]byte, len(marker))
	if n, err := readFull(to, buf); err != nil {
		t.Fatalf("%s: read %q: %v", what, buf[:n], err)
	}
}

func readFull(c net.Conn, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = c.Read(buf[n:])
		n += m
	}
	return n, err
}

// What conntrack forgets leaks nothing, and goes on, whoever speaks first.
func TestForgottenByConntrack(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPod := w.listen(w.pod, f.any, 8080)
		w.apply(Config{})
		wire := w.watch()
		app := w.dial(w.pod, f.peer, 9000)
		proxyOut := w.accept(outbound)
		client := w.dial(w.peer, f.pod, 8080)
		proxyIn := w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		served := w.accept(atPod)
		for _, c := range []struct {
			what     string
			from, to net.Conn
		}{
			{"the application to the proxy", app, proxyOut},
			{"the proxy to the application", proxyOut, app},
			{"the application's answer", served, inner},
			{"the proxy to the server", inner, served},
		} {
			w.flush()
			hears(t, c.what, c.from, c.to)
			wire.clean(c.what)
		}
		w.flush()
		talk(t, "the client to the proxy", client, proxyIn)
		if f.number == 4 {
			w.flush()
			talk(t, "the proxy to the client", proxyIn, client)
		}
	})
}

// The application is the first who speaks after conntrack has forgotten: its client is heard all the same.
func TestForgottenAndTheApplicationSpeaks(t *testing.T) {
	for what, c := range map[string]Config{"": {}, "with exclusions": {ExcludeOutbound: []mesh.Exclusion{{Port: 25}}}} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, w *world, f family) {
				inbound, atPod := w.listen(w.pod, f.any, mesh.InboundPort), w.listen(w.pod, f.any, 8080)
				w.apply(c)
				client := w.dial(w.peer, f.pod, 8080)
				outer := w.accept(inbound)
				inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
				if err != nil {
					t.Fatal(err)
				}
				served := w.accept(atPod)
				w.flush()
				talk(t, "the application to the proxy", served, inner)
				talk(t, "the client to the proxy", client, outer)
				talk(t, "the application to the proxy, again", served, inner)
			})
		})
	}
}

// An application that marks its own listener, so that its sockets have that mark.
func TestMarkedListener(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		inbound := w.listen(w.pod, f.any, mesh.InboundPort)
		atPod := w.listen(w.pod, f.any, 8080)
		setOption(t, atPod, unix.SOL_SOCKET, unix.SO_MARK, 77)
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Prefix: netip.PrefixFrom(f.peer, f.peer.BitLen())}}})
		wire := w.watch()
		client := w.dial(w.peer, f.pod, 8080)
		w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		hears(t, "the application's answer", w.accept(atPod), inner)
		wire.clean("a marked listener")
	})
}

func setOption(t *testing.T, c syscall.Conn, level, option, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
}

func bindToDevice(t *testing.T, c syscall.Conn, device string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
}

// Who binds to an interface is served over lo like everybody.
func TestBoundToAnInterface(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		bound, free := w.listen(w.pod, f.any, 8080), w.listen(w.pod, f.any, 8081)
		bindToDevice(t, bound, "toPeer")
		w.apply(Config{})
		wire := w.watch()
		var app net.Conn
		w.do(w.pod, func() (err error) {
			d := net.Dialer{Timeout: limit, Control: func(_, _ string, raw syscall.RawConn) (err error) {
				raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "toPeer") })
				return err
			}}
			app, err = d.Dial("tcp", netip.AddrPortFrom(f.peer, 9000).String())
			return err
		})
		proxyOut := w.accept(outbound)
		hears(t, "a bound client", w.keep(app), proxyOut)
		talk(t, "a bound client", proxyOut, app)
		for i, l := range []*net.TCPListener{bound, free} {
			client := w.dial(w.peer, f.pod, uint16(8080+i))
			w.accept(inbound)
			inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, uint16(8080+i)))
			if err != nil {
				t.Fatal(err)
			}
			served := w.accept(l)
			bindToDevice(t, served, "toPeer")
			hears(t, "a bound server", served, inner)
			talk(t, "a bound server", inner, served)
		}
		wire.clean("bound to an interface")
	})
}

// What drains is captured until it ends; what is new is not. When the rules go, what is
// left of captured connections is reset.
func TestDrainLeaksNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPeer, atPod := w.listen(w.peer, f.any, 9000), w.listen(w.pod, f.any, 8080)
		w.apply(Config{})
		wire := w.watch()
		app := w.dial(w.pod, f.peer, 9000)
		proxyOut := w.accept(outbound)
		abandoned := w.dial(w.pod, f.peer, 9000)
		w.accept(outbound).Close()
		client := w.dial(w.peer, f.pod, 8080)
		w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		served := w.accept(atPod)
		w.apply(Config{Drain: true})
		w.flush()
		hears(t, "draining: outgoing", app, proxyOut)
		hears(t, "draining: served", served, inner)
		abandoned.Write([]byte(marker))
		wire.clean("draining")
		fresh, freshPeer := w.dial(w.pod, f.peer, 9000), w.accept(atPeer)
		talk(t, "new", fresh, freshPeer)
		w.apply(Config{})
		talk(t, "enrolled again: outgoing", app, proxyOut)
		talk(t, "enrolled again: begun meanwhile", fresh, freshPeer)
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		talk(t, "removed: begun meanwhile", fresh, freshPeer)
		for what, c := range map[string]net.Conn{"outgoing": app, "served": served} {
			if _, err := c.Write([]byte(marker)); err == nil {
				t.Errorf("removed: a captured connection lives on: %s", what)
			}
		}
		wire.clean("removed")
	})
}

// While somebody has taken the rules away nothing leaves, and what was captured goes on when
// they are back.
func TestFlushedRulesLeakNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPod := w.listen(w.pod, f.any, 8080)
		w.listen(w.peer, f.any, 9000)
		w.apply(Config{})
		if err := w.kernel.Gated(); err != nil {
			t.Fatal(err)
		}
		wire := w.watch()
		app := w.dial(w.pod, f.peer, 9000)
		proxyOut := w.accept(outbound)
		client := w.dial(w.peer, f.pod, 8080)
		w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			t.Fatal(err)
		}
		served := w.accept(atPod)
		w.do(w.pod, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
		for what, c := range map[string]net.Conn{"outgoing": app, "served": served} {
			if _, err := c.Write([]byte(marker)); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		for _, way := range []struct{ from, to *netns.NS }{{w.pod, w.peer}, {w.peer, w.pod}} {
			to, port := f.peer, uint16(9000)
			if way.to == w.pod {
				to, port = f.pod, 8080
			}
			if err := way.from.Do(func() error { return tryFor(300*time.Millisecond, netip.AddrPortFrom(to, port)) }); err == nil {
				t.Errorf("a connection to %s begins without rules", to)
			}
		}
		wire.clean("without rules")
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		for what, c := range map[string]net.Conn{"outgoing": proxyOut, "served": inner} {
			if n, err := readFull(c, make([]byte, len(marker))); err != nil {
				t.Errorf("%s, repaired: %d bytes, %v", what, n, err)
			}
		}
		wire.clean("repaired")
	})
}

// withoutGate makes it a kernel that has none.
func (w *world) withoutGate() {
	w.kernel.gated = func() error { return errors.New("none here") }
}

func tryFor(limit time.Duration, to netip.AddrPort) error {
	c, err := net.DialTimeout("tcp", to.String(), limit)
	if err == nil {
		c.Close()
	}
	return err
}

// Rules that were lost and are put back know what is older than the capture, and let
// nothing pass that began meanwhile, as it can where the kernel has no gate.
func TestRepairedKnowsTheOlder(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.withoutGate()
		atPeer := w.listen(w.peer, f.any, 9000)
		old, oldPeer := w.dial(w.pod, f.peer, 9000), w.accept(atPeer)
		w.apply(Config{})
		w.do(w.pod, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
		stray := w.dial(w.pod, f.peer, 9000)
		w.accept(atPeer)
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		wire := w.watch()
		talk(t, "older", old, oldPeer)
		stray.Write([]byte(marker))
		stray.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := stray.Read(make([]byte, 1)); err == nil {
			t.Error("what began without rules goes on")
		}
		wire.clean("repaired")
	})
}

// An agent that died while it changed the rules may have left new connections held back.
func TestRepairEndsAHold(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound := w.listen(w.pod, f.loopback, mesh.OutboundPort)
		w.apply(Config{})
		if err := w.kernel.load(t.Context(), w.pod, hold(Config{})); err != nil {
			t.Fatal(err)
		}
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		w.dial(w.pod, f.peer, 9000)
		w.accept(outbound)
	})
}

// Whoever sweeps finds what is left, whichever part it is.
func TestPresentSeesEachPart(t *testing.T) {
	w := newWorld(t)
	for what, leave := range map[string]func() error{
		"a hold":      func() error { return w.kernel.load(t.Context(), w.pod, hold(Config{})) },
		"rules":       func() error { return w.kernel.load(t.Context(), w.pod, Ruleset(Config{})) },
		"a way to lo": func() error { return w.kernel.lead(w.pod) },
		"a gate":      func() error { return w.kernel.stand(w.pod, standing{gate: true}) },
	} {
		if err := leave(); err != nil {
			t.Fatal(err)
		}
		if has, err := Present(w.pod); err != nil || !has {
			t.Errorf("%s: %v, %v", what, has, err)
		}
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		if has, err := Present(w.pod); err != nil || has {
			t.Errorf("%s, removed: %v, %v", what, has, err)
		}
	}
}

// UDP, which nobody sends again, is not lost while a captured pod drains, is released and is
// captured again.
func TestChangesLoseNoDatagram(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.apply(Config{})
		var at, from net.PacketConn
		w.do(w.peer, func() (err error) {
			at, err = net.ListenPacket("udp", netip.AddrPortFrom(f.peer, 9000).String())
			return err
		})
		defer at.Close()
		w.do(w.pod, func() (err error) {
			from, err = net.ListenPacket("udp", netip.AddrPortFrom(f.pod, 9001).String())
			return err
		})
		defer from.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		sent := make(chan error, 1)
		go func() { sent <- oneByOne(ctx, from, at) }()
		for range 5 {
			w.apply(Config{Drain: true})
			if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
				t.Error(err)
			}
			w.apply(Config{})
		}
		cancel()
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}

// oneByOne sends datagrams, each when the one before has arrived.
func oneByOne(ctx context.Context, from, to net.PacketConn) error {
	for n := uint64(0); ctx.Err() == nil; n++ {
		if _, err := from.WriteTo(binary.BigEndian.AppendUint64(nil, n), to.LocalAddr()); err != nil {
			return err
		}
		to.SetReadDeadline(time.Now().Add(limit))
		b := make([]byte, 8)
		if _, _, err := to.ReadFrom(b); err != nil {
			return fmt.Errorf("datagram %d: %w", n, err)
		}
	}
	return nil
}

// A port that is excluded no more: what was open stays.
func TestOnceExcludedGoesOn(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		atPeer, atPod := w.listen(w.peer, f.any, 25), w.listen(w.pod, f.any, 22)
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Port: 25}}, ExcludeInbound: []uint16{22}})
		out, outPeer := w.dial(w.pod, f.peer, 25), w.accept(atPeer)
		in, inPod := w.dial(w.peer, f.pod, 22), w.accept(atPod)
		w.apply(Config{})
		talk(t, "outgoing", out, outPeer)
		talk(t, "incoming", in, inPod)
		w.flush()
		talk(t, "outgoing, forgotten", outPeer, out)
		talk(t, "incoming, forgotten", inPod, in)
	})
}

// What the guard stops it counts.
func TestGuardCounts(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		w.listen(w.pod, f.any, 8080)
		w.apply(Config{ExcludeInbound: []uint16{22}})
		w.do(w.pod, func() error {
			d := net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{Port: 22}}
			_, err := d.Dial("tcp", netip.AddrPortFrom(f.peer, 9000).String())
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("from an excluded port: %v, want refused", err)
			}
			return nil
		})
		counted, err := Counters(w.pod)
		if err != nil {
			t.Fatal(err)
		}
		if len(counted) != len(Kinds()) || counted["source_port"] != 1 {
			t.Errorf("counted %v", counted)
		}
	})
}

// Nobody is known by a link-local address: in, it is refused; out, it has its scope.
func TestLinkLocal(t *testing.T) {
	w, f := newWorld(t), families()[1]
	outbound := w.listen(w.pod, f.loopback, mesh.OutboundPort)
	w.listen(w.pod, f.any, 8080)
	w.listen(w.pod, f.any, mesh.InboundPort)
	w.apply(Config{})
	ofPod, ofPeer := w.linkLocal(w.pod, "toPeer"), w.linkLocal(w.peer, "toPod")
	err := w.peer.Do(func() error { return try(netip.AddrPortFrom(ofPod.WithZone("toPod"), 8080)) })
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("from a link-local address: %v, want refused", err)
	}
	app := w.dial(w.pod, ofPeer.WithZone("toPeer"), 9000)
	proxy := w.accept(outbound)
	if got := addrPort(proxy.LocalAddr()); got.Addr().WithZone("") != ofPeer {
		t.Errorf("the proxy sees %s dialled, want %s", got, ofPeer)
	}
	talk(t, "to a link-local address", app, proxy)
}

// linkLocal waits for the address that the kernel makes.
func (w *world) linkLocal(ns *netns.NS, name string) (a netip.Addr) {
	w.t.Helper()
	w.do(ns, func() error {
		for end := time.Now().Add(limit); time.Now().Before(end); {
			out, err := exec.Command("ip", "-6", "-o", "addr", "show", "dev", name, "scope", "link", "-tentative").Output()
			if fields := strings.Fields(string(out)); err == nil && len(fields) > 3 {
				a = netip.MustParsePrefix(fields[3]).Addr()
				return nil
			}
		}
		return errors.New("no link-local address")
	})
	return a
}

// At an address at which the mesh does not know the pod nobody would speak TLS.
func TestOtherAddressesAreRefused(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		other := netip.MustParseAddr(map[int]string{4: "10.77.0.9", 6: "fd77::9"}[f.number])
		w.do(w.pod, func() error { return addAddress("toPeer", other) })
		inbound, atPod := w.listen(w.pod, f.any, mesh.InboundPort), w.listen(w.pod, f.any, 8080)
		older := w.dial(w.peer, other, 8080)
		olderApp := w.accept(atPod)
		var own []netip.Addr
		for _, f := range families() {
			own = append(own, f.pod)
		}
		w.apply(Config{Own: own, ExcludeInbound: []uint16{22}})
		talk(t, "older", older, olderApp)
		if err := w.peer.Do(func() error { return try(netip.AddrPortFrom(other, 8080)) }); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("to an address that is not known: %v, want refused", err)
		}
		if n, err := Counters(w.pod); err != nil || n["other_address"] != 1 {
			t.Errorf("counted %v, %v", n, err)
		}
		talk(t, "to a known one", w.dial(w.peer, f.pod, 8080), w.accept(inbound))
		excluded := w.listen(w.pod, f.any, 22)
		talk(t, "to an excluded port", w.dial(w.peer, other, 22), w.accept(excluded))
		w.apply(Config{Own: append(own, other)})
		talk(t, "known by now", w.dial(w.peer, other, 8080), w.accept(inbound))
		talk(t, "older, still", older, olderApp)
	})
}

// What others may reach the pod by: no address of lo, of the link, or within.
func TestAddressesByWhichOthersReachIt(t *testing.T) {
	w := newWorld(t)
	w.within()
	w.do(w.pod, func() error { return addAddress("lo", netip.MustParseAddr("10.99.0.1")) })
	got, err := Addresses(w.pod)
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Addr{netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("10.88.0.1"), netip.MustParseAddr("fd77::2"), netip.MustParseAddr("fd88::1")}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
