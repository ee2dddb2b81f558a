package direct

import (
	"context"
	"errors"
	"net"
	"time"
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

// Look tells what stands at the start of the stream, and consumes nothing of
// it. It returns as soon as that is decided, at the latest after limit. No
// one else may read from c meanwhile; the read deadline of c is cleared. The
// error is that of the socket (a reset), or of ctx.
func Look(ctx context.Context, c *net.TCPConn, limit time.Duration) (Kind, error) {
	return 0, errors.New("not yet")
}
