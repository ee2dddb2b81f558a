package netns

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// The bound holds for what a listener accepts, too, and for what is connected again: the proxy's
// sockets are made so.
func TestBoundUnreadIsInherited(t *testing.T) {
	const most = 256 << 10
	ns, at := unnamed(t), netip.MustParseAddrPort("127.0.0.1:7001")
	f, err := ns.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := int(f.Fd()) // blocking from now on
	callers, err := ns.Sockets(SocketConfig{Family: 4, Count: 2, Mark: 1})
	if err != nil {
		t.Fatal(err)
	}
	unbound := unread(t, l)
	for i, row := range []struct{ bound, want int }{{0, unbound}, {most, most}} {
		defer unix.Close(callers[i])
		if err := BoundUnread(l, row.bound); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(callers[i], socket.Address(at)); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
		fd, _, err := unix.Accept(l)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if got := unread(t, fd); got != row.want {
			t.Errorf("with a bound of %d, %d bytes may wait: want %d", row.bound, got, row.want)
		}
	}
}

// unread is the memory for what waits unread in a socket.
func unread(t *testing.T, fd int) int {
	t.Helper()
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
