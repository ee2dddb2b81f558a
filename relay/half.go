package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// half is one direction of a joined connection. One goroutine runs it.
type half struct {
	j        *join
	from, to Conn
	fromEnd  Ending // ByA or ByB, whichever from is
	toEnd    Ending
	back     *half // the other direction

	// moved is written by the half's goroutine and read after it has ended.
	moved int64
}

// run carries bytes until from has ended, passes the end on, and then looks
// after from for as long as the other half still writes to it.
func (h *half) run() {
	if !h.carry() {
		return
	}
	if err := h.to.CloseWrite(); err != nil {
		h.brokenWrite(fmt.Errorf("end of input to %s: %w", h.toEnd, err))
		return
	}
	if !h.j.halfEnded(h.back) {
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
	s := newSplicer(from, to, h.j.pool)
	for {
		if err := s.take(); err != nil {
			if err == errNoPipe {
				return h.carryTCP(from)
			}
			return h.endOfInput(err)
		}
		n, err := s.give()
		h.moved += int64(n)
		if err != nil {
			h.brokenWrite(fmt.Errorf("write to %s: %w", h.toEnd, err))
			return false
		}
		h.j.alive(h)
	}
}

// carryTCP takes a buffer only in the moment in which there is something to read.
func (h *half) carryTCP(from *TCPConn) bool {
	k := newTaker(from, h.j.pool)
	for {
		b, n, err := k.take()
		if err != nil {
			return h.endOfInput(err)
		}
		ok := h.write(b[:n])
		h.j.pool.keepBuffer(b)
		if !ok {
			return false
		}
	}
}

// carryAny waits for any Conn to become readable before it takes a buffer.
func (h *half) carryAny() bool {
	more := false // the last read gave plenty: the next one takes a large buffer
	for {
		if err := h.from.AwaitReadable(); err != nil {
			return h.endOfInput(err)
		}
		b := h.j.pool.buffer(more)
		n, err := h.from.Read(b)
		more = n > plenty
		ok := n == 0 || h.write(b[:n])
		h.j.pool.keepBuffer(b)
		if !ok {
			return false
		}
		if err != nil {
			return h.endOfInput(err)
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
	h.j.alive(h)
	return true
}

// endOfInput reports whether err is an orderly end, and aborts both if not.
func (h *half) endOfInput(err error) bool {
	if errors.Is(err, io.EOF) {
		return true
	}
	h.j.abort(h.whose(err, h.fromEnd), fmt.Errorf("read from %s: %w", h.fromEnd, err))
	return false
}

// brokenWrite: to takes nothing any more, but what it said before may not have
// been read yet: a server that answers, and resets because it did not want the
// rest of the question. The other half gets lastWords to pass that on; it ends
// by itself, since a reset socket reads as reset.
func (h *half) brokenWrite(err error) {
	h.j.lastWords(h.back, h.whose(err, h.toEnd), err)
}

func (h *half) whose(err error, end Ending) Ending {
	if errors.Is(err, os.ErrDeadlineExceeded) && h.j.halfClosed.Load() {
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
		h.j.abort(h.fromEnd, fmt.Errorf("read from %s: %w", h.fromEnd, err))
	}
}

// limit bounds what the half may still wait for.
func (h *half) limit(t time.Time) {
	_ = h.from.SetReadDeadline(t)
	_ = h.to.SetWriteDeadline(t)
}
