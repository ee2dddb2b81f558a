package redirect

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// completed is c with what only the kernel and the namespace tell: whether all bridges are
// within the pod, and where the node calls the pod from: its own addresses, and the pod's default gateways. With most CNI plugins the gateway is an address of
// the node's; where it is a router's, nothing is lost: who can call from there can
// also read what passes.
func (k *Kernel) completed(ns *netns.NS, c Config) (Config, error) {
	c.node, c.refuse, c.bridges, c.leading, c.ways = nil, k.refuse(), false, nil, nil
	err := inside(ns, func(h *netlink.Handle, _ []int) (err error) {
		l, err := listLinks(h)
		if err != nil {
			return err
		}
		c.bridges = len(l.bridges) > 0 && !l.open
		if k.Leads() != nil {
			return nil
		}
		ways, err := defaultLinks(h)
		c.leading, c.ways = l.namesOf(l.out), l.namesOf(ways)
		return err
	})
	if err != nil {
		return c, fmt.Errorf("interfaces of namespace %d: %w", ns.Inode(), err)
	}
	if c.Drain || len(c.ProbePorts) == 0 {
		return c, nil
	}
	found, err := gateways(ns)
	if err != nil {
		return c, fmt.Errorf("gateways of namespace %d: %w", ns.Inode(), err)
	}
	c.node = slices.Concat(k.node, found)
	slices.SortFunc(c.node, netip.Addr.Compare)
	c.node = slices.Compact(c.node)
	return c, nil
}

func gateways(ns *netns.NS) (found []netip.Addr, err error) {
	err = inside(ns, func(h *netlink.Handle, families []int) error {
		for _, f := range families {
			routes, err := h.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			for _, r := range routes {
				if a, ok := netip.AddrFromSlice(r.Gw); ok && isDefault(r) {
					found = append(found, a.Unmap())
				}
			}
		}
		return nil
	})
	return found, err
}

// isDefault: the kernel's default route has no destination, netlink's has 0.0.0.0/0.
func isDefault(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0 && r.Dst.IP.IsUnspecified()
}
