package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// A connection is one of TCP, at its end in the pod, as sock_diag tells of it.
type connection struct {
	flow
	state uint8
	mark  uint32
}

// Of struct inet_diag_msg (linux/inet_diag.h): its size, and where is what.
const (
	diagSize     = 72
	diagState    = 1
	diagPorts    = 4
	diagLocal    = 8
	diagRemote   = 24
	diagMarkAttr = 15 // INET_DIAG_MARK
	sockDiag     = 20 // SOCK_DIAG_BY_FAMILY
	sockDestroy  = 21 // SOCK_DESTROY
	reqSize      = 56 // of struct inet_diag_req_v2
	reqPorts     = 8  // where its ports are
)

// sockets lists the pod's. Of those in IPv6 that speak IPv4 it tells as of IPv4.
func sockets(ns *netns.NS) (all []connection, err error) {
	fd, err := ns.Netlink(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for i, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, reqSize)
		req[0], req[1] = family, unix.IPPROTO_TCP
		binary.NativeEndian.PutUint32(req[4:], ^uint32(1<<netlink.TCP_LISTEN|1<<netlink.TCP_CLOSE))
		err := ask(fd, uint32(i+1), sockDiag, req, func(b []byte) error {
			if s, ok := parseSocket(b); ok {
				all = append(all, s)
			}
			return nil
		})
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("list connections in namespace %d (needs the kernel's inet_diag): %w", ns.Inode(), err)
		}
	}
	return all, nil
}

func parseSocket(b []byte) (s connection, ok bool) {
	if len(b) < diagSize {
		return s, false
	}
	end := func(at, port int) netip.AddrPort {
		a := netip.AddrFrom16([16]byte(b[at:])).Unmap()
		if b[0] == unix.AF_INET {
			a = netip.AddrFrom4([4]byte(b[at:]))
		}
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[port:]))
	}
	s.state = b[diagState]
	s.local, s.remote = end(diagLocal, diagPorts), end(diagRemote, diagPorts+2)
	for attrs := range attributes(b[diagSize:]) {
		if attrs.kind == diagMarkAttr && len(attrs.value) == 4 {
			s.mark = binary.NativeEndian.Uint32(attrs.value)
		}
	}
	return s, true
}

// hasBeenLeft reports whether the peer has closed its end: if that was the proxy it may be
// gone without a trace.
func (s connection) hasBeenLeft() bool {
	return s.state == netlink.TCP_CLOSE_WAIT || s.state == netlink.TCP_LAST_ACK || s.state == netlink.TCP_CLOSING
}

// maxWaiting is how many connections in TIME_WAIT are counted.
const maxWaiting = 256

// A census is the pod's connections, told apart by whose they are.
type census struct {
	// captured are those of the application whose other end the proxy has, free the
	// application's others, less those within the pod.
	captured, free []connection
	// left are those of free whose peer has closed its end.
	left []connection
	// former are the local ends of those of the application that nat has redirected.
	former []netip.AddrPort
	// clients are the other ends of what came in to the proxy.
	clients map[netip.AddrPort]bool
	// led are those that the pod forwards, whose other end the proxy has: as they leave.
	led []flow
	// transits are all that the pod forwards.
	transits []transit
}

// count tells the sockets of a pod apart, whose own addresses are given.
func count(all []connection, own []netip.Addr) census {
	c := census{clients: make(map[netip.AddrPort]bool)}
	there := make(map[flow]bool, len(all))
	for _, s := range all {
		there[s.flow] = true
	}
	// What is in TIME_WAIT comes last, and few of it: it has nothing to say any more, and
	// there may be tens of thousands.
	slices.SortStableFunc(all, func(a, b connection) int { return waits(a) - waits(b) })
	waiting := 0
	for _, s := range all {
		if waiting += waits(s); waiting > maxWaiting {
			break
		}
		switch {
		case s.local.Port() == mesh.InboundPort:
			c.clients[s.remote] = true
		case s.mark == leadMark && slices.Contains(own, s.remote.Addr()):
			c.led = append(c.led, s.reversed())
		case s.mark == mesh.Mark, s.local.Port() == mesh.OutboundPort, !slices.Contains(own, s.local.Addr()),
			slices.Contains(own, s.remote.Addr()), s.remote.Addr().IsLoopback():
		case there[flow{redirected(s.local.Addr()), s.local}]:
			c.former = append(c.former, s.local)
		case there[flow{s.remote, s.local}]:
			c.captured = append(c.captured, s)
		default:
			c.free = append(c.free, s)
			if s.hasBeenLeft() {
				c.left = append(c.left, s)
			}
		}
	}
	return c
}

func waits(s connection) int {
	if s.state == netlink.TCP_TIME_WAIT {
		return 1
	}
	return 0
}

// redirected is where nat led connections of a's family.
func redirected(a netip.Addr) netip.AddrPort {
	if a.Is6() {
		return netip.AddrPortFrom(netip.IPv6Loopback(), mesh.OutboundPort)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), mesh.OutboundPort)
}

// addresses are the pod's own.
func addresses(ns *netns.NS) (own []netip.Addr, err error) {
	err = inside(ns, func(h *netlink.Handle, families []int) error {
		for _, f := range families {
			addrs, err := h.AddrList(nil, f)
			if err != nil {
				return fmt.Errorf("list addresses: %w", err)
			}
			for _, a := range addrs {
				if ip, ok := netip.AddrFromSlice(a.IP); ok {
					own = append(own, ip.Unmap())
				}
			}
		}
		return nil
	})
	return own, err
}

// takeCensus counts the connections of a pod.
func takeCensus(ns *netns.NS) (census, error) {
	own, err := addresses(ns)
	if err != nil {
		return census{}, err
	}
	all, err := sockets(ns)
	if err != nil {
		return census{}, err
	}
	c := count(all, own)
	c.transits, err = transits(ns, own)
	return c, err
}

func flowsOf(all []connection) []flow {
	flows := make([]flow, len(all))
	for i, s := range all {
		flows[i] = s.flow
	}
	return flows
}

// destroy resets both ends of connections. One that is there no more is no error.
func destroy(ns *netns.NS, flows []flow) error {
	fd, err := ns.Netlink(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for i, f := range flows {
		err := tell(fd, uint32(i+1), sockDestroy, 0, destroyRequest(f))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("reset %s to %s (needs the kernel's INET_DIAG_DESTROY): %w", f.local, f.remote, err)
		}
	}
	return nil
}

func destroyRequest(f flow) []byte {
	req := make([]byte, reqSize)
	req[0], req[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if f.local.Addr().Is4() {
		req[0] = unix.AF_INET
	}
	binary.NativeEndian.PutUint32(req[4:], ^uint32(0))
	binary.BigEndian.PutUint16(req[reqPorts:], f.local.Port())
	binary.BigEndian.PutUint16(req[reqPorts+2:], f.remote.Port())
	copy(req[reqPorts+4:], f.local.Addr().AsSlice())
	copy(req[reqPorts+20:], f.remote.Addr().AsSlice())
	for i := reqSize - 8; i < reqSize; i++ {
		req[i] = 0xff // any cookie
	}
	return req
}
