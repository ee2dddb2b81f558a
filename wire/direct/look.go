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
// it. It returns as soon as that is decided, at the latest after limit. No
// one else may read from c meanwhile; the read deadline of c is cleared. The
// error is that of the socket (a reset), or of ctx.
//
// Each time that bytes arrive they are read once, with MSG_PEEK, from the
// start; a ClientHello arrives in two or three segments.
func Look(ctx context.Context, c *net.TCPConn, limit time.Duration) (Kind, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return KindQuiet, fmt.Errorf("look at the start of a stream: %w", err)
	}
	until := time.Now().Add(limit)
	if d, ok := ctx.Deadline(); ok && d.Before(until) {
		until = d
	}
	lift := bound(ctx, until, c.SetReadDeadline)
	p := peek{buf: lend(smallSize)}
	defer takeBack(p.buf)
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
	buf  []byte
	kind Kind
	err  error
}

// attempt reports whether the look is over. The poller calls it again whenever
// more bytes have arrived, because it is told of edges, not of levels.
func (p *peek) attempt(fd uintptr) bool {
	n, _, err := unix.Recvfrom(int(fd), p.buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	for err == unix.EINTR {
		n, _, err = unix.Recvfrom(int(fd), p.buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
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
	p.kind = helloKind(p.buf[:n])
	return p.kind != KindQuiet
}
