package redirect

import (
	"fmt"

	"tacit.dev/pod/netns"
)

// Present reports whether the namespace has a table of ours, whatever is in it.
func Present(ns *netns.NS) (bool, error) {
	d, err := readTable(ns)
	if err != nil {
		return false, fmt.Errorf("read rules in namespace %d: %w", ns.Inode(), err)
	}
	return d != digest{}, nil
}
