package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// A machine within the pod, which forwards for it: what it says does not leave, but to
// what is excluded.
func TestForwarded(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		within := w.within()
		atPeer := w.listen(w.peer, f.any, 9000)
		older := w.dial(within, f.peer, 9000)
		olderPeer := w.accept(atPeer)
		talk(t, "before", older, olderPeer)
		w.apply(Config{})
		wire := w.watch()
		older.Write([]byte(marker))
		err := within.Do(func() error { return try(netip.AddrPortFrom(f.peer, 9000)) })
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("from within the pod: %v, want refused", err)
		}
		wire.clean("forwarded")
		if n, err := Counters(w.pod); err != nil || n["forwarded"] == 0 || n["outgoing"] != 0 {
			t.Errorf("counted %v, %v", n, err)
		}
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Port: 9000}}})
		talk(t, "excluded", w.dial(within, f.peer, 9000), w.accept(atPeer))
	})
}

// within makes a machine within the pod, with addresses of its own, which the pod forwards for.
func (w *world) within() *netns.NS {
	w.t.Helper()
	within := w.namespace()
	w.cable(within, "toOuter", "toInner")
	a := netip.MustParseAddr
	w.do(w.pod, func() error {
		for _, family := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+family, []byte("1"), 0); err != nil {
				return err
			}
		}
		l, err := netlink.LinkByName("toInner")
		if err == nil {
			err = errors.Join(addAddress("toInner", a("10.88.0.1")), addAddress("toInner", a("fd88::1")), netlink.LinkSetUp(l))
		}
		return err
	})
	w.do(within, func() error { return configure("toOuter", a("10.88.0.2"), a("fd88::2"), a("10.88.0.1"), a("fd88::1")) })
	w.plugged(within, "toOuter")
	w.settle(within, a("fd88::2"))
	return within
}

// translate has the pod translate for what is within it, as docker and KubeVirt do: out by
// masquerade, and in from port 8080 to port 80 within.
func (w *world) translate() {
	w.t.Helper()
	w.do(w.pod, func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(`table inet docker {
	chain post {
		type nat hook postrouting priority srcnat;
		ip saddr 10.88.0.0/24 oifname toPeer masquerade
		ip6 saddr fd88::/64 oifname toPeer masquerade
	}
	chain pre {
		type nat hook prerouting priority dstnat;
		iifname toPeer meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.2:80
		iifname toPeer meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd88::2]:80
	}
}`)
		out, err := cmd.CombinedOutput()
		return errors.Join(err, errorOf(out))
	})
}

func errorOf(out []byte) error {
	if len(out) == 0 {
		return nil
	}
	return errors.New(string(out))
}

// What was forwarded before the pod was enrolled goes on, whatever happens to rules and
// conntrack; what begins does not.
func TestForwardedBeforeGoesOn(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		within := w.within()
		w.translate()
		atPeer, atWithin, outbound := w.listen(w.peer, f.any, 9000), w.listen(within, f.any, 80), w.listen(w.pod, f.loopback, mesh.OutboundPort)
		out := w.dial(within, f.peer, 9000)
		outPeer := w.accept(atPeer)
		in := w.dial(w.peer, f.pod, 8080)
		inWithin := w.accept(atWithin)
		goesOn := func(when string) {
			t.Helper()
			talk(t, when+": outgoing", out, outPeer)
			talk(t, when+": incoming", in, inWithin)
		}
		w.apply(Config{})
		goesOn("captured")
		talk(t, "a new one", w.dial(within, f.peer, 9000), w.accept(outbound))
		w.flush()
		goesOn("forgotten by conntrack")
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Port: 25}}})
		goesOn("other rules")
		w.apply(Config{Drain: true})
		goesOn("draining")
		w.apply(Config{})
		goesOn("enrolled again")
		w.do(w.pod, func() error { return exec.Command("nft", "delete", "table", "inet", "tacit").Run() })
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		goesOn("repaired")
		port := int(addrPort(out.LocalAddr()).Port())
		out.SetLinger(0)
		out.Close()
		if _, err := outPeer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the end of an older one: %v", err)
		}
		outPeer.Close()
		wire := w.watch()
		again := w.dialFrom(within, port, netip.AddrPortFrom(f.peer, 9000))
		hears(t, "a new one with the ports of an older one", again, w.accept(outbound))
		wire.clean("the ports of an older one")
	})
}

// A container behind the pod opens connections as a process of the pod does: the proxy has
// them, and nothing of them leaves in clear, whatever happens to rules and conntrack.
func TestForwardedIsCaptured(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		within := w.within()
		w.translate()
		outbound, atPeer := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.peer, f.any, 9000)
		w.apply(Config{})
		if err := w.kernel.Leads(); err != nil {
			t.Fatal(err)
		}
		wire := w.watch()
		defer wire.clean("captured")
		app := w.dial(within, f.peer, 9000)
		proxy := w.accept(outbound)
		if to, from := addrPort(proxy.LocalAddr()), addrPort(proxy.RemoteAddr()); to != netip.AddrPortFrom(f.peer, 9000) || from.Addr() != f.pod {
			t.Errorf("the proxy sees %s from %s, want it as the pod's own", to, from)
		}
		goesOn := func(when string) {
			t.Helper()
			hears(t, when+": to the proxy", app, proxy)
			hears(t, when+": from the proxy", proxy, app)
			wire.clean(when)
		}
		goesOn("captured")
		w.flush()
		goesOn("forgotten by conntrack")
		w.apply(Config{ExcludeOutbound: []mesh.Exclusion{{Port: 9000}}})
		goesOn("excluded later")
		talk(t, "excluded", w.dial(within, f.peer, 9000), w.accept(atPeer))
		w.apply(Config{})
		goesOn("no longer excluded")
		left := w.dial(within, f.peer, 9000)
		w.accept(outbound).Close()
		w.apply(Config{Drain: true})
		left.Write([]byte(marker))
		goesOn("draining")
		fresh, freshPeer := w.dial(within, f.peer, 9000), w.accept(atPeer)
		talk(t, "draining: new", fresh, freshPeer)
		w.apply(Config{})
		left.Write([]byte(marker))
		goesOn("enrolled again")
		talk(t, "begun meanwhile", fresh, freshPeer)
		w.do(w.pod, func() error { return exec.Command("nft", "delete", "table", "inet", "tacit").Run() })
		app.Write([]byte(marker))
		if err := w.kernel.Repair(t.Context(), w.pod, Config{}); err != nil {
			t.Fatal(err)
		}
		if _, err := readFull(proxy, make([]byte, len(marker))); err != nil {
			t.Errorf("without rules: %v", err)
		}
		goesOn("repaired")
		abandoned := w.dial(within, f.peer, 9000)
		w.accept(outbound).Close()
		abandoned.Write([]byte(marker))
		wire.clean("abandoned by the proxy")
		if err := w.kernel.Remove(t.Context(), w.pod); err != nil {
			t.Fatal(err)
		}
		if _, err := app.Write([]byte(marker)); err == nil {
			t.Error("removed: a captured connection lives on")
		}
		abandoned.Write([]byte(marker))
		talk(t, "removed: begun meanwhile", fresh, freshPeer)
	})
}

// A port that the pod leads on to a container is reached from the network if it is excluded.
func TestPublishedPort(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		within := w.within()
		w.translate()
		l := w.listen(within, f.any, 80)
		w.apply(Config{ExcludeInbound: []uint16{8080}})
		client, server := w.dial(w.peer, f.pod, 8080), w.accept(l)
		talk(t, "an excluded port", client, server)
		w.apply(Config{Drain: true})
		talk(t, "draining", client, server)
		w.apply(Config{})
		talk(t, "excluded no more", client, server)
	})
}

// The pod's own rules about what it forwards hold as before.
func TestForwardedMeetsThePodsRules(t *testing.T) {
	each(t, func(t *testing.T, w *world, f family) {
		within := w.within()
		w.translate()
		w.listen(w.pod, f.loopback, mesh.OutboundPort)
		w.shell(w.pod, "nft 'table inet own { chain c { type filter hook forward priority filter; tcp dport 9001 reject with tcp reset; }; }'")
		w.apply(Config{})
		err := within.Do(func() error { return try(netip.AddrPortFrom(f.peer, 9001)) })
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("what the pod itself forbids: %v, want refused", err)
		}
		w.dial(within, f.peer, 9000)
	})
}

// Two containers on a bridge within the pod: what they say to each other does not leave it.
func TestBridgeWithinThePod(t *testing.T) {
	for _, filtered := range []string{"0", "1"} { // bridge-nf-call-iptables
		t.Run("filtered "+filtered, func(t *testing.T) {
			each(t, func(t *testing.T, w *world, f family) {
				one, two := w.bridged()
				w.do(w.pod, func() error {
					return errors.Join(os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(filtered), 0),
						os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-ip6tables", []byte(filtered), 0))
				})
				to := netip.MustParseAddr("10.89.0.3")
				if f.number == 6 {
					to = netip.MustParseAddr("fd89::3")
				}
				l := w.listen(two, f.any, 80)
				w.apply(Config{})
				talk(t, "from container to container", w.dial(one, to, 80), w.accept(l))
				w.shell(w.pod, "nft 'table inet docker { chain post { type nat hook postrouting priority srcnat; oifname toPeer masquerade; }; }'")
				outbound := w.listen(w.pod, f.loopback, mesh.OutboundPort)
				talk(t, "from a container to the proxy", w.dial(one, f.peer, 9000), w.accept(outbound))
			})
		})
	}
}

// A bridge by which the pod itself reaches the network is guarded, and so is one whose port
// ends on the node, or is none that is known to lead within.
func TestBridgeThatLeadsOut(t *testing.T) {
	w, f := newWorld(t), families()[0]
	one, two := w.bridged()
	l := w.listen(two, f.any, 80)
	w.apply(Config{})
	to := netip.MustParseAddr("10.89.0.3")
	talk(t, "within", w.dial(one, to, 80), w.accept(l))
	if err := w.kernel.Check(t.Context(), w.pod, Config{}); err != nil {
		t.Error(err)
	}
	w.shell(w.pod, "ip route add default dev br0 metric 1000")
	if err := w.kernel.Check(t.Context(), w.pod, Config{}); !errors.Is(err, ErrRules) {
		t.Errorf("with a default route: %v, want other rules", err)
	}
	w.apply(Config{})
	if err := one.Do(func() error { return tryFor(300*time.Millisecond, netip.AddrPortFrom(to, 80)) }); err == nil {
		t.Error("with a default route: it passes")
	}
	veth := func(peer int) netlink.Link {
		la := netlink.NewLinkAttrs()
		la.NetNsID = peer
		return &netlink.Veth{LinkAttrs: la}
	}
	for what, c := range map[string]struct {
		link netlink.Link
		node int
		want bool
	}{
		"a cable to a container":  {veth(1), 0, true},
		"a cable to the node":     {veth(0), 0, false},
		"a cable within the pod":  {veth(-1), -1, true},
		"a machine":               {&netlink.Tuntap{}, 0, true},
		"a device":                {&netlink.Device{}, 0, false},
		"a tunnel to other hosts": {&netlink.Vxlan{}, 0, false},
	} {
		if got := leadsWithin(c.link, c.node); got != c.want {
			t.Errorf("%s leads within: %v", what, got)
		}
	}
}

// bridged makes two containers on a bridge within the pod, as docker does.
func (w *world) bridged() (one, two *netns.NS) {
	w.t.Helper()
	w.shell(w.pod, "ip link add br0 type bridge && ip addr add 10.89.0.1/24 dev br0 && ip -6 addr add fd89::1/64 dev br0 nodad && ip link set br0 up && "+
		"echo 1 >/proc/sys/net/ipv4/ip_forward && echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	one, two = w.namespace(), w.namespace()
	for i, ns := range []*netns.NS{one, two} {
		inner := fmt.Sprintf("port%d", i)
		w.cable(ns, "eth0", inner)
		w.shell(w.pod, "ip link set "+inner+" master br0 up")
		w.shell(ns, fmt.Sprintf("ip addr add 10.89.0.%[1]d/24 dev eth0 && ip -6 addr add fd89::%[1]d/64 dev eth0 nodad && ip link set eth0 up && "+
			"ip route add default via 10.89.0.1 && ip -6 route add default via fd89::1", i+2))
		w.plugged(ns, "eth0")
		w.settle(ns, netip.MustParseAddr(fmt.Sprintf("fd89::%d", i+2)))
	}
	w.plugged(w.pod, "br0")
	return one, two
}

func (w *world) shell(ns *netns.NS, script string) {
	w.t.Helper()
	w.do(ns, func() error {
		out, err := exec.Command("sh", "-c", script).CombinedOutput()
		return errors.Join(err, errorOf(out))
	})
}
