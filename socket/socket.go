// Package socket translates addresses between net/netip and the kernel's socket calls.
// Its station is wherever a socket is made by hand: in a pod's namespace by the agent,
// and by the proxy. It refuses to make one: who owns a descriptor makes it.
package socket

import (
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// Address is a as bind and connect take it.
func Address(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	// The number of the interface, where the address is link-local. A name would be one of
	// the namespace of who asks.
	scope, _ := strconv.ParseUint(a.Addr().Zone(), 10, 32)
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: uint32(scope)}
}

// AddrPort is a as getsockname gave it; zero if it is no address of IP.
func AddrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(a.Addr)
		if a.ZoneId != 0 {
			addr = addr.WithZone(strconv.FormatUint(uint64(a.ZoneId), 10))
		}
		return netip.AddrPortFrom(addr, uint16(a.Port))
	}
	return netip.AddrPort{}
}
