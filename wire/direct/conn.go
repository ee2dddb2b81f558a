package direct

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"tacit.dev/mesh"
)

// ErrTruncated is returned by Read when the stream ended without close_notify:
// bytes may be missing, and the application must see a reset.
var ErrTruncated = fmt.Errorf("stream ended without close_notify: %w", io.ErrUnexpectedEOF)

// Peer is what the handshake proved of the other side.
type Peer struct {
	ID mesh.ID
	// Resumed says that a session was resumed; certificate and bundle were checked again.
	Resumed bool
	// CipherSuite and Curve are numbers of crypto/tls.
	CipherSuite uint16
	Curve       tls.CurveID
}

// Conn is one end of a direct connection.
//
// One goroutine may read (AwaitReply, AwaitReadable, Read) while another one
// writes (Write, CloseWrite). Abort and Close may be called by anyone at any time.
type Conn struct{}

// Client runs the handshake as the side that dialled, and sends the preamble.
// cfg comes from identity.TLS. The Conn can be written to at once; AwaitReply
// must be called, once, before the first Read, and may run while another goroutine
// writes. The Conn owns c; if Client fails, c is reset. The deadline of ctx
// bounds the handshake; afterwards c has no deadline.
func Client(ctx context.Context, c *net.TCPConn, cfg *tls.Config, h Hello) (*Conn, error) {
	return nil, errors.New("not yet")
}

// Server runs the handshake as the side that accepted, and reads the
// preamble. cfg comes from identity.TLS. The caller decides about Peer, dials
// the application, and calls Reply before it writes anything else. The Conn owns
// c; if Server fails, c is reset. The deadline of ctx bounds the handshake and the
// preamble; afterwards c has no deadline.
func Server(ctx context.Context, c *net.TCPConn, cfg *tls.Config) (*Conn, Hello, error) {
	return nil, Hello{}, errors.New("not yet")
}

// Peer tells who the other side is.
func (c *Conn) Peer() Peer { return Peer{} }

// Raw is the socket, for its addresses and options only.
func (c *Conn) Raw() *net.TCPConn { return nil }

// AwaitReply waits for the server's preamble. A Reply with another status than
// StatusOK is no error; nothing follows it but the end.
func (c *Conn) AwaitReply(ctx context.Context) (Reply, error) { return Reply{}, errors.New("not yet") }

// Reply sends the server's preamble.
func (c *Conn) Reply(r Reply) error { return errors.New("not yet") }

// AwaitReadable blocks until Read would not block: bytes, end or error. Meanwhile
// the connection holds no buffer.
func (c *Conn) AwaitReadable() error { return errors.New("not yet") }

// Read opens records into p. It gives io.EOF after close_notify, ErrTruncated
// if the stream ends without it, and syscall.ECONNRESET after a reset.
func (c *Conn) Read(p []byte) (int, error) { return 0, errors.New("not yet") }

// Write seals p into records. It may put several into one write to the socket.
func (c *Conn) Write(p []byte) (int, error) { return 0, errors.New("not yet") }

// CloseWrite sends close_notify. The FIN of TCP goes with it on the side that
// accepted; on the side that dialled it waits until the other direction has ended
// too, so that TIME_WAIT is left to the acceptor, whose ports are not scarce.
func (c *Conn) CloseWrite() error { return errors.New("not yet") }

// Abort resets the connection and releases the socket. Further calls do nothing.
func (c *Conn) Abort() error { return nil }

// Close releases the socket in an orderly way: what was written is still
// delivered. It does not send close_notify: without CloseWrite before, the other
// side sees a truncation. Further calls do nothing.
func (c *Conn) Close() error { return nil }

// SetReadDeadline bounds AwaitReadable and Read.
func (c *Conn) SetReadDeadline(t time.Time) error { return nil }

// SetWriteDeadline bounds Write and CloseWrite.
func (c *Conn) SetWriteDeadline(t time.Time) error { return nil }
