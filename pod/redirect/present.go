package redirect

import (
	"fmt"

	"tacit.dev/pod/netns"
)

// Present reports whether the namespace has anything of ours that decides about packets,
// whatever is in it.
func Present(ns *netns.NS) (bool, error) {
	has, err := hasTable(ns)
	if err != nil || has {
		return has, err
	}
	return hasGate(ns)
}

// hasTable reports whether there is a table of ours.
func hasTable(ns *netns.NS) (bool, error) {
	d, err := readTable(ns)
	if err != nil {
		return false, fmt.Errorf("read rules in namespace %d: %w", ns.Inode(), err)
	}
	return d != digest{}, nil
}
