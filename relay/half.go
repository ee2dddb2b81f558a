package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// half is one direction of a passage. One goroutine runs it while the passage is up; while
// that is at rest, who holds its mu.
type half struct {
	p        *Passage
	from, to Conn
	fromEnd  Ending // ByA or ByB, whichever from is
	toEnd    Ending
	back     *half // the other direction

	// moved is who runs the half's, as are left and failed.
	moved int64
	// left is what a step has read and could not write, in a buffer of the pool, or nil. It may be
	// empty, if to still has to send what it took.
	left []byte
	// failed is why a step could not write.
	failed error

	// turns is odd while the half carries something, and seen is what rest saw last.
	turns atomic.Uint32
	seen  uint32 // guarded by p.mu
	// until is when the wait for something to read is too long, zero for never.
	until time.Time // guarded by p.mu
	// out says that the half has ended its goroutine, as it was asked to.
	out bool // guarded by p.mu
	// watched says that the loop is told of from's events.
	watched bool // guarded by p.mu
}

// step carries what there is to read, if there is, and reports whether that is all for now:
// nothing is left here, and the socket will tell of what comes. p.mu is held.
func (h *half) step(b []byte) bool {
	h.turns.Add(2)
	n, more, err := h.from.(Stepper).TryRead(b)
	if n == 0 {
		return err == nil && !more
	}
	m, werr := h.to.(Stepper).TryWrite(b[:n])
	h.moved += int64(m)
	switch werr {
	case nil:
		return err == nil && !more
	case unix.EAGAIN:
		h.left = h.p.pool.buffer(false)
		h.left = h.left[:copy(h.left, b[m:n])]
	default:
		h.failed = werr
	}
	return false
}

// finishStep writes what a step has left, and reports whether the half can go on.
func (h *half) finishStep() bool {
	h.begin()
	defer h.end()
	if h.failed != nil {
		h.brokenWrite(fmt.Errorf("write to %s: %w", h.toEnd, h.failed))
		return false
	}
	if h.left == nil {
		return true
	}
	ok := h.write(h.left)
	h.p.pool.keepBuffer(h.left[:BufferSize])
	h.left = nil
	return ok
}

// begin notes that something is being carried.
func (h *half) begin() {
	h.turns.Add(1)
	if h.p.asked.Load() {
		h.p.stay(h)
	}
}

// end notes that it has been.
func (h *half) end() { h.turns.Add(1) }

// turned is end of n bytes. Who says little for many turns costs less at rest. Who says much
// keeps a CPU for long, and sees to it that nobody at rest waits for that.
func (h *half) turned(n int) {
	h.end()
	switch p := h.p; {
	case p.loop == nil:
	case n > little:
		p.littles.Store(0)
		p.loop.help()
	case p.littles.Add(1) == p.patience:
		p.settle()
	}
}

// isQuiet reports whether nothing is carried, and was since it was called last. p.mu is held.
func (h *half) isQuiet() bool {
	now := h.turns.Load()
	quiet := now%2 == 0 && now == h.seen
	h.seen = now
	return quiet
}

// waits reports whether nothing is carried at this moment.
func (h *half) waits() bool { return h.turns.Load()%2 == 0 }

// run carries bytes until from has ended, passes the end on, and then looks
// after from for as long as the other half still writes to it.
func (h *half) run() {
	defer h.p.leave()
	if !h.finishStep() || !h.carry() {
		return
	}
	if err := h.to.CloseWrite(); err != nil {
		h.brokenWrite(fmt.Errorf("end of input to %s: %w", h.toEnd, err))
		return
	}
	if !h.p.halfEnded(h.back) {
		h.watch()
	}
}

// carry reports whether from ended orderly.
func (h *half) carry() bool {
	if from, ok := h.from.(*TCPConn); ok {
		if to, ok := h.to.(*TCPConn); ok {
			return h.carryByPipe(from, to)
		}
		return h.carryTCP(from)
	}
	return h.carryAny()
}

// carryByPipe: both are TCP, the bytes stay in the kernel.
func (h *half) carryByPipe(from, to *TCPConn) bool {
	s := newSplicer(from, to, h.p.pool)
	for {
		if err := s.take(); err != nil {
			if err == errNoPipe {
				return h.carryTCP(from)
			}
			if again, ended := h.endOfInput(err); !again {
				return ended
			}
			continue
		}
		h.begin()
		n, err := s.give()
		h.moved += int64(n)
		if err != nil {
			h.brokenWrite(fmt.Errorf("write to %s: %w", h.toEnd, err))
			return false
		}
		h.p.alive(h)
		h.turned(n)
	}
}

// carryTCP takes a buffer only in the moment in which there is something to read.
func (h *half) carryTCP(from *TCPConn) bool {
	k := newTaker(from, h.p.pool)
	for {
		b, n, err := k.take()
		if err != nil {
			if again, ended := h.endOfInput(err); !again {
				return ended
			}
			continue
		}
		h.begin()
		ok := h.write(b[:n])
		h.p.pool.keepBuffer(b)
		h.turned(n)
		if !ok {
			return false
		}
	}
}

// carryAny waits for any Conn to become readable before it takes a buffer.
func (h *half) carryAny() bool {
	more := false // the last read gave plenty: the next one takes a large buffer
	for {
		err := h.from.AwaitReadable()
		if err == nil {
			h.begin()
			b := h.p.pool.buffer(more)
			var n int
			n, err = h.from.Read(b)
			more = n > plenty
			ok := n == 0 || h.write(b[:n])
			h.p.pool.keepBuffer(b)
			h.turned(n)
			if !ok {
				return false
			}
		}
		if err != nil {
			if again, ended := h.endOfInput(err); !again {
				return ended
			}
		}
	}
}

func (h *half) write(p []byte) bool {
	n, err := h.to.Write(p)
	h.moved += int64(n)
	if err != nil {
		h.brokenWrite(fmt.Errorf("write to %s: %w", h.toEnd, err))
		return false
	}
	h.p.alive(h)
	return true
}

// endOfInput reports whether err is an orderly end, and aborts both if not. It is neither if
// the half was asked to rest: then the half ends its goroutine, or waits again.
func (h *half) endOfInput(err error) (again, ended bool) {
	if out, again := h.p.yield(h, err); out || again {
		return again, false
	}
	h.begin() // the end is carried, too, and nothing after it
	if errors.Is(err, io.EOF) {
		return false, true
	}
	h.p.abort(h.whose(err, h.fromEnd), fmt.Errorf("read from %s: %w", h.fromEnd, err))
	return false, false
}

// brokenWrite: to takes nothing any more, but what it said before may not have
// been read yet: a server that answers, and resets because it did not want the
// rest of the question. The other half gets lastWords to pass that on; it ends
// by itself, since a reset socket reads as reset.
func (h *half) brokenWrite(err error) {
	h.p.lastWords(h.back, h.whose(err, h.toEnd), err)
}

func (h *half) whose(err error, end Ending) Ending {
	if errors.Is(err, os.ErrDeadlineExceeded) && h.p.halfClosed.Load() {
		return HalfClosedTooLong
	}
	return end
}

// watch waits for a reset of from, which has ended its input, while the other
// half goes on. It returns when the connection is over.
func (h *half) watch() {
	w, ok := h.from.(ResetWatcher)
	if !ok {
		return
	}
	if err := w.AwaitReset(); err != nil && !errors.Is(err, net.ErrClosed) {
		h.p.abort(h.fromEnd, fmt.Errorf("read from %s: %w", h.fromEnd, err))
	}
}

// limit bounds what the half may still wait for. p.mu is held.
func (h *half) limit(t time.Time) {
	h.until = t
	_ = h.from.SetReadDeadline(t)
	_ = h.to.SetWriteDeadline(t)
}
