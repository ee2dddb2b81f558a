package direct

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

// ErrTruncated is returned by Read when the stream ended without close_notify:
// bytes may be missing, and the application must see a reset.
var ErrTruncated = fmt.Errorf("stream ended without close_notify: %w", io.ErrUnexpectedEOF)

var errNoReply = errors.New("direct: Read before AwaitReply")

// Peer is what the handshake proved of the other side.
type Peer struct {
	ID mesh.ID
	// NotAfter is when the peer's certificate ends.
	NotAfter time.Time
	// Resumed says that a session was resumed; certificate and bundle were checked again.
	Resumed     bool
	CipherSuite uint16
	// Curve is the key exchange. A resumed session is protected by that of the
	// full handshake too, with which it began.
	Curve tls.CurveID
}

// Conn is one end of a direct connection.
//
// One goroutine may read (AwaitReply, AwaitReadable, Read) while another one
// writes (Reply, Write, CloseWrite). Abort and Close may be called by anyone at any
// time, and end what the others wait for.
//
//	       Client                               Server
//	handshake, preamble ──────────────► handshake, preamble
//	Write ...                                   │  dial the application
//	AwaitReply ◄──────────────────────────── Reply
//	Read, Write ◄──────────────────────────► Read, Write
//	CloseWrite ─── close_notify ──────────►  io.EOF
//	io.EOF ◄────── close_notify, FIN ─────── CloseWrite
//	Close ──────── FIN ───────────────────►  Close: TIME_WAIT is here
//
// If it Keeps, both may say Finish instead of CloseWrite, and go on: see keep.go.
type Conn struct {
	c      *net.TCPConn
	in     inbox
	s      stream
	keep   *records // s, if the connection can be kept; else nil
	peer   Peer
	client bool

	replied  bool        // the reading side's: AwaitReply was successful
	ended    atomic.Bool // Read gave io.EOF
	finished atomic.Bool // Finish was successful
	finSent  atomic.Bool
	release  sync.Once
}

// Client runs the handshake as the side that dialled, and sends the preamble.
// cfg comes from identity.TLS. The Conn can be written to at once; AwaitReply
// must be called, once, before the first Read, and may run while another goroutine
// writes. The Conn owns c; if Client fails, c is reset. The deadline of ctx
// bounds the handshake; afterwards c has no deadline.
//
// identity.Reason tells errors apart.
func Client(ctx context.Context, c *net.TCPConn, cfg *tls.Config, h Hello) (*Conn, error) {
	return client(ctx, c, cfg, opening{hello: h}, side{client: true, own: ownRecords()})
}

// First gives what the application has said by now, possibly nothing. It is called
// at most once for a connection, when the peer's identity is proved. Its error
// becomes that of the connection.
type First func() ([]byte, error)

// opening is what the side that dialled says first, in one write: mostly one packet
// instead of two, and one wakeup of the receiver.
type opening struct {
	hello Hello
	first First // or nil
}

func (o opening) bytes() ([]byte, error) {
	b, err := appendHello(nil, o.hello)
	if err != nil || o.first == nil {
		return b, err
	}
	p, err := o.first()
	return append(b, p...), err
}

// Way is how Dial gets to the server.
type Way struct {
	// Connect makes the connection of TCP.
	Connect func(context.Context) (*net.TCPConn, error)
	// Limit bounds the handshake that follows: who answers at all answers soon, while
	// a SYN may be sent for minutes. 0 means that only ctx does.
	Limit time.Duration
}

// Dial is Client on a connection that way makes, and is cheaper where there is a
// session to resume. It connects a second time if the server turns out not to
// know the session any more, which happens once after it was restarted or has
// renewed its certificate. What first gives goes along with the preamble. The errors
// are those of Connect, as they are, and of Client.
func Dial(ctx context.Context, way Way, cfg *tls.Config, h Hello, first First) (*Conn, error) {
	say := opening{h, first}
	conn, err := way.open(ctx, cfg, say, side{client: true, own: ownRecords(), quick: true})
	if !errors.Is(err, errStale) {
		return conn, err
	}
	return way.open(ctx, cfg, say, side{client: true, own: ownRecords()})
}

func (w Way) open(ctx context.Context, cfg *tls.Config, say opening, o side) (*Conn, error) {
	c, err := w.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if w.Limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.Limit)
		defer cancel()
	}
	return client(ctx, c, cfg, say, o)
}

func client(ctx context.Context, c *net.TCPConn, cfg *tls.Config, say opening, o side) (*Conn, error) {
	conn, err := start(ctx, c, cfg, o, func(conn *Conn) error {
		b, err := say.bytes()
		if err == nil {
			_, err = conn.s.write(b)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("direct to %s: %w", c.RemoteAddr(), err)
	}
	return conn, nil
}

// Server runs the handshake as the side that accepted, and reads the
// preamble. cfg comes from identity.TLS. The caller decides about Peer, dials
// the application, and calls Reply before it writes anything else. The Conn owns
// c; if Server fails, c is reset. The deadline of ctx bounds the handshake and the
// preamble; afterwards c has no deadline.
//
// identity.Reason tells errors apart.
func Server(ctx context.Context, c *net.TCPConn, cfg *tls.Config) (*Conn, Hello, error) {
	return serve(ctx, c, cfg, side{own: ownRecords()})
}

func serve(ctx context.Context, c *net.TCPConn, cfg *tls.Config, o side) (*Conn, Hello, error) {
	var hello Hello
	conn, err := start(ctx, c, cfg, o, func(conn *Conn) (err error) {
		conn.replied = true
		hello, err = readHello(conn)
		return cutShort(err)
	})
	if err != nil {
		return nil, Hello{}, fmt.Errorf("direct from %s: %w", c.RemoteAddr(), err)
	}
	return conn, hello, nil
}

// start runs the handshake and then greet, both within the bounds of ctx.
func start(ctx context.Context, c *net.TCPConn, cfg *tls.Config, o side, greet func(*Conn) error) (_ *Conn, err error) {
	conn := &Conn{c: c, client: o.client}
	// From here on the death of the process is a reset for the peer.
	err = c.SetLinger(0)
	defer func() {
		if err != nil {
			_ = conn.Abort()
		}
	}()
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	conn.in.bind(raw)
	defer bound(ctx, deadline(ctx), c.SetDeadline)()
	hs, err := o.shake(ctx, &conn.in, c, cfg)
	if err != nil {
		return nil, err
	}
	conn.peer = hs.peer
	if hs.keys != nil {
		var s *records
		s, err = newRecords(hs, o.client)
		if conn.s = s; hs.keeps {
			conn.keep = s
		}
	} else {
		conn.s, err = newCryptoTLS(hs)
	}
	if err == nil {
		err = greet(conn)
	}
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return conn, err
}

// Peer tells who the other side is.
func (c *Conn) Peer() Peer { return c.peer }

// Raw is the socket, for its addresses and options only.
func (c *Conn) Raw() *net.TCPConn { return c.c }

// AwaitReply waits for the server's preamble. A Reply with another status than
// StatusOK is no error; nothing follows it but the end. If the server refuses our
// certificate, that is told here: it is checked after Client has returned.
func (c *Conn) AwaitReply(ctx context.Context) (Reply, error) {
	defer bound(ctx, deadline(ctx), c.c.SetReadDeadline)()
	return c.awaitReply(ctx)
}

// awaitReply reads the server's preamble. The caller has bound it.
func (c *Conn) awaitReply(ctx context.Context) (Reply, error) {
	reply, err := readReply(streamReader{c.s})
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return Reply{}, fmt.Errorf("direct to %s: %w", c.c.RemoteAddr(), err)
	}
	c.replied = true
	return reply, nil
}

// streamReader is a stream as an io.Reader.
type streamReader struct{ s stream }

func (r streamReader) Read(p []byte) (int, error) { return r.s.read(p) }

// Reply sends the server's preamble.
func (c *Conn) Reply(r Reply) error {
	_, err := c.s.write(appendReply(nil, r))
	return err
}

// AwaitReadable blocks until Read would not block: bytes, end or error. Meanwhile
// the connection holds no buffer, or that of a record of which not all has come.
func (c *Conn) AwaitReadable() error { return c.s.await() }

// Read opens records into p. It gives io.EOF after close_notify, ErrTruncated
// if the stream ends without it, and syscall.ECONNRESET after a reset. It uses
// all of p as scratch space, and does best if p has room for several records of
// 16 KiB.
func (c *Conn) Read(p []byte) (int, error) {
	if !c.replied {
		return 0, errNoReply
	}
	n, err := c.s.read(p)
	if err == io.EOF {
		c.ended.Store(true)
	}
	return n, err
}

// Write seals p into records, four full ones at most per write to the socket.
// After an error nothing can be written any more.
func (c *Conn) Write(p []byte) (int, error) { return c.s.write(p) }

// CloseWrite sends close_notify. The FIN of TCP goes with it on the side that
// accepted; on the side that dialled it waits for Close, so that TIME_WAIT is
// left to the acceptor, whose ports are not scarce.
func (c *Conn) CloseWrite() error {
	if !c.client {
		c.finSent.Store(true)
	}
	return c.s.end(!c.client)
}

// Abort resets the connection and releases the socket. Further calls do nothing.
func (c *Conn) Abort() error {
	var err error
	c.release.Do(func() { err = c.c.Close() }) // SO_LINGER is zero since the start
	return err
}

// Close releases the socket in an orderly way: what was written is still
// delivered. It does not send close_notify: without CloseWrite before, the other
// side sees a truncation. Further calls do nothing. It may block for finWait.
func (c *Conn) Close() error {
	var err error
	c.release.Do(func() {
		c.finSent.Store(true)
		if c.client && c.ended.Load() {
			c.awaitFIN()
		}
		_ = c.c.SetLinger(-1)
		err = c.c.Close()
	})
	return err
}

// finWait is how long the side that dialled waits for the FIN behind a
// close_notify. They mostly come in one packet.
const finWait = 20 * time.Millisecond

// awaitFIN lets the peer's FIN come first: whose FIN does gets TIME_WAIT. It does
// not wait as a reader, because AwaitReset may be one.
func (c *Conn) awaitFIN() {
	_ = c.in.raw.Control(func(fd uintptr) {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, int(finWait.Milliseconds()))
	})
}

// AwaitReset blocks until the peer resets the connection, and returns that error,
// or net.ErrClosed when it is over otherwise. It is for the time after Read has
// given io.EOF, when nobody reads any more.
func (c *Conn) AwaitReset() error {
	if err := c.in.raw.Read(func(fd uintptr) bool { return tcpClosed(fd) }); err != nil {
		return err
	}
	if c.finSent.Load() {
		return net.ErrClosed
	}
	return fmt.Errorf("after its end of input: %w", syscall.ECONNRESET)
}

// tcpClosed reports whether a socket is connected no more (TCP_CLOSE in net/tcp_states.h).
func tcpClosed(fd uintptr) bool {
	const tcpClose = 7
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	return err != nil || info.State == tcpClose
}

// SetReadDeadline bounds AwaitReadable and Read.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// SetWriteDeadline bounds Write and CloseWrite.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }
