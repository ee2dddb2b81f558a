package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/socket"
)

// A destination or port that is excluded from now on: what was captured stays so.
func TestExcludedLaterStaysCaptured(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPeer, atPod := w.listen(w.peer, f.any, 25), w.listen(w.pod, f.any, 22)
		w.apply(Config{})
		wire := w.watch()
		defer wire.clean("excluded")
		out := w.dial(w.pod, f.peer, 25)
		proxyOut := w.accept(outbound)
		var from net.Conn // from a port that is excluded later
		w.do(w.pod, func() (err error) {
			d := net.Dialer{Timeout: limit, LocalAddr: &net.TCPAddr{Port: 2222}}
			from, err = d.Dial("tcp", netip.AddrPortFrom(f.peer, 9000).String())
			return err
		})
		proxyFrom := w.accept(outbound)
		client := w.dial(w.peer, f.pod, 22)
		proxyIn := w.accept(inbound)
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 22))
		if err != nil {
			t.Fatal(err)
		}
		served := w.accept(atPod)
		excluded := Config{ExcludeOutbound: []mesh.Exclusion{{Port: 25}}, ExcludeInbound: []uint16{22, 2222}}
		w.apply(excluded)
		for _, c := range []struct {
			what     string
			from, to net.Conn
		}{
			{"outgoing", out, proxyOut},
			{"outgoing, to the application", proxyOut, out},
			{"from a port", w.keep(from), proxyFrom},
			{"served", served, inner},
			{"served, to the application", inner, served},
		} {
			hears(t, c.what, c.from, c.to)
		}
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Port: 25}}})
		w.flush()
		hears(t, "outgoing, under the rules after those", out, proxyOut)
		talk(t, "the client to the proxy", client, proxyIn)
		talk(t, "the proxy to the client", proxyIn, client)
		fresh, freshPeer := w.dial(w.pod, f.peer, 25), w.accept(atPeer)
		talk(t, "new", fresh, freshPeer)
	})
}

// More captured connections than a set holds are not forgotten: whoever asks resets them.
func TestMostTellsTheOthers(t *testing.T) {
	var flows []flow
	for i := range 2 * (maxFlows + 3) {
		a := netip.AddrFrom4([4]byte{10, 0, 0, 1})
		if i%2 == 0 {
			a = netip.MustParseAddr("fd00::1")
		}
		f := flow{netip.AddrPortFrom(a, uint16(i/2+1)), netip.AddrPortFrom(a, 80)}
		flows = append(flows, f, f)
	}
	held, others := most(flows)
	if len(held) != 2*maxFlows || len(others) != 6 {
		t.Errorf("%d held and %d others, want %d and 6", len(held), len(others), 2*maxFlows)
	}
}

// vanish closes c without a packet from its namespace: as if its machine had been switched off.
func (w *world) vanish(ns *netns.NS, c *net.TCPConn) {
	w.t.Helper()
	nft := func(text string) {
		w.do(ns, func() error {
			out, err := exec.Command("nft", text).CombinedOutput()
			return errors.Join(err, errorOf(out))
		})
	}
	nft("table inet off { chain out { type filter hook output priority 0; meta l4proto tcp drop; }; }")
	c.SetLinger(0)
	c.Close()
	nft("delete table inet off")
}

// A client whose machine began anew uses the port of a connection that is older than the
// capture, and that conntrack, and maybe the application, still know.
func TestClientOfAnOlderConnectionComesAgain(t *testing.T) {
	const port = 45678
	for what, end := range map[string]func(*net.TCPConn){
		"still open":   func(*net.TCPConn) {},
		"reset unseen": func(app *net.TCPConn) { app.SetLinger(0); app.Close() },
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, w *world, f family) {
				to := netip.AddrPortFrom(f.pod, 8080)
				inbound, atPod := w.listen(w.pod, f.any, mesh.InboundPort), w.listen(w.pod, f.any, 8080)
				older := w.dialFrom(w.peer, port, to)
				olderApp := w.accept(atPod)
				w.apply(Config{})
				talk(t, "older", older, olderApp)
				w.vanish(w.peer, older)
				end(olderApp)
				wire := w.watch()
				client := w.dialFrom(w.peer, port, to)
				outer := w.accept(inbound) // and not the application
				talk(t, "again", client, outer)
				inner, err := w.inner(f, netip.AddrPortFrom(f.peer, port), to)
				if err != nil {
					t.Fatal(err)
				}
				app := w.accept(atPod)
				hears(t, "the application's answer", app, inner)
				wire.clean("again")
				if _, err := olderApp.Read(make([]byte, 1)); err == nil {
					t.Error("the older connection lives on")
				}
				w.apply(Config{Drain: true})
				talk(t, "draining", client, outer)
				w.apply(Config{})
				talk(t, "captured again", client, outer)
			})
		})
	}
}

// Somebody who only pretends to be the client of an older connection does not end it.
func TestPretendedSynEndsNoOlderConnection(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		const port = 45678
		to := netip.AddrPortFrom(f.pod, 8080)
		w.listen(w.pod, f.any, mesh.InboundPort)
		atPod := w.listen(w.pod, f.any, 8080)
		older := w.dialFrom(w.peer, port, to)
		app := w.accept(atPod)
		w.apply(Config{})
		talk(t, "older", older, app)
		for range 3 {
			w.sendSyn(f, port, to)
		}
		talk(t, "older, after others have sent its SYN", older, app)
		talk(t, "older, after others have sent its SYN", app, older)
	})
}

// sendSyn sends a lone SYN from the peer's address.
func (w *world) sendSyn(f family, port uint16, to netip.AddrPort) {
	w.t.Helper()
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, port)
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], 12345)
	tcp[12], tcp[13] = 5<<4, 2 // length, SYN
	binary.BigEndian.PutUint16(tcp[14:], 1000)
	pseudo := append(f.peer.AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(tcp)))
	sum := uint32(0)
	for b := append(pseudo, tcp...); len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	domain := unix.AF_INET
	if f.number == 6 {
		domain = unix.AF_INET6
	}
	w.do(w.peer, func() error {
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, tcp, 0, socket.Address(netip.AddrPortFrom(to.Addr(), 0)))
	})
}

// The ends of a captured connection that is over may be those of one that is not captured:
// while the pod drains, and where its port is excluded by now.
func TestEndsOfACapturedOneServeAgain(t *testing.T) {
	const port = 45678
	for what, later := range map[string]Config{"draining": {Drain: true}, "excluded": {ExcludeInbound: []uint16{8080}}} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, w *world, f family) {
				to := netip.AddrPortFrom(f.pod, 8080)
				inbound, atPod := w.listen(w.pod, f.any, mesh.InboundPort), w.listen(w.pod, f.any, 8080)
				w.apply(Config{})
				client := w.dialFrom(w.peer, port, to)
				outer := w.accept(inbound)
				inner, err := w.inner(f, addrPort(client.LocalAddr()), to)
				if err != nil {
					t.Fatal(err)
				}
				app := w.accept(atPod)
				w.apply(later)
				wire := w.watch()
				hears(t, "captured before", app, inner)
				wire.clean("captured before")
				closeBoth(t, app, inner) // the application's end waits
				closeBoth(t, outer, client)
				began := time.Now()
				fresh := w.dialFrom(w.peer, port, to)
				if took := time.Since(began); took > 900*time.Millisecond {
					t.Errorf("connected after %v: an answer was lost", took)
				}
				talk(t, "new, with the same ends", fresh, w.accept(atPod))
			})
		})
	}
}

// A connection whose answer is lost while the rules come, as when an interface gets its first
// clsact: the application and the proxy both answer it then, and the client must hear one,
// before or after the application has given up.
func TestAnsweredWhileTheRulesCame(t *testing.T) {
	for what, wait := range map[string]func(*world){
		"at once": func(*world) {},
		"by both": func(w *world) {
			w.answering(mesh.InboundPort)
			w.givenUp()
		},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, w *world, f family) {
				inbound := w.listen(w.pod, f.any, mesh.InboundPort)
				w.listen(w.pod, f.any, 8080)
				nft := func(text string) {
					w.do(w.peer, func() error {
						out, err := exec.Command("nft", text).CombinedOutput()
						return errors.Join(err, errorOf(out))
					})
				}
				nft("table inet deaf { chain in { type filter hook input priority 0; meta l4proto tcp drop; }; }")
				dialled := make(chan error, 1)
				go func() {
					dialled <- w.peer.Do(func() error { return tryFor(4*limit, netip.AddrPortFrom(f.pod, 8080)) })
				}()
				w.answering(8080)
				w.apply(Config{})
				wait(w)
				nft("delete table inet deaf")
				if err := <-dialled; err != nil {
					t.Errorf("%v, want connected", err)
				}
				w.accept(inbound)
			})
		})
	}
}

// answering waits until something of the pod's answers a connection at that port, and is not
// answered.
func (w *world) answering(port uint16) {
	w.t.Helper()
	w.sees(fmt.Sprintf("an answer of port %d", port), func() (bool, error) {
		all, err := sockets(w.pod)
		return slices.ContainsFunc(all, func(s connection) bool { return s.state == netlink.TCP_SYN_RECV && s.local.Port() == port }), err
	})
}

// givenUp waits until no connection counts as older.
func (w *world) givenUp() {
	w.t.Helper()
	w.sees("the end of what is older", func() (bool, error) {
		older, _, err := held(w.pod, "older")
		return len(older) == 0, err
	})
}

func (w *world) sees(what string, is func() (bool, error)) {
	w.t.Helper()
	for end := time.Now().Add(2 * limit); time.Now().Before(end); {
		if seen, err := is(); err != nil || seen {
			if err != nil {
				w.t.Fatal(err)
			}
			return
		}
	}
	w.t.Fatalf("%s: not within %v", what, 2*limit)
}
