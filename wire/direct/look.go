package direct

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is what stands at the start of a stream.
type Kind uint8

const (
	// KindQuiet: nothing that decides came within the limit.
	KindQuiet Kind = iota
	// KindPlain: no ClientHello; also a FIN before any byte.
	KindPlain
	// KindOtherTLS: a ClientHello without our ALPN, the application's own TLS.
	KindOtherTLS
	// KindDirect: a ClientHello with our ALPN.
	KindDirect
)

// String is the word for logs.
func (k Kind) String() string {
	return [...]string{"quiet", "plain", "other_tls", "direct"}[k&3]
}

// Look tells what stands at the start of the stream, and consumes nothing of
// it. It returns as soon as that is decided, at the latest after limit; a limit of 0
// is none. No one else may read from c meanwhile; the read deadline of c is cleared.
// The error is that of the socket (a reset), or of ctx.
//
// Each time that bytes arrive they are read once, with MSG_PEEK, from the
// start; a ClientHello arrives in two or three segments. While Look waits, it holds
// no buffer: what has come stays in the kernel.
func Look(ctx context.Context, c *net.TCPConn, limit time.Duration) (Kind, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return KindQuiet, fmt.Errorf("look at the start of a stream: %w", err)
	}
	until := deadline(ctx)
	if limit > 0 {
		if t := time.Now().Add(limit); until.IsZero() || t.Before(until) {
			until = t
		}
	}
	lift := bound(ctx, until, c.SetReadDeadline)
	var p peek
	err = raw.Read(p.attempt)
	lift()
	switch {
	case ctx.Err() != nil:
		return p.kind, fmt.Errorf("look at the start of a stream: %w", ctx.Err())
	case errors.Is(err, os.ErrDeadlineExceeded):
		return p.kind, nil
	case err != nil:
		return p.kind, fmt.Errorf("look at the start of a stream: %w", err)
	case p.err != nil:
		return p.kind, fmt.Errorf("look at the start of a stream: %w", p.err)
	}
	return p.kind, nil
}

// peek is one look.
type peek struct {
	kind Kind
	err  error
}

// attempt reports whether the look is over. The poller calls it again whenever
// more bytes have arrived, because it is told of edges, not of levels.
func (p *peek) attempt(fd uintptr) bool {
	b := lend(smallSize)
	defer takeBack(b)
	n, _, err := unix.Recvfrom(int(fd), b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	for err == unix.EINTR {
		n, _, err = unix.Recvfrom(int(fd), b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}
	switch {
	case err == unix.EAGAIN:
		return false
	case err != nil:
		p.err = os.NewSyscallError("recvfrom", err)
		return true
	case n == 0:
		p.kind = KindPlain
		return true
	}
	if p.kind = helloKind(b[:n]); p.kind != KindQuiet {
		return true
	}
	return p.isAll(fd)
}

// isAll reports whether nothing comes behind the start of a ClientHello: a peek sees
// neither FIN nor RST while there are bytes before it.
func (p *peek) isAll(fd uintptr) bool {
	ask := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(ask[:], 0); n == 0 || err != nil {
		return false
	}
	if ask[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
		p.err = os.NewSyscallError("recvfrom", unix.ECONNRESET)
		return true
	}
	p.kind = KindPlain
	return true
}
