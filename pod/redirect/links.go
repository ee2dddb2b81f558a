package redirect

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// links are the interfaces of a pod that are up, without lo, by index.
type links struct {
	// out are those by which packets may leave the pod.
	out []int
	// bridges are those that lead to nothing but what is within the pod, and ports their ports.
	bridges, ports []int
	// open says that there are other bridges, too.
	open bool
	// names of all.
	names map[int]string
}

// namesOf are sorted, each once.
func (l links) namesOf(of []int) (names []string) {
	for _, link := range of {
		if name := l.names[link]; name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// listLinks tells them apart. What is not known to lead within is taken to lead out.
func listLinks(h *netlink.Handle) (l links, err error) {
	all, err := h.LinkList()
	if err != nil {
		return l, fmt.Errorf("list interfaces: %w", err)
	}
	enclosed, err := enclosedBridges(h, all)
	if err != nil {
		return l, err
	}
	l.names = make(map[int]string, len(all))
	for _, link := range all {
		a := link.Attrs()
		l.names[a.Index] = a.Name
		within, isBridge := enclosed[a.Index]
		switch {
		case a.Index == loopback || a.Flags&net.FlagUp == 0:
		case within:
			l.bridges = append(l.bridges, a.Index)
		case enclosed[a.MasterIndex]:
			l.ports = append(l.ports, a.Index)
		default:
			l.out, l.open = append(l.out, a.Index), l.open || isBridge
		}
	}
	return l, nil
}

// enclosedBridges are the bridges of a pod, and whether each leads to nothing but what is
// within the pod, as docker's does: each port is the end of a virtual machine, or of a cable
// whose other end is not on the node. One by which the pod itself reaches the network is none.
func enclosedBridges(h *netlink.Handle, all []netlink.Link) (map[int]bool, error) {
	enclosed := make(map[int]bool)
	for _, link := range all {
		if link.Type() == "bridge" {
			enclosed[link.Attrs().Index] = true
		}
	}
	if len(enclosed) == 0 {
		return nil, nil
	}
	node, err := nodeID(h)
	if err != nil {
		return nil, err
	}
	for _, link := range all {
		if a := link.Attrs(); enclosed[a.MasterIndex] && !leadsWithin(link, node) {
			enclosed[a.MasterIndex] = false
		}
	}
	ways, err := defaultLinks(h)
	if err != nil {
		return nil, err
	}
	for _, way := range ways {
		if enclosed[way] {
			enclosed[way] = false
		}
	}
	return enclosed, nil
}

func leadsWithin(link netlink.Link, node int) bool {
	switch link.Type() {
	case "tun", "tuntap":
		return true
	case "veth":
		peer := link.Attrs().NetNsID
		return peer < 0 || peer != node // less than 0: in the pod itself
	}
	return false
}

// nodeID is by which number the pod's namespace knows ours, which is the node's; below 0 if
// it does not.
func nodeID(h *netlink.Handle) (int, error) {
	f, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return 0, fmt.Errorf("our own namespace: %w", err)
	}
	defer f.Close()
	id, err := h.GetNetNsIdByFd(int(f.Fd()))
	if err != nil {
		return 0, fmt.Errorf("number of our own namespace: %w", err)
	}
	return id, nil
}

// defaultLinks are those with a default route.
func defaultLinks(h *netlink.Handle) (found []int, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range slices.DeleteFunc(routes, func(r netlink.Route) bool { return !isDefault(r) }) {
			found = append(found, r.LinkIndex)
			for _, hop := range r.MultiPath {
				found = append(found, hop.LinkIndex)
			}
		}
	}
	return found, nil
}

// Addresses are those, sorted, by which others may reach the pod: global ones of the
// interfaces by which packets may leave it.
func Addresses(ns *netns.NS) (all []netip.Addr, err error) {
	err = inside(ns, func(h *netlink.Handle, families []int) error {
		out, err := outLinks(h)
		if err != nil {
			return err
		}
		for _, f := range families {
			addrs, err := h.AddrList(nil, f)
			if err != nil {
				return fmt.Errorf("list addresses: %w", err)
			}
			for _, a := range addrs {
				ip, _ := netip.AddrFromSlice(a.IP)
				if ip = ip.Unmap(); ip.IsGlobalUnicast() && slices.Contains(out, a.LinkIndex) && a.Flags&unusable == 0 {
					all = append(all, ip)
				}
			}
		}
		return nil
	})
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all), err
}

// unusable has an address that is not the pod's yet, or that another host has (IPv6).
const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

// upLinks are lo and those that a socket may be bound to: it then has no other routes than
// those of that interface.
func upLinks(h *netlink.Handle) ([]int, error) {
	l, err := listLinks(h)
	return slices.Concat([]int{loopback}, l.out, l.bridges), err
}

// outLinks are those by which packets may leave the pod, withinLinks all others but lo.
func outLinks(h *netlink.Handle) ([]int, error) {
	l, err := listLinks(h)
	return l.out, err
}

func withinLinks(h *netlink.Handle) ([]int, error) {
	l, err := listLinks(h)
	return slices.Concat(l.bridges, l.ports), err
}
