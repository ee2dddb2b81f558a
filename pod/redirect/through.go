package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// through are the connections that the pod forwards for others, with the ends that they have
// while they are forwarded. No socket of the pod has them, so conntrack has to: it knows what
// the pod translates, which is nearly all that is forwarded, for nobody else routes to what
// is within a pod.
func through(ns *netns.NS, own []netip.Addr) (flows []flow, err error) {
	does, err := forwards(ns)
	if err != nil || !does {
		return nil, err
	}
	err = withConntrack(ns, func(h *netlink.Handle) error {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			all, err := listFamily(h, family)
			if err != nil {
				return err
			}
			for _, c := range all {
				flows = append(flows, forwardedFlows(c, own)...)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list forwarded connections (needs the kernel's nf_conntrack_netlink): %w", err)
	}
	return flows, nil
}

// forwards reports whether the kernel forwards anything in the namespace.
func forwards(ns *netns.NS) (bool, error) {
	names := []string{"net/ipv4/ip_forward"}
	six, err := ns.HasIPv6()
	if err != nil {
		return false, err
	}
	if six {
		names = append(names, "net/ipv6/conf/all/forwarding")
	}
	for _, name := range names {
		if value, err := ns.Sysctl(name); err != nil || value != "0" {
			return err == nil, err
		}
	}
	return false, nil
}

// listFamily tries again when the table changed while it was read.
func listFamily(h *netlink.Handle, family netlink.InetFamily) (all []*netlink.ConntrackFlow, err error) {
	for range 5 {
		all, err = h.ConntrackTableList(netlink.ConntrackTable, family)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil // most of it
}

// forwardedFlows are a connection of TCP that is not over and that is between others: who began
// it, and who answers, each with its own address. The lesser end is called local, so that a
// connection has one name, also when conntrack has forgotten who began it. If it was sent to
// the pod itself, which leads it on, it is that as well: so it comes in.
func forwardedFlows(c *netlink.ConntrackFlow, own []netip.Addr) (flows []flow) {
	const timeWait, closed = 7, 8 // TCP_CONNTRACK_TIME_WAIT, _CLOSE
	tcp, ok := c.ProtoInfo.(*netlink.ProtoInfoTCP)
	if c.Forward.Protocol != unix.IPPROTO_TCP || !ok || tcp.State >= timeWait && tcp.State <= closed {
		return nil
	}
	from, to := end(c.Forward.SrcIP, c.Forward.SrcPort), end(c.Reverse.SrcIP, c.Reverse.SrcPort)
	if !from.IsValid() || !to.IsValid() || slices.Contains(own, from.Addr()) || slices.Contains(own, to.Addr()) {
		return nil
	}
	if at := end(c.Forward.DstIP, c.Forward.DstPort); slices.Contains(own, at.Addr()) {
		flows = append(flows, flow{at, from})
	}
	if from.Compare(to) > 0 {
		from, to = to, from
	}
	return append(flows, flow{from, to})
}

func end(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// passing are those of forwarded flows that rules of c leave alone, as named is for the pod's
// own: either end may be what is excluded.
func (c Config) passing(flows []flow) []flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f flow) bool {
		return !slices.ContainsFunc(c.ExcludeOutbound, func(e mesh.Exclusion) bool { return excludes(e, f.local) || excludes(e, f.remote) })
	})
}
