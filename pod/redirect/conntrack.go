package redirect

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// forget has conntrack forget connections of the pod, while our table is not
// there. Without it nobody may be looking, and conntrack remembers for days what
// has ended long ago: once the pod is captured again, a new connection with the
// ports of an old one would be taken for it, and go past the proxy.
func forget(ns *netns.NS, which netlink.CustomConntrackFilter) error {
	var h *netlink.Handle
	err := ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if h != nil {
		defer h.Close()
	}
	if err != nil {
		return fmt.Errorf("netlink in namespace %d: %w", ns.Inode(), err)
	}
	var errs []error
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, forgetFamily(h, f, which))
	}
	return errors.Join(errs...)
}

// forgetFamily tries again when the table changed while it was read.
func forgetFamily(h *netlink.Handle, f netlink.InetFamily, which netlink.CustomConntrackFilter) (err error) {
	for range 5 {
		_, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, f, which)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("forget connections (needs the kernel's nf_conntrack_netlink): %w", err)
	}
	return nil
}

// own matches TCP connections that we have led to the proxy or from it.
type own struct{}

func (own) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_TCP &&
		(f.Reverse.SrcPort == mesh.OutboundPort || f.Reverse.SrcPort == mesh.InboundPort || f.Mark == mesh.ReplyMark)
}

// untouched matches TCP connections that nobody translates. Those that somebody
// else does are never forgotten: they would break.
type untouched struct{}

func (untouched) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_TCP && f.Mark != mesh.ReplyMark &&
		f.Forward.SrcIP.Equal(f.Reverse.DstIP) && f.Forward.SrcPort == f.Reverse.DstPort &&
		f.Forward.DstIP.Equal(f.Reverse.SrcIP) && f.Forward.DstPort == f.Reverse.SrcPort
}
