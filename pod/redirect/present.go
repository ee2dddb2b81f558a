package redirect

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// Present reports whether the namespace has anything of ours that decides about packets,
// whatever is in it: rules, what holds connections back while rules change, or a gate.
func Present(ns *netns.NS) (bool, error) {
	for _, name := range []string{tableName, holdName} {
		if has, err := hasTable(ns, name); err != nil || has {
			return has, err
		}
	}
	return hasGate(ns)
}

// hasTable reports whether there is a table of that name.
func hasTable(ns *netns.NS, name string) (has bool, err error) {
	fd, err := ns.Netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	for range 10 { // somebody else may change tables meanwhile
		has = false
		err = askTables(fd, 1, unix.NFT_MSG_GETTABLE, nil, func(b []byte) error {
			has = has || string(find(b, unix.NFTA_TABLE_NAME)) == name+"\x00"
			return nil
		})
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return false, fmt.Errorf("list tables of namespace %d: %w", ns.Inode(), err)
	}
	return has, nil
}
