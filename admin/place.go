package admin

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
)

// place is where to listen: TCP, or a unix socket of one user's. Processes that share a network
// namespace share its loopback, and so whatever listens there; a socket has an owner.
type place struct {
	addr string
	// uid is the owner of a socket; 0 or less means our own user.
	uid int
}

func isPath(addr string) bool { return strings.HasPrefix(addr, "/") }

// network is what dials addr.
func network(addr string) string {
	if isPath(addr) {
		return "unix"
	}
	return "tcp"
}

func (p place) listen(ctx context.Context) (net.Listener, error) {
	var lc net.ListenConfig
	if !isPath(p.addr) {
		return lc.Listen(ctx, "tcp", p.addr)
	}
	// Made aside and renamed: there is no moment with the wrong owner or mode.
	made := p.addr + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := lc.Listen(ctx, "unix", made)
	if err != nil {
		return nil, err
	}
	// The next process replaces the file: a late remove could hit its successor's.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	err = os.Chmod(made, 0o600)
	if p.uid > 0 {
		err = errors.Join(err, os.Chown(made, p.uid, -1))
	}
	if err = errors.Join(err, os.Rename(made, p.addr)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Dial connects to the address of a process, HOST:PORT or the path of a socket.
func Dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network(addr), addr)
}
