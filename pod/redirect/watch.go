package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// Watch calls changed, from one of two goroutines, whenever somebody, we
// included, changes nftables, routing rules, routes, filters or addresses in the namespace, until
// ctx ends; it then returns nil. One call may stand for several changes, also
// for changes that were lost. The namespace may be closed meanwhile; it lives
// until Watch returns.
func Watch(ctx context.Context, ns *netns.NS, changed func()) error {
	nft, err := subscribe(ns, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return err
	}
	defer nft.Close()
	route, err := subscribe(ns, unix.NETLINK_ROUTE,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_TC,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return err
	}
	defer route.Close()
	end := func() { nft.Close(); route.Close() }
	defer context.AfterFunc(ctx, end)()

	var wg sync.WaitGroup
	errs := make([]error, 2)
	wg.Go(func() { errs[0] = drainEvents(nft, changed); end() })
	wg.Go(func() { errs[1] = drainEvents(route, changed); end() })
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("watch namespace %d: %w", ns.Inode(), errors.Join(errs...))
}

func subscribe(ns *netns.NS, protocol int, groups ...int) (*os.File, error) {
	fd, err := ns.Netlink(protocol)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("watch netlink %d group %d: %w", protocol, g, err)
		}
	}
	return os.NewFile(uintptr(fd), "netlink events"), nil
}

// drainEvents reads and forgets: what counts is that something happened, so the
// rest of an event that does not fit may be lost.
func drainEvents(f *os.File, changed func()) error {
	buf := make([]byte, 64)
	for {
		_, err := f.Read(buf)
		// ENOBUFS: more happened than the socket could hold.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		changed()
	}
}
