package direct

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A connection that is kept carries one connection of an application after the
// other, never two at once: nothing waits behind somebody else's bytes, and a reset
// is a reset of TCP as ever. It saves the next one all handshakes.
//
//	       Client                               Server
//	Finish ─────── empty record ──────────►  io.EOF
//	io.EOF ◄────── empty record ──────────── Finish
//	Finished: nothing is under way          Finished
//	Next ───────── preamble ──────────────►  AwaitNext
//	     ◄──────────────────────────────────  Reply
//
// Nothing of the application goes before the Reply: if the connection turns out to be
// dead, or to be closed by the server just now, the client can dial instead. That the
// client is Finished does not say that the server has read all of it: it may have ended
// its direction before. Who ends the connection then uses Close, never Abort.
//
// Who does not want to keep it says CloseWrite instead of Finish, or later.

// Keeps reports whether both sides can go on after Finish.
func (c *Conn) Keeps() bool { return c.keep != nil }

// Finish ends this direction, as CloseWrite does, but not the connection. If the peer
// has closed its side for good already, it is CloseWrite.
func (c *Conn) Finish() error {
	if c.keep == nil || c.ended.Load() && c.keep.over {
		return c.CloseWrite()
	}
	err := c.keep.finish()
	if err == nil {
		c.finished.Store(true)
	}
	return err
}

// Finished reports whether both sides have said Finish: nothing of what was carried is
// under way any more, and the connection may be kept.
func (c *Conn) Finished() bool {
	return c.keep != nil && c.finished.Load() && c.ended.Load() && !c.keep.over
}

// Delivered reports whether the peer's host has acknowledged all that was written, but for
// the record of Finish. The peer may not have read it yet.
func (c *Conn) Delivered() bool {
	unacknowledged, err := -1, error(nil)
	rerr := c.in.raw.Control(func(fd uintptr) { unacknowledged, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return errors.Join(rerr, err) == nil && unacknowledged <= overhead
}

// restart makes a connection that is Finished ready to carry the next one. Nobody
// else may use it meanwhile.
func (c *Conn) restart() {
	c.keep.again()
	c.replied = !c.client
	c.ended.Store(false)
	c.finished.Store(false)
}

// Next sends the preamble of the next connection over one that is Finished, and awaits the
// reply, as AwaitReply does. After an error the server may have dialled the application,
// and has given it nothing.
func (c *Conn) Next(ctx context.Context, h Hello) (Reply, error) {
	b, err := appendHello(nil, h)
	if err != nil {
		return Reply{}, err
	}
	c.restart()
	defer bound(ctx, deadline(ctx), c.c.SetDeadline)()
	if _, err = c.s.write(b); err != nil {
		return Reply{}, fmt.Errorf("direct to %s: %w", c.c.RemoteAddr(), err)
	}
	return c.awaitReply(ctx)
}

// IsQuiet reports whether nothing has come on a connection that is Finished: neither
// the end nor a byte, which nobody may send now.
func (c *Conn) IsQuiet() bool {
	quiet := len(c.in.bytes()) == 0
	err := c.in.raw.Control(func(fd uintptr) {
		var look [1]byte
		_, _, err := unix.Recvfrom(int(fd), look[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		quiet = quiet && err == unix.EAGAIN
	})
	return err == nil && quiet
}

// AwaitNext waits, on a connection that is Finished, for the preamble of the next one.
// The error is io.EOF if the client has closed the connection in an orderly way. The
// deadline of ctx bounds the wait.
func (c *Conn) AwaitNext(ctx context.Context) (Hello, error) {
	c.restart()
	defer bound(ctx, deadline(ctx), c.c.SetReadDeadline)()
	err := c.AwaitReadable()
	if err != nil {
		return Hello{}, err
	}
	return readHello(c)
}
