package agent

import (
	"net/netip"
	"slices"

	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
)

// maxOthers bounds how many addresses of a pod control is told besides those that the runtime
// has told. At further ones the pod is not reached: its guard refuses that.
const maxOthers = 16

// addressesOf are those by which others may reach a pod; nil if they cannot be read.
func addressesOf(ns *netns.NS) []netip.Addr {
	all, err := redirect.Addresses(ns)
	if err != nil {
		return nil
	}
	return slices.Concat([]netip.Addr{}, all)
}

// hearAddresses notes what addressesOf has read. They come and go while the pod runs: a second
// network, those that the network gives, those that an application adds.
func (p *pod) hearAddresses(all []netip.Addr) {
	if all == nil {
		return
	}
	reached := p.reached()
	others := slices.DeleteFunc(all, func(a netip.Addr) bool { return slices.Contains(reached, a) })
	p.others = others[:min(len(others), maxOthers)]
}
