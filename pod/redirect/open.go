package redirect

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// HasOpen reports whether a connection that was captured on its way in is not over yet.
// What its socket still sends is translated by our rules: without them it would leave from
// the port of the capture instead of the application's.
func HasOpen(ns *netns.NS) (open bool, err error) {
	err = ns.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			for _, s := range sockets {
				over := s.State == netlink.TCP_LISTEN || s.State == netlink.TCP_TIME_WAIT || s.State == netlink.TCP_CLOSE
				open = open || s.ID.SourcePort == mesh.InboundPort && !over
			}
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("list connections in namespace %d (needs the kernel's inet_diag): %w", ns.Inode(), err)
	}
	return open, nil
}
