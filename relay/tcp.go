package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// TCPConn is a TCP connection as a Conn.
type TCPConn struct {
	c   *net.TCPConn
	raw syscall.RawConn
	// finSent is set before CloseWrite: from then on a closed socket is no
	// proof of a reset.
	finSent atomic.Bool
	// told is set when AwaitReadable or TryRead was told of a reset, which the kernel tells once.
	told    atomic.Bool
	release sync.Once
	// leaves is set by Leave, and left when Close has left the socket.
	leaves bool
	left   atomic.Bool
	send   socket.Sender
	try    attempt
}

// TCP takes over c and sets SO_LINGER to zero at once, so that the death of this
// process resets the connection instead of ending it as if all had been said. An
// urgent byte is one of the stream from now on. On a connection that is already
// closed the first Read or Write says so.
func TCP(c *net.TCPConn) *TCPConn {
	_ = c.SetLinger(0)
	raw, err := c.SyscallConn()
	if err != nil { // only for a nil *net.TCPConn
		panic("relay: TCP without a connection")
	}
	_ = raw.Control(func(fd uintptr) { _ = UrgentInLine(int(fd)) })
	return newTCPConn(c, raw)
}

func newTCPConn(c *net.TCPConn, raw syscall.RawConn) *TCPConn {
	t := &TCPConn{c: c, raw: raw}
	t.send.Bind(raw)
	t.try.bind()
	return t
}

// Prepared is TCP for a connection whose socket has SO_LINGER and SO_OOBINLINE already, as
// what a listener with both has accepted.
func Prepared(c *net.TCPConn) *TCPConn {
	raw, err := c.SyscallConn()
	if err != nil { // only for a nil *net.TCPConn
		panic("relay: Prepared without a connection")
	}
	return newTCPConn(c, raw)
}

// UrgentInLine makes urgent bytes part of the stream that is read from fd. Else they
// are left out, and lost when another one follows. Who may be sent one before TCP has
// taken the connection over sets it on the listener, or before connect.
func UrgentInLine(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	return os.NewSyscallError("setsockopt SO_OOBINLINE", err)
}

// Raw returns the connection that TCP was given. It stays the TCPConn's.
func (t *TCPConn) Raw() *net.TCPConn { return t.c }

// Read reads what is there. It tells a reset from an end even if another call
// has already been told of the reset.
func (t *TCPConn) Read(p []byte) (int, error) {
	n, err := t.c.Read(p)
	if n == 0 && errors.Is(err, io.EOF) && t.wasReset() {
		return 0, unix.ECONNRESET
	}
	return n, err
}

func (t *TCPConn) Write(p []byte) (int, error) { return t.send.Send(p) }

// CloseWrite sends FIN.
func (t *TCPConn) CloseWrite() error {
	t.finSent.Store(true)
	return t.c.CloseWrite()
}

// Abort sends RST.
func (t *TCPConn) Abort() error {
	var err error
	t.release.Do(func() {
		_ = t.c.SetLinger(0)
		err = t.c.Close()
	})
	return err
}

// Leave has Close leave the socket open where TCP has ended in both directions: it can
// be connected to somebody else. It is called before Join. Left tells, after Join, whether
// the socket was left: then it is the caller's again.
func (t *TCPConn) Leave() { t.leaves = true }

// Left reports whether Close has left the socket.
func (t *TCPConn) Left() bool { return t.left.Load() }

// isOver reports whether there is nothing that TCP still has to say or hear: both FINs were
// sent, and ours was acknowledged.
func (t *TCPConn) isOver() (over bool) {
	const tcpClose = 7 // TCP_CLOSE in net/tcp_states.h
	_ = t.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) // its first byte is the state
		over = err == nil && binary.NativeEndian.AppendUint32(nil, uint32(info))[0] == tcpClose
	})
	return over
}

// Close lets the kernel deliver what is still unsent, and a FIN. It does not
// wait for that.
func (t *TCPConn) Close() error {
	var err error
	t.release.Do(func() {
		t.finSent.Store(true)
		if t.leaves && t.isOver() {
			t.left.Store(true)
			err = t.c.SetDeadline(time.Unix(1, 0)) // who watches it stops
			return
		}
		_ = t.c.SetLinger(-1)
		err = t.c.Close()
	})
	return err
}

// AwaitReadable looks at the socket before it waits: it costs a system call.
func (t *TCPConn) AwaitReadable() error {
	var lookErr error
	err := t.raw.Read(func(fd uintptr) bool {
		var look [1]byte
		_, _, lookErr = unix.Recvfrom(int(fd), look[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return lookErr != unix.EAGAIN && lookErr != unix.EINTR
	})
	if err == nil && lookErr != nil {
		t.told.Store(true)
		err = os.NewSyscallError("recvfrom", lookErr)
	}
	return err
}

// AwaitReset implements ResetWatcher.
func (t *TCPConn) AwaitReset() error {
	if err := t.raw.Read(hungUp); err != nil {
		return err
	}
	if t.finSent.Load() {
		return net.ErrClosed
	}
	return fmt.Errorf("after its end of input: %w", unix.ECONNRESET)
}

// attempt is the system call of TryRead.
type attempt struct {
	read func(fd uintptr) // bound once
	p    []byte
	n    int
	err  error
}

func (a *attempt) bind() { a.read = func(fd uintptr) { a.n, a.err = socket.ReadQuietly(fd, a.p) } }

func (a *attempt) run(raw syscall.RawConn, p []byte) (int, error) {
	a.p, a.n = p, 0
	if err := raw.Control(a.read); err != nil {
		a.err = err
	}
	a.p = nil
	return a.n, a.err
}

// CanStep implements Stepper.
func (t *TCPConn) CanStep() bool { return true }

// Control implements Stepper.
func (t *TCPConn) Control(f func(fd uintptr)) error { return t.raw.Control(f) }

// TryRead implements Stepper. A read that does not fill p has left nothing.
func (t *TCPConn) TryRead(p []byte) (n int, more bool, err error) {
	n, err = t.try.run(t.raw, p)
	switch {
	case err == unix.EAGAIN:
		return 0, false, nil
	case err != nil:
		t.told.Store(true)
		return 0, false, err
	case n == 0:
		return 0, false, io.EOF
	}
	return n, n == len(p), nil
}

// TryWrite implements Stepper.
func (t *TCPConn) TryWrite(p []byte) (int, error) { return t.send.TrySend(p) }

// Doze implements Stepper.
func (t *TCPConn) Doze() {}

func (t *TCPConn) SetReadDeadline(d time.Time) error  { return t.c.SetReadDeadline(d) }
func (t *TCPConn) SetWriteDeadline(d time.Time) error { return t.c.SetWriteDeadline(d) }

// wasReset tells, at an end of input, whether it is none. The kernel reports a
// reset to one system call only; if that was a write, the next read returns 0
// as for a FIN. After a FIN alone the socket would still be connected.
func (t *TCPConn) wasReset() bool {
	if t.told.Load() {
		return true
	}
	if t.finSent.Load() {
		return false
	}
	reset := false
	err := t.raw.Control(func(fd uintptr) { reset = hungUp(fd) })
	// Asked again: a FIN of ours in between hangs up too.
	return err == nil && reset && !t.finSent.Load()
}

// hungUp reports whether a TCP socket that has ended its input is over: reset, or
// ended by us as well.
func hungUp(fd uintptr) bool {
	p := [1]unix.PollFd{{Fd: int32(fd)}} // POLLHUP and POLLERR are always asked for
	n, err := unix.Poll(p[:], 0)
	return n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 || err != nil && err != unix.EINTR
}

// taker reads from a TCPConn into buffers of a pool, and takes one only at the
// moment of the read: a quiet connection holds none, at no extra system call.
type taker struct {
	t    *TCPConn
	pool *Pool
	try  func(fd uintptr) bool // attempt, bound once
	more bool                  // the last read gave plenty: the next one takes a large buffer

	// What the last attempt gave.
	b   []byte
	n   int
	err error
}

func newTaker(t *TCPConn, pool *Pool) *taker {
	k := &taker{t: t, pool: pool}
	k.try = k.attempt
	return k
}

// take blocks until there is something, and returns it with its buffer, which
// is the caller's to give back. The buffer is nil if and only if err is not.
func (k *taker) take() ([]byte, int, error) {
	if err := k.t.raw.Read(k.try); err != nil {
		return nil, 0, err
	}
	b, n, err := k.b, k.n, k.err
	k.b = nil
	if err == io.EOF && k.t.wasReset() {
		err = unix.ECONNRESET
	}
	return b, n, err
}

func (k *taker) attempt(fd uintptr) bool {
	b := k.pool.buffer(k.more)
	n, err := socket.Read(fd, b)
	k.more = n > plenty
	if err == nil && n > 0 {
		k.b, k.n, k.err = b, n, nil
		return true
	}
	k.pool.keepBuffer(b)
	if err == nil {
		err = io.EOF
	}
	k.err = err
	return err != unix.EAGAIN
}
