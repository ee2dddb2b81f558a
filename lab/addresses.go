package lab

import (
	"fmt"
	"net/netip"
)

// The plan of addresses, the same in every lab: labs have networks of their own.
var (
	underlay4 = netip.MustParsePrefix("172.30.0.0/24")
	underlay6 = netip.MustParsePrefix("fd00:30::/64")
	services4 = netip.MustParsePrefix("10.31.0.0/16")
	services6 = netip.MustParsePrefix("fd00:31::/112")
	// control4 and control6 are where tacit-control and the lab itself are.
	control4 = netip.MustParseAddr("172.30.0.250")
	control6 = netip.MustParseAddr("fd00:30::fa")
)

const (
	controlPort = 15010
	maxNodes    = 200
	maxPods     = 250
)

// pair is one address of each family.
type pair struct{ v4, v6 netip.Addr }

func (p pair) list() []netip.Addr { return []netip.Addr{p.v4, p.v6} }

// nodeAddress is a node's own address on the underlay.
func nodeAddress(node int) pair {
	return pair{
		netip.AddrFrom4([4]byte{172, 30, 0, byte(node)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:30::%x", node)),
	}
}

// podCIDR holds the pods of a node; host 1 is the node's end of every pod's link.
func podCIDR(node int) (v4, v6 netip.Prefix) {
	p := podAddress(node, 0)
	return netip.PrefixFrom(p.v4, 24), netip.PrefixFrom(p.v6, 64)
}

func podAddress(node, host int) pair {
	return pair{
		netip.AddrFrom4([4]byte{10, 30, byte(node), byte(host)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:30:%x::%x", node, host)),
	}
}

func gateway(node int) pair { return podAddress(node, 1) }

// clusterAddress is the n-th virtual address of services.
func clusterAddress(n int) pair {
	return pair{
		netip.AddrFrom4([4]byte{10, 31, byte(n >> 8), byte(n)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:31::%x", n)),
	}
}
