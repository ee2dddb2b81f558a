package app

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// stuck reads as many bytes as the first eight say, and nothing after them, until the client resets.
func stuck(_ *server, c *net.TCPConn) {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint64(head[:]))); err != nil {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Write(func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd)}} // POLLHUP and POLLERR are always told
		n, err := unix.Poll(p[:], 0)
		return n > 0 || err != nil
	})
}

// stalledAfter is how long a connection takes no byte and counts as stalled.
const stalledAfter = 500 * time.Millisecond

// bulk HOST:PORT: sends without end to a server that stops reading (stuck). When nothing has
// gone out for a while on any connection, it says how much went in, and waits for its end.
func bulk(ctx context.Context, words []string, out io.Writer) error {
	flags := flag.NewFlagSet("bulk", flag.ContinueOnError)
	count := flags.Int("count", 1, "connections at once")
	read := flags.Int64("read", 0, "bytes of each that the server reads before it stops")
	if err := flags.Parse(words); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b := &bulkLoad{address: flags.Arg(0), read: *read, block: make([]byte, 64<<10)}
	b.unstalled.Add(int64(*count))
	b.stalled = sync.OnceFunc(func() { fmt.Fprintf(out, "stalled with %d bytes unread\n", b.sent.Load()-*read*int64(*count)) })
	var g sync.WaitGroup
	for range *count {
		g.Go(func() {
			if err := b.once(ctx); err != nil && ctx.Err() == nil {
				cancel(err)
			}
		})
	}
	g.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

type bulkLoad struct {
	address string
	read    int64
	block   []byte
	sent    atomic.Int64
	// unstalled are those that still move; when there is none, stalled is called.
	unstalled atomic.Int64
	stalled   func()
}

// once sends until ctx ends. A connection that ends before is an error.
func (b *bulkLoad) once(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", b.address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.(*net.TCPConn).SetWriteBuffer(64 << 10) // what waits is to wait in others
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], uint64(b.read))
	if _, err := c.Write(head[:]); err != nil {
		return err
	}
	moves := true
	for ctx.Err() == nil {
		_ = c.SetWriteDeadline(time.Now().Add(stalledAfter))
		n, err := c.Write(b.block)
		b.sent.Add(int64(n))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && n == 0 && moves:
			moves = false
			if b.unstalled.Add(-1) == 0 {
				b.stalled()
			}
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		}
	}
	return nil
}
