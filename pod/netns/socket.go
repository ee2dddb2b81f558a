package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// Backlog is how many connections may wait in a listener while the proxy is
// away. The kernel takes the smaller of this and net.core.somaxconn.
const Backlog = 4096

// Listen opens a TCP listener inside the namespace, non-blocking, transparent and closed on
// exec. An IPv6 listener takes IPv6 only. The caller closes the file.
func (n *NS) Listen(addr netip.AddrPort) (*os.File, error) {
	var f *os.File
	err := n.Do(func() (err error) {
		f, err = listen(addr)
		return err
	})
	if err != nil {
		if f != nil {
			f.Close()
		}
		return nil, fmt.Errorf("listen at %s in namespace %d: %w", addr, n.key.Inode, err)
	}
	return f, nil
}

func listen(addr netip.AddrPort) (*os.File, error) {
	fd, err := tcpSocket(family(addr.Addr()))
	if err != nil {
		return nil, err
	}
	if err := bindAndListen(fd, addr); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "listener "+addr.String()), nil
}

func bindAndListen(fd int, addr netip.AddrPort) error {
	// What an earlier listener accepted may still be in TIME_WAIT.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
	}
	if addr.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
	}
	if err := transparent(fd, addr.Addr().Is6()); err != nil {
		return err
	}
	if err := unix.Bind(fd, socket.Address(addr)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, Backlog))
}

// SocketConfig says which sockets to make.
type SocketConfig struct {
	// Family is 4 or 6.
	Family int
	// Count is how many.
	Count int
	// Mark is their SO_MARK.
	Mark uint32
	// LastPort is the last port that the kernel may give them at connect, where it gives
	// others above it; Linux can do so since 6.3, and gives any port before.
	LastPort uint16
}

// Sockets makes TCP sockets inside the namespace: marked, transparent (they may
// be bound to an address that is not ours), with SO_REUSEADDR (they take no port from those
// who have it too), neither bound nor connected, non-blocking, closed on exec. All or none: after an error there is none. The
// caller closes them.
func (n *NS) Sockets(c SocketConfig) ([]int, error) {
	fds := make([]int, 0, c.Count)
	err := n.Do(func() error {
		for range c.Count {
			fd, err := dialSocket(c)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
		}
		return nil
	})
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("make %d IPv%d sockets in namespace %d: %w", c.Count, c.Family, n.key.Inode, err)
	}
	return fds, nil
}

func dialSocket(c SocketConfig) (int, error) {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	domain := unix.AF_INET
	if c.Family == 6 {
		domain, level, option = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	fd, err := tcpSocket(domain)
	if err != nil {
		return -1, err
	}
	for _, o := range []struct {
		name                 string
		level, option, value int
	}{
		{"SO_MARK (needs CAP_NET_ADMIN)", unix.SOL_SOCKET, unix.SO_MARK, int(c.Mark)},
		{"IP_TRANSPARENT (needs CAP_NET_ADMIN)", level, option, 1},
		{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{"IP_LOCAL_PORT_RANGE", unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(c.LastPort) << 16},
	} {
		err := unix.SetsockoptInt(fd, o.level, o.option, o.value)
		if err != nil && !(o.option == unix.IP_LOCAL_PORT_RANGE && errors.Is(err, unix.ENOPROTOOPT)) {
			unix.Close(fd)
			return -1, fmt.Errorf("setsockopt %s: %w", o.name, err)
		}
	}
	return fd, nil
}

// transparent lets a socket have an address that is not ours; of a listener, the
// connections that it accepts.
func transparent(fd int, six bool) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if six {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("setsockopt IP_TRANSPARENT (needs CAP_NET_ADMIN): %w", err)
	}
	return nil
}

// HasIPv6 reports whether the namespace can listen on ::1, as one with IPv6
// turned off cannot.
func (n *NS) HasIPv6() (bool, error) {
	err := n.Do(func() error {
		fd, err := tcpSocket(unix.AF_INET6)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, socket.Address(netip.AddrPortFrom(netip.IPv6Loopback(), 0)))
	})
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return false, nil
	}
	return err == nil, err
}

// Netlink opens a netlink socket of the given protocol inside the namespace,
// non-blocking and closed on exec. The caller closes it.
func (n *NS) Netlink(protocol int) (int, error) {
	fd := -1
	err := n.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("netlink socket %d in namespace %d: %w", protocol, n.key.Inode, err)
	}
	return fd, nil
}

func tcpSocket(domain int) (int, error) {
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	return fd, os.NewSyscallError("socket", err)
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// IsListener checks that a file is a TCP listener at addr, inside this namespace, and
// makes it transparent, as those of Listen are: an older agent has not.
func (n *NS) IsListener(f *os.File, addr netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("listener at %s: %w", addr, err)
	}
	if e := raw.Control(func(fd uintptr) { err = n.isListener(int(fd), addr) }); e != nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("listener at %s in namespace %d: %w", addr, n.key.Inode, err)
	}
	return nil
}

func (n *NS) isListener(fd int, addr netip.AddrPort) error {
	if err := ListensAt(fd, addr); err != nil {
		return err
	}
	home, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return fmt.Errorf("namespace of the socket: %w", err)
	}
	file := os.NewFile(uintptr(home), "namespace of a socket")
	defer file.Close()
	key, err := keyOf(file)
	if err != nil {
		return fmt.Errorf("namespace of the socket: %w", err)
	}
	if key != n.key {
		return fmt.Errorf("is in namespace %d", key.Inode)
	}
	return transparent(fd, addr.Addr().Is6())
}

// ListensAt checks that fd is a TCP listener at addr, in whichever namespace.
func ListensAt(fd int, addr netip.AddrPort) error {
	if p, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != unix.IPPROTO_TCP {
		return fmt.Errorf("not a socket of TCP (%w)", err)
	}
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listening != 1 {
		return fmt.Errorf("not a listening socket (%w)", err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	if got := socket.AddrPort(at); got != addr {
		return fmt.Errorf("listens at %s", got)
	}
	return nil
}
