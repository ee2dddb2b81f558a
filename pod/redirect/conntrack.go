package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// Conntrack remembers established connections for days. While our table is not
// in a pod nobody may tell it that they end. Once the pod is captured again, a
// new connection with the ports of an old one would be taken for it, and go past
// the proxy. So it has to forget while the table is not there. What somebody else
// translates is never forgotten: that would break it.

// forgetAll has conntrack forget the pod's TCP connections, those included that
// we have led to the proxy.
func forgetAll(ns *netns.NS) error {
	return forget(ns, func(f *netlink.ConntrackFlow) bool { return isOwn(f) || !isTranslated(f) })
}

// forgetUntouched has it forget those that we have not led to the proxy: the
// others are alive.
func forgetUntouched(ns *netns.NS) error {
	return forget(ns, func(f *netlink.ConntrackFlow) bool { return !isOwn(f) && !isTranslated(f) })
}

// isOwn reports whether the proxy has one end of a connection.
func isOwn(f *netlink.ConntrackFlow) bool {
	return f.Reverse.SrcPort == mesh.OutboundPort || f.Reverse.SrcPort == mesh.InboundPort
}

func isTranslated(f *netlink.ConntrackFlow) bool {
	return !f.Forward.SrcIP.Equal(f.Reverse.DstIP) || f.Forward.SrcPort != f.Reverse.DstPort ||
		!f.Forward.DstIP.Equal(f.Reverse.SrcIP) || f.Forward.DstPort != f.Reverse.SrcPort
}

// selection is the TCP connections for which it is true.
type selection func(*netlink.ConntrackFlow) bool

func (s selection) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_TCP && s(f)
}

func forget(ns *netns.NS, which selection) error {
	err := withConntrack(ns, func(h *netlink.Handle) error { return forgetBy(h, which) })
	if err != nil {
		return fmt.Errorf("forget connections (needs the kernel's nf_conntrack_netlink): %w", err)
	}
	return nil
}

// withConntrack gives f a handle of the namespace's conntrack, if that knows of anything.
func withConntrack(ns *netns.NS, f func(*netlink.Handle) error) error {
	var h *netlink.Handle
	err := ns.Do(func() (err error) {
		if knowsNone() {
			return nil
		}
		h, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return fmt.Errorf("netlink in namespace %d: %w", ns.Inode(), err)
	}
	if h == nil {
		return nil
	}
	defer h.Close()
	return f(h)
}

// knowsNone reports whether conntrack knows of no connection in the namespace of
// this thread. To list them is to walk through the whole machine's table, which
// is worth avoiding; what the file does not tell, the list will.
func knowsNone() bool {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// forgetBy empties the table at once if it may lose everything, as it mostly
// may: one by one takes long when there are tens of thousands.
func forgetBy(h *netlink.Handle, which selection) error {
	all := true
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := h.ConntrackTableList(netlink.ConntrackTable, f)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
		for _, flow := range flows {
			all = all && (which.MatchConntrackFlow(flow) || flow.Forward.Protocol != unix.IPPROTO_TCP && !isTranslated(flow))
		}
	}
	if all {
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	}
	return errors.Join(forgetFamily(h, unix.AF_INET, which), forgetFamily(h, unix.AF_INET6, which))
}

// forgetFamily tries again when the table changed while it was read.
func forgetFamily(h *netlink.Handle, f netlink.InetFamily, which selection) (err error) {
	for range 5 {
		_, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, f, which)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return err
}
