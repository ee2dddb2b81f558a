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

// A transit is a connection that the pod forwards for others.
type transit struct {
	// flows are its ends while it is forwarded, and those by which it came to the pod, if others.
	flows []flow
	// leaves are its ends when it leaves, or comes from, the pod.
	leaves flow
}

// transits are all that conntrack knows of: no socket of the pod has them. That is what the pod
// translates, which is nearly all that is forwarded, for nobody else routes to what is within a pod.
func transits(ns *netns.NS, own []netip.Addr) (all []transit, err error) {
	does, err := forwards(ns)
	if err != nil || !does {
		return nil, err
	}
	err = withConntrack(ns, func(h *netlink.Handle) error {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			known, err := listFamily(h, family)
			if err != nil {
				return err
			}
			for _, c := range known {
				if flows := forwardedFlows(c, own); flows != nil {
					all = append(all, transit{flows, flow{end(c.Reverse.DstIP, c.Reverse.DstPort), end(c.Reverse.SrcIP, c.Reverse.SrcPort)}})
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list forwarded connections (needs the kernel's nf_conntrack_netlink): %w", err)
	}
	return all, nil
}

// through tells them apart: those that the proxy has or had, as they leave, and those that go on
// without it. Under a capture that is what is older or excluded, by rules, which were there.
func (now census) through(was history, rules Config) (captured, free []flow) {
	older, proxys := setOf(was.older), setOf(slices.Concat(now.led, was.captured))
	for _, t := range now.transits {
		passes := len(rules.passing(t.flows)) > 0 || slices.ContainsFunc(t.flows, func(f flow) bool { return older[f] })
		if proxys[t.leaves] || was.guarded && !passes {
			captured = append(captured, t.leaves)
		} else {
			free = append(free, t.flows...)
		}
	}
	return captured, free
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
// own: either end may be what is excluded, and a port that the pod leads on.
func (c Config) passing(flows []flow) []flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f flow) bool {
		return !slices.Contains(c.ExcludeInbound, f.local.Port()) &&
			!slices.ContainsFunc(c.ExcludeOutbound, func(e mesh.Exclusion) bool { return excludes(e, f.local) || excludes(e, f.remote) })
	})
}
