package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	bridgeName = "br0"
	uplinkName = "eth0" // in every node
)

// links speaks rtnetlink in one namespace.
type links struct{ *netlink.Handle }

// up gives a link its addresses, usable at once, and lets packets through.
func (l links) up(name string, addresses ...netip.Prefix) error {
	dev, err := l.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	for _, p := range addresses {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // there is nobody else to have it
		}
		if err := l.AddrAdd(dev, a); err != nil {
			return fmt.Errorf("address %s on %s: %w", p, name, err)
		}
	}
	if err := l.LinkSetUp(dev); err != nil {
		return fmt.Errorf("link %s up: %w", name, err)
	}
	return nil
}

// bridge makes the switch that all nodes are plugged into.
func (l links) bridge(addresses []netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	snooping := false // a bridge without a querier would lose neighbor discovery
	if err := l.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	return errors.Join(l.up("lo"), l.up(bridgeName, addresses...))
}

// cable plugs a namespace into the bridge. A cable of that name
// from before a reboot goes first: the kernel may not have noticed yet.
func (l links) cable(name string, ns *os.File) error {
	if err := l.unplug(name); err != nil {
		return err
	}
	bridge, err := l.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = name, bridge.Attrs().Index
	err = l.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: uplinkName, PeerNamespace: netlink.NsFd(ns.Fd())})
	if err != nil {
		return fmt.Errorf("cable %s: %w", name, err)
	}
	return l.up(name)
}

// unplug removes a cable; none is no error.
func (l links) unplug(name string) error {
	dev, err := l.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := l.LinkDel(dev); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove link %s: %w", name, err)
	}
	return nil
}

// route leads a prefix to a neighbor, unroute no more.
func (l links) route(to netip.Prefix, via netip.Addr) error {
	if err := l.RouteReplace(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route %s via %s: %w", to, via, err)
	}
	return nil
}

func (l links) unroute(to netip.Prefix) error {
	err := l.RouteDel(&netlink.Route{Dst: ipNet(to)})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route %s: %w", to, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func cableName(node string) string { return "veth-" + node }

// plugIn cables a node to the control plane's bridge and gives it addresses and
// routes: by default to the control plane, and to the pods of every other node.
func (c *Cluster) plugIn(n *node) error {
	err := withLinks(c.controlPlane.netns(), func(l links) error { return l.cable(cableName(n.name), n.ns) })
	if err != nil {
		return err
	}
	return withLinks(n.netns(), func(l links) error {
		if err := errors.Join(l.up("lo"), l.up(uplinkName, c.options.nodeAddresses(n.number)...)); err != nil {
			return err
		}
		errs := []error{}
		for _, a := range c.options.controlPlaneAddresses() {
			everything := netip.PrefixFrom(a.Addr(), 0).Masked()
			errs = append(errs, l.route(everything, a.Addr()))
		}
		for _, other := range c.nodes {
			if other != n {
				errs = append(errs, c.routeTo(l, other))
			}
		}
		return errors.Join(errs...)
	})
}

func (c *Cluster) routeTo(l links, n *node) error {
	var errs []error
	via := c.options.nodeAddresses(n.number)
	for i, to := range c.options.nodePodCIDRs(n.number) {
		errs = append(errs, l.route(to, via[i].Addr()))
	}
	return errors.Join(errs...)
}

func (c *Cluster) unrouteTo(l links, n *node) error {
	var errs []error
	for _, to := range c.options.nodePodCIDRs(n.number) {
		errs = append(errs, l.unroute(to))
	}
	return errors.Join(errs...)
}

// everywhereElse does something to the links of the control plane and of all nodes
// but n.
func (c *Cluster) everywhereElse(n *node, do func(links) error) error {
	errs := []error{withLinks(c.controlPlane.netns(), do)}
	for _, other := range slices.Clone(c.nodes) {
		if other != n {
			errs = append(errs, withLinks(other.netns(), do))
		}
	}
	return errors.Join(errs...)
}
