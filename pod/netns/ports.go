package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// The settings of both families, in spite of the name.
const (
	ephemeralPorts    = "/proc/sys/net/ipv4/ip_local_port_range"
	unprivilegedPorts = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
)

// EphemeralPorts returns the first and the last port that the namespace gives to those who
// ask for none.
func (n *NS) EphemeralPorts() (first, last uint16, err error) {
	err = n.Do(func() error {
		ports, err := readPorts(ephemeralPorts, 2)
		if err == nil {
			first, last = ports[0], ports[1]
		}
		return err
	})
	return first, last, err
}

// readPorts reads a setting of the calling thread's namespace, which is n ports.
func readPorts(file string, n int) ([]uint16, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	words := strings.Fields(string(b))
	if len(words) != n {
		return nil, fmt.Errorf("%s: %q: want %d ports", file, b, n)
	}
	ports := make([]uint16, n)
	for i, word := range words {
		port, err := strconv.ParseUint(word, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		ports[i] = uint16(port)
	}
	return ports, nil
}

// ErrNotForeign says that an address or a port is not one that BindForeign binds.
var ErrNotForeign = errors.New("not a privileged port of a foreign address")

// BindForeign makes one socket as Sockets does, and binds it to source: a port that takes a
// privilege there, of an address that the namespace does not have. The caller closes it.
func (n *NS) BindForeign(source netip.AddrPort, mark uint32) (int, error) {
	fd := -1
	err := n.Do(func() (err error) {
		if err := isForeign(source); err != nil {
			return err
		}
		c := SocketConfig{Family: 4, Mark: mark}
		if source.Addr().Is6() {
			c.Family = 6
		}
		if fd, err = dialSocket(c); err != nil {
			return err
		}
		return os.NewSyscallError("bind", unix.Bind(fd, socket.Address(source)))
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("bind to %s in namespace %d: %w", source, n.key.Inode, err)
	}
	return fd, nil
}

// isForeign is asked inside the namespace.
func isForeign(source netip.AddrPort) error {
	first, err := readPorts(unprivilegedPorts, 1)
	if err != nil {
		return err
	}
	if source.Port() == 0 || source.Port() >= first[0] {
		return fmt.Errorf("port %d of an unprivileged start at %d: %w", source.Port(), first[0], ErrNotForeign)
	}
	if !source.Addr().IsGlobalUnicast() || source.Addr().Is4In6() {
		return ErrNotForeign
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range own {
		if p, err := netip.ParsePrefix(a.String()); err != nil || p.Addr().Unmap() == source.Addr() {
			return fmt.Errorf("%s is the namespace's own: %w", source.Addr(), ErrNotForeign)
		}
	}
	return nil
}
