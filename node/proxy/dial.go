package proxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/socket"
)

const (
	// maxBinds is how many sockets one dial may use up on ports that are taken.
	maxBinds = 16
	// maxMarked is how many of them look for a port that hints at TLS. Where so
	// many are taken, the connection does without the hint: the receiver then
	// has to look, and finds the ClientHello.
	maxMarked = 8
)

// portChoice says which source port a dial binds.
type portChoice uint8

const (
	// anyPort leaves address and port to the kernel.
	anyPort portChoice = iota
	// directPorts takes a random one of the range that hints at TLS, or any if
	// most are taken.
	directPorts
	// samePort takes the one given, or any if it is taken.
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
}

// dial connects with a socket that the agent made in the pod's namespace. Ports
// that are taken cost a socket each: a socket is bound once only.
func (d *pod) dial(ctx context.Context, g dialling) (*net.TCPConn, error) {
	var taken error
	for try := range maxBinds {
		fd, err := d.sockets(g.to.Addr().Is6()).take(ctx)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", g.to, err)
		}
		err = prepare(fd, g, try)
		if err == nil {
			var c *net.TCPConn
			if c, err = connectSocket(ctx, fd, g.to); err == nil {
				return c, nil
			}
		} else {
			unix.Close(fd)
		}
		if g.ports == anyPort || !isPortTaken(err) {
			return nil, fmt.Errorf("dial %s: %w", g.to, err)
		}
		taken = err
	}
	return nil, fmt.Errorf("dial %s: no source port after %d tries: %w", g.to, maxBinds, taken)
}

// isPortTaken reports whether bind or connect found address and port in use.
func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// prepare binds fd, if the source is of importance.
func prepare(fd int, g dialling, try int) error {
	if g.ports == anyPort {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
	}
	port, err := g.choose(fd, try)
	if err != nil {
		return err
	}
	return os.NewSyscallError("bind", unix.Bind(fd, socket.Address(netip.AddrPortFrom(g.from, port))))
}

// choose returns the source port of the nth try; 0 is the kernel's choice, at connect.
func (g dialling) choose(fd, try int) (uint16, error) {
	if g.ports == directPorts && try < maxMarked {
		return markedPort(), nil
	}
	if g.ports == samePort && try == 0 && g.port != 0 {
		return g.port, nil
	}
	err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	return 0, os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
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
		err = awaitConnected(ctx, f)
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

// beginConnect reports whether fd is connected already, as it mostly is to a
// socket of the same machine.
func beginConnect(fd int, to netip.AddrPort) (done bool, err error) {
	err = unix.Connect(fd, socket.Address(to))
	if err == unix.EINPROGRESS || err == unix.EINTR {
		return isConnected(fd)
	}
	return err == nil, os.NewSyscallError("connect", err)
}

// awaitConnected blocks until the handshake of TCP has ended, or ctx.
func awaitConnected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		f.SetWriteDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var result error
	// An unconnected socket is writable in the eyes of epoll, so the question
	// may come before the answer is there.
	err = raw.Write(func(fd uintptr) bool {
		var done bool
		done, result = isConnected(int(fd))
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

// isConnected reports whether a connect under way has ended, and how.
func isConnected(fd int) (done bool, err error) {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return true, os.NewSyscallError("getsockopt SO_ERROR", err)
	}
	if n != 0 {
		return true, os.NewSyscallError("connect", unix.Errno(n))
	}
	_, err = unix.Getpeername(fd)
	return err == nil, nil
}
