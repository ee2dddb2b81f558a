package mesh

import (
	"net/netip"
	"slices"
)

// ranges are prefixes. To look for an address costs as many steps as there are lengths of
// prefixes: each node has a range of its own, and most have one length.
type ranges struct {
	all     map[netip.Prefix]bool
	lengths [2][]int // of IPv4 and IPv6
}

func (r *ranges) add(p netip.Prefix) {
	if r.all == nil {
		r.all = make(map[netip.Prefix]bool)
	}
	r.all[p.Masked()] = true
	if l := &r.lengths[family(p.Addr())]; !slices.Contains(*l, p.Bits()) {
		*l = append(*l, p.Bits())
	}
}

func (r *ranges) has(a netip.Addr) bool {
	return slices.ContainsFunc(r.lengths[family(a)], func(bits int) bool {
		p, err := a.WithZone("").Prefix(bits)
		return err == nil && r.all[p]
	})
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
