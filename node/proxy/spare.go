package proxy

import (
	"context"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/relay"
)

// spare is one unconnected socket. One goroutine owns it.
type spare struct {
	fd int
	// conn is the connection that it was before, and is again next, nil if it never was one. It
	// owns fd then: what package net once took over need not be taken over again.
	conn *net.TCPConn
}

// canBeAgain reports whether the socket of g can be connected to somebody else afterwards. One that was
// bound to a port keeps it for life, and one of a link-local address its interface.
func (g *dialling) canBeAgain() bool {
	return g.same && !g.from.IsLinkLocalUnicast() && !g.to.Addr().IsLinkLocalUnicast()
}

// used makes a spare of a connection that is over, or closes it. Nobody else may have c any
// more. It keeps source address and range of ports until the next ones are given.
func used(c *net.TCPConn) (s spare, ok bool) {
	s = spare{fd: -1, conn: c}
	err := c.SetDeadline(time.Time{})
	if raw, rerr := c.SyscallConn(); err == nil && rerr == nil {
		err = raw.Control(func(fd uintptr) { s.fd = int(fd) })
	}
	if err != nil || s.fd < 0 || disconnect(s.fd) != nil {
		s.close()
		return s, false
	}
	return s, true
}

func (s spare) close() {
	if s.conn != nil {
		s.conn.Close()
		return
	}
	unix.Close(s.fd)
}

// forgetAddress has the kernel choose the source address again.
func (s spare) forgetAddress() error {
	if s.conn == nil {
		return nil
	}
	return bindTo(s.fd, netip.AddrPortFrom(unspecified(s.fd), 0))
}

// forgetPorts has the kernel choose the port as if it were new.
func (s spare) forgetPorts() error {
	if s.conn == nil {
		return nil
	}
	return os.NewSyscallError("setsockopt IP_LOCAL_PORT_RANGE", limitPorts(s.fd, 0, mesh.DirectPortFirst-1))
}

// connect connects s, which it owns. It returns no later than ctx ends.
func (s spare) connect(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	if s.conn == nil {
		return s.connectFirst(ctx, to)
	}
	done, err := connectNow(s.fd, to)
	if !done {
		err = awaitConnected(ctx, s.conn, to)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s.conn, s.conn.SetWriteDeadline(time.Time{})
}

// connectFirst connects a socket that is new. It does not linger, as relay.Prepared wants it.
func (s spare) connectFirst(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	if err := unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		s.close()
		return nil, os.NewSyscallError("setsockopt SO_LINGER", err)
	}
	return connectSocket(ctx, s.fd, to)
}

// retire takes back the socket of a connection that is over, if relay has left it.
func (d *pod) retire(far relay.Conn) {
	t, ok := far.(*relay.TCPConn)
	if !ok || !t.Left() {
		return
	}
	if s, ok := used(t.Raw()); ok {
		d.sockets(isV6(t.Raw())).again(s)
	}
}
