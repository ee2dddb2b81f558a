package cluster

import (
	"fmt"
	"net/netip"
	"strconv"
)

// uid makes the UID of a pod. Its last twelve digits say where the pod is, and so a
// node that is told of the pod knows its addresses, as a real one knows them from its
// network plugins.
func (c *Cluster) uid(n *node, host int, dual bool) string {
	c.serial++
	family := 0
	if dual {
		family = 1
	}
	r := c.rng.Uint64()
	return fmt.Sprintf("%08x-%04x-4%03x-8%03x-%05x%04x%02x%x", uint32(c.serial), uint16(r), uint16(r>>16)&0xfff, uint16(r>>32)&0xfff,
		uint32(r>>40)&0xfffff, n.number, host, family)
}

// Addresses are those of the pod with this UID: one of IPv4, and one of IPv6 if it has two.
// They are none for a UID of somebody else's.
func Addresses(uid string) []netip.Addr {
	if len(uid) != 36 {
		return nil
	}
	n, err := strconv.ParseUint(uid[29:], 16, 32)
	if err != nil {
		return nil
	}
	node, host, dual := int(n>>12), int(n>>4)&255, n&1 == 1
	list := []netip.Addr{podAddress(node, host)}
	if dual {
		list = append(list, podAddress6(node, host))
	}
	return list
}

func podAddress(node, host int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(64 + node>>8), byte(node), byte(host)})
}

func podAddress6(node, host int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x10, 3: 0x64, 6: byte(node >> 8), 7: byte(node), 15: byte(host)})
}

func nodeAddress(node int) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 20, byte(node >> 8), byte(node)})
}

func serviceAddress(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 128 + byte(n>>16), byte(n >> 8), byte(n)})
}

func serviceAddress6(n int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x10, 3: 0x96, 14: byte(n >> 8), 15: byte(n)})
}
