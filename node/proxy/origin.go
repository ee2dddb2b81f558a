package proxy

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/socket"
)

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST: one number for
// both levels (linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h).
const soOriginalDst = 80

// dialled returns the address that the peer of a captured connection dialled. What goes
// out has it as its own end, as rules lead it here without a translation. Of what comes in,
// and of what somebody dials at our own listeners, conntrack of the pod's namespace knows it.
func dialled(c *net.TCPConn, inbound bool) (netip.AddrPort, error) {
	// Package net has asked for the own end already, and names its zone, if it has one, in another way.
	if own, ok := c.LocalAddr().(*net.TCPAddr); ok && !inbound && own.Zone == "" {
		a := own.AddrPort()
		if to := netip.AddrPortFrom(a.Addr().Unmap(), a.Port()); !isOurs(to) {
			return to, nil
		}
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var to netip.AddrPort
	var got error
	err = raw.Control(func(fd uintptr) {
		if !inbound {
			to, got = ownEnd(int(fd))
		}
		if got == nil && (inbound || isOurs(to)) {
			to, got = originalDestination(int(fd), isV6(c))
		}
	})
	if err == nil {
		err = got
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("ask for the address that %s dialled: %w", c.RemoteAddr(), err)
	}
	return to, nil
}

// isOurs reports whether the own end of a connection that goes out is that of our listener.
// Elsewhere the ports of the capture are like any other.
func isOurs(a netip.AddrPort) bool {
	return a.Port() == mesh.OutboundPort && a.Addr().IsLoopback()
}

func ownEnd(fd int) (netip.AddrPort, error) {
	a, err := unix.Getsockname(fd)
	return socket.AddrPort(a), os.NewSyscallError("getsockname", err)
}

// ownPort is the port that c has here, which package net may not know: it asks once.
func ownPort(c *net.TCPConn) (port uint16) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if own, err := ownEnd(int(fd)); err == nil {
			port = own.Port()
		}
	})
	return port
}

// isV6 reports whether c is a connection of IPv6. The listeners of both
// families are apart, so that there is no IPv4 in IPv6.
func isV6(c *net.TCPConn) bool {
	a, ok := c.LocalAddr().(*net.TCPAddr)
	return ok && a.IP.To4() == nil
}

func originalDestination(fd int, v6 bool) (netip.AddrPort, error) {
	if v6 {
		var sa unix.RawSockaddrInet6
		if err := getsockopt(fd, unix.SOL_IPV6, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
			return netip.AddrPort{}, err
		}
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port(&sa.Port)), nil
	}
	var sa unix.RawSockaddrInet4
	if err := getsockopt(fd, unix.SOL_IP, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port(&sa.Port)), nil
}

// port reads a port that the kernel keeps in network byte order.
func port(p *uint16) uint16 {
	return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:])
}

// getsockopt reads SO_ORIGINAL_DST. x/sys/unix has no call that takes a
// structure of this kind.
func getsockopt(fd, level int, p unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), soOriginalDst,
		uintptr(p), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
