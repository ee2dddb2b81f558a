package proxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/relay"
	"tacit.dev/socket"
)

const (
	// maxBinds is how many sockets one dial may use up on ports that are taken.
	maxBinds = 16
	// maxMarked is how many look for a port that hints at TLS, where it may be another one.
	// Of 4,536 there are for each destination: with half of them in use, one dial of 4,096
	// finds none, with three quarters one of 32.
	maxMarked = 12
	// plainFirst begins the ports, up to the marked ones, that a plain dial takes where the
	// kernel would give it a marked one.
	plainFirst = 32768
)

// portChoice says which source port a dial binds.
type portChoice uint8

const (
	// anyPort leaves address and port to the kernel. It is never a port that hints at TLS.
	anyPort portChoice = iota
	// directPorts takes a random one of the range that hints at TLS, or any if
	// most are taken.
	directPorts
	// markedPorts takes one of those, or none.
	markedPorts
	// samePort takes the one given, or any if it cannot be had.
	samePort
)

// dialling is one dial from inside a pod's namespace.
type dialling struct {
	// from is the source address, not used with anyPort. It need not be the
	// pod's: the sockets are transparent.
	from netip.Addr
	// port is the one that samePort asks for.
	port  uint16
	ports portChoice
	to    netip.AddrPort
	// missed is why samePort took another one.
	missed error
	// open says that the kernel was left the choice among all of its ports. If it finds
	// none there is none.
	open bool
	// same says that the kernel was given the choice of one port, at connect: the socket does
	// not keep it, and can be used again.
	same bool
}

// portRange are the ports that the kernel takes for those who ask for none
// (net.ipv4.ip_local_port_range); the zero value is one that is not known.
type portRange struct{ first, last uint16 }

func (r portRange) has(port uint16) bool { return r.first <= port && port <= r.last }

var errNoPort = errors.New("no source port")

// dial connects with a socket of the pod's namespace. Ports that are taken cost a socket
// each: a socket is bound once only.
func (d *pod) dial(ctx context.Context, g *dialling) (*net.TCPConn, error) {
	var taken error
	for try := range maxBinds {
		s, err := d.sockets(g.to.Addr().Is6()).take(ctx)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", g.to, err)
		}
		if s, err = d.bind(ctx, s, g, try); err == nil {
			var c *net.TCPConn
			if c, err = s.connect(ctx, g.to); err == nil {
				return c, nil
			}
		}
		if !isPortTaken(err) {
			return nil, fmt.Errorf("dial %s: %w", g.to, err)
		}
		if taken = err; g.open {
			break
		}
		if g.missed == nil {
			g.missed = err
		}
	}
	return nil, fmt.Errorf("dial %s: %w: %w", g.to, errNoPort, taken)
}

// isPortTaken reports whether bind or connect found address and port in use.
func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// bind binds s, if the source is of importance. It owns s, and returns the socket to
// connect, which may be another one.
func (d *pod) bind(ctx context.Context, s spare, g *dialling, try int) (spare, error) {
	var err error
	switch g.ports {
	case anyPort:
		err = d.avoidMarked(s, g, try)
	case directPorts, markedPorts:
		if try < maxMarked || g.ports == markedPorts {
			err = bindTo(s.fd, netip.AddrPortFrom(g.from, markedPort()))
		} else {
			err = g.bindOpen(s)
		}
	case samePort:
		s, err = d.bindSame(ctx, s, g, try)
	}
	if err != nil {
		s.close()
		return spare{}, err
	}
	return s, nil
}

// avoidMarked keeps a plain dial from a port that hints at TLS, where the pod's own
// settings would let it have one.
func (d *pod) avoidMarked(s spare, g *dialling, try int) error {
	r := d.ephemeral()
	if r.last < mesh.DirectPortFirst {
		g.open = true
		return errors.Join(s.forgetAddress(), s.forgetPorts())
	}
	if try == 0 && r.first < mesh.DirectPortFirst && limitPorts(s.fd, r.first, mesh.DirectPortFirst-1) == nil {
		return s.forgetAddress()
	}
	port := uint16(plainFirst + rand.N(mesh.DirectPortFirst-plainFirst))
	return bindTo(s.fd, netip.AddrPortFrom(unspecified(s.fd), port))
}

// unspecified is the wildcard address of fd's family.
func unspecified(fd int) netip.Addr {
	if family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_INET6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// bindSame binds s to the client's port. What the kernel gives at connect does not take
// the port from those who connect without asking for one, as what is bound before does: else
// a pod that serves many clients could dial nobody. So that is tried first, where the kernel
// would give such a port.
func (d *pod) bindSame(ctx context.Context, s spare, g *dialling, try int) (spare, error) {
	source := netip.AddrPortFrom(g.from, g.port)
	atConnect := d.ephemeral().has(g.port)
	g.same = false
	switch {
	case g.port == 0, try > 1, try == 1 && !atConnect:
		return s, g.bindOpen(s)
	case try == 0 && atConnect && limitPorts(s.fd, g.port, g.port) == nil:
		g.same = true
		return s, s.bindAtConnect(g.from)
	}
	err := bindTo(s.fd, source)
	if !errors.Is(err, unix.EACCES) {
		return s, err
	}
	bound, err := d.bindings.take(ctx, source)
	if err != nil { // s is not bound yet
		g.missed = err
		return s, g.bindOpen(s)
	}
	s.close()
	return spare{fd: bound}, nil
}

// bindOpen binds s to the source address, and to whichever port there is.
func (g *dialling) bindOpen(s spare) error {
	g.open = true
	if err := s.forgetPorts(); err != nil {
		return err
	}
	return s.bindAtConnect(g.from)
}

// bindTo relies on SO_REUSEADDR, which the agent has set: others may have the port too.
func bindTo(fd int, source netip.AddrPort) error {
	return os.NewSyscallError("bind", unix.Bind(fd, socket.Address(source)))
}

// bindAtConnect binds s to an address, and leaves the port to the kernel until it
// knows where the connection goes.
func (s spare) bindAtConnect(from netip.Addr) error {
	if s.conn == nil { // else it has been
		if err := unix.SetsockoptInt(s.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
		}
	}
	return bindTo(s.fd, netip.AddrPortFrom(from, 0))
}

// limitPorts has the kernel choose the port of fd, at connect, from first to last, as far as
// they are among the ephemeral ones of the namespace. Linux can do so since 6.3.
func limitPorts(fd int, first, last uint16) error {
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(uint32(first)|uint32(last)<<16))
}

// markedPort is one of those that hint at TLS, and that the client's kernel gives to nobody.
func markedPort() uint16 {
	return mesh.DirectPortFirst + uint16(rand.N(mesh.DirectPortLast-mesh.DirectPortFirst+1))
}

// connectSocket connects fd, which it owns. It returns no later than ctx ends.
func connectSocket(ctx context.Context, fd int, to netip.AddrPort) (*net.TCPConn, error) {
	done, err := beginConnect(fd, to)
	if err == nil && done {
		// Blocking for now: os.File then leaves it out of the poller, to which
		// net.FileConn is about to add it: each entry wakes a thread.
		err = os.NewSyscallError("fcntl", unix.SetNonblock(fd, false))
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	if err == nil && !done {
		err = awaitConnected(ctx, f, to)
	}
	if err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// beginConnect reports whether fd, which is new, is connected already, as it mostly is to a
// socket of the same machine. The other side may send urgent bytes at once.
func beginConnect(fd int, to netip.AddrPort) (done bool, err error) {
	if err := relay.UrgentInLine(fd); err != nil {
		return false, err
	}
	if err := boundUnsent(fd); err != nil {
		return false, err
	}
	return connectNow(fd, to)
}

// connectNow begins to connect, and reports whether that was all.
func connectNow(fd int, to netip.AddrPort) (done bool, err error) {
	if done, err = tryConnect(fd, to); !done {
		done, err = tryConnect(fd, to)
	}
	return done, err
}

// tryConnect reports whether fd is connected by now. The first call begins it, and each
// other one tells how far it is.
func tryConnect(fd int, to netip.AddrPort) (done bool, err error) {
	switch err := unix.Connect(fd, socket.Address(to)); err {
	case nil, unix.EISCONN:
		return true, nil
	case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
		return false, nil
	default:
		return true, os.NewSyscallError("connect", err)
	}
}

// pollable is a socket in the poller.
type pollable interface {
	syscall.Conn
	SetWriteDeadline(time.Time) error
}

// awaitConnected blocks until the handshake of TCP has ended, or ctx.
func awaitConnected(ctx context.Context, f pollable, to netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		f.SetWriteDeadline(deadline)
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		f.SetWriteDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-ended
		}
	}()
	var result error
	// An unconnected socket is writable in the eyes of epoll, so the question
	// may come before the answer is there.
	err = raw.Write(func(fd uintptr) bool {
		var done bool
		done, result = tryConnect(int(fd), to)
		return done
	})
	if ctx.Err() != nil {
		return os.NewSyscallError("connect", ctx.Err())
	}
	if err != nil {
		return os.NewSyscallError("connect", err)
	}
	return result
}
