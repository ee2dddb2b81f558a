package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

const (
	bridgeName = "underlay"
	uplinkName = "uplink0"
	podLink    = "eth0"
)

// sysctl sets one value in the calling thread's network namespace.
func sysctl(key, value string) error {
	return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644)
}

// sysctls sets what every namespace of a lab needs: addresses that are usable at
// once, no opinion about the way back, and the congestion control that every
// kernel has and allows. The machine's own may be BBR, whose timers a benchmark
// would then measure.
func sysctls(more ...string) error {
	keys := []string{
		"ipv6/conf/all/accept_dad", "0", "ipv6/conf/default/accept_dad", "0",
		"ipv6/conf/all/disable_ipv6", "0", "ipv6/conf/default/disable_ipv6", "0",
		"ipv4/tcp_congestion_control", "reno",
		"ipv4/conf/all/rp_filter", "0", "ipv4/conf/default/rp_filter", "0",
	}
	keys = append(keys, more...)
	for i := 0; i < len(keys); i += 2 {
		if err := sysctl(keys[i], keys[i+1]); err != nil {
			return err
		}
	}
	return nil
}

var forwarding = []string{"ipv4/ip_forward", "1", "ipv6/conf/all/forwarding", "1"}

// links speaks rtnetlink in the namespace of the thread that made it.
type links struct{ *netlink.Handle }

// withLinks runs fn in a namespace, nil being the lab's own.
func withLinks(ns *netns.NS, fn func(links) error) error {
	do := func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("rtnetlink: %w", err)
		}
		defer h.Close()
		return fn(links{h})
	}
	if ns == nil {
		return do()
	}
	return ns.Do(do)
}

// address gives a link an address, usable at once.
func (l links) address(link string, p netip.Prefix) error {
	dev, err := l.LinkByName(link)
	if err != nil {
		return fmt.Errorf("link %s: %w", link, err)
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := l.AddrAdd(dev, a); err != nil {
		return fmt.Errorf("address %s on %s: %w", p, link, err)
	}
	return nil
}

// up gives a link its addresses and lets packets through.
func (l links) up(link string, addresses ...netip.Prefix) error {
	for _, a := range addresses {
		if err := l.address(link, a); err != nil {
			return err
		}
	}
	dev, err := l.LinkByName(link)
	if err != nil {
		return fmt.Errorf("link %s: %w", link, err)
	}
	if err := l.LinkSetUp(dev); err != nil {
		return fmt.Errorf("link %s up: %w", link, err)
	}
	return nil
}

// route leads dst over link; the zero gateway means that it is on the link.
func (l links) route(link string, dst netip.Prefix, via netip.Addr) error {
	dev, err := l.LinkByName(link)
	if err != nil {
		return fmt.Errorf("link %s: %w", link, err)
	}
	r := &netlink.Route{LinkIndex: dev.Attrs().Index, Dst: ipNet(dst)}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else if dst.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := l.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s via %s dev %s: %w", dst, via, link, err)
	}
	return nil
}

// blackhole drops what goes to dst, without a word to the sender: where no pod
// is, nobody answers.
func (l links) blackhole(dst netip.Prefix) error {
	r := &netlink.Route{Dst: ipNet(dst), Type: unix.RTN_BLACKHOLE, Priority: 4096}
	if err := l.RouteReplace(r); err != nil {
		return fmt.Errorf("blackhole %s: %w", dst, err)
	}
	return nil
}

// cable joins two namespaces: the near end lies where l is, the far end in the
// namespace bound at path.
func (l links) cable(near, far, path string, master int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = near, master
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: far, PeerNamespace: netlink.NsFd(f.Fd())}
	if err := l.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth %s to %s in %s: %w", near, far, path, err)
	}
	return nil
}

// remove deletes a link and with it the other end; none is no error.
func (l links) remove(link string) error {
	dev, err := l.LinkByName(link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return l.LinkDel(dev)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// host is the prefix of one address alone.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// makeUnderlay lays the bridge that all nodes are plugged into.
func makeUnderlay() error {
	if err := sysctls(forwarding...); err != nil {
		return err
	}
	return withLinks(nil, func(l links) error {
		lo, err := l.LinkByName("lo")
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		snooping := false
		if err := errors.Join(l.LinkSetUp(lo), l.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping})); err != nil {
			return fmt.Errorf("make the underlay: %w", err)
		}
		return l.up(bridgeName, netip.PrefixFrom(control4, underlay4.Bits()), netip.PrefixFrom(control6, underlay6.Bits()))
	})
}

// plugIn cables a node's namespace to the bridge and routes its pods there.
func plugIn(n *node) error {
	// First: a link takes these from the defaults when it is made.
	if err := n.ns.Do(func() error { return sysctls(forwarding...) }); err != nil {
		return err
	}
	err := withLinks(nil, func(l links) error {
		bridge, err := l.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		if err := l.cable(n.name, uplinkName, n.path, bridge.Attrs().Index); err != nil {
			return err
		}
		return l.up(n.name)
	})
	if err != nil {
		return err
	}
	return withLinks(n.ns, func(l links) error {
		a := nodeAddress(n.number)
		if err := l.up(uplinkName, netip.PrefixFrom(a.v4, underlay4.Bits()), netip.PrefixFrom(a.v6, underlay6.Bits())); err != nil {
			return err
		}
		v4, v6 := podCIDR(n.number)
		return errors.Join(l.blackhole(v4), l.blackhole(v6))
	})
}

// defaultRoute leads everything else, virtual addresses too, to the underlay.
func defaultRoute(n *node) error {
	return withLinks(n.ns, func(l links) error {
		return errors.Join(
			l.route(uplinkName, netip.PrefixFrom(netip.IPv4Unspecified(), 0), control4),
			l.route(uplinkName, netip.PrefixFrom(netip.IPv6Unspecified(), 0), control6))
	})
}

// routeTo tells the namespace where the pods of a node are.
func routeTo(ns *netns.NS, link string, other *node) error {
	return withLinks(ns, func(l links) error {
		a := nodeAddress(other.number)
		v4, v6 := podCIDR(other.number)
		return errors.Join(l.route(link, v4, a.v4), l.route(link, v6, a.v6))
	})
}

// plugPod cables a pod to its node, point to point: the node routes to it, and
// every packet of it, to a pod of the same node too, passes the node's rules.
func plugPod(p *pod) error {
	if err := p.ns.Do(func() error { return sysctls() }); err != nil {
		return err
	}
	gw := gateway(p.node.number)
	err := withLinks(p.node.ns, func(l links) error {
		if err := l.cable(p.link, podLink, p.path, 0); err != nil {
			return err
		}
		if err := l.up(p.link, host(gw.v4), host(gw.v6)); err != nil {
			return err
		}
		return errors.Join(l.route(p.link, host(p.address.v4), netip.Addr{}), l.route(p.link, host(p.address.v6), netip.Addr{}))
	})
	if err != nil {
		return err
	}
	return withLinks(p.ns, func(l links) error {
		if err := l.up(podLink, host(p.address.v4), host(p.address.v6)); err != nil {
			return err
		}
		if err := errors.Join(l.route(podLink, host(gw.v4), netip.Addr{}), l.route(podLink, host(gw.v6), netip.Addr{})); err != nil {
			return err
		}
		return errors.Join(
			l.route(podLink, netip.PrefixFrom(netip.IPv4Unspecified(), 0), gw.v4),
			l.route(podLink, netip.PrefixFrom(netip.IPv6Unspecified(), 0), gw.v6))
	})
}

// plug connects a node to the underlay, or cuts it off: like a cable that is
// pulled on the far side of a switch, nobody gets an error, packets are just gone.
func plug(n *node, in bool) error {
	return withLinks(nil, func(l links) error {
		dev, err := l.LinkByName(n.name)
		if err != nil {
			return err
		}
		if !in {
			return l.LinkSetNoMaster(dev)
		}
		bridge, err := l.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		return l.LinkSetMaster(dev, bridge)
	})
}
