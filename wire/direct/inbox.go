package direct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// maxPlain is the most bytes that one record carries (RFC 8446 §5.1).
	maxPlain = 16384
	// overhead of a record: header, content type, AES-GCM tag.
	overhead = recordHeader + 1 + 16
	// maxSealed is the most bytes after the header (RFC 8446 §5.2).
	maxSealed = maxPlain + 256

	// fullPlain is how much of a long stream one record carries: a batch of such
	// records, and what is left of it when opened, are each one packet of the
	// kernel's (64 KiB with its headers, whole segments). 16 KiB each would be a
	// full packet and one that is nearly empty.
	fullPlain  = 15 << 10
	fullRecord = fullPlain + overhead
	// batch is how many full records are read or written in one system call.
	batch = 4
)

// A small buffer holds any one record, a large one a batch of full ones, with
// room for a KeyUpdate in front.
type (
	smallBuffer [recordHeader + maxSealed]byte
	largeBuffer [batch*fullRecord + overhead + 5]byte
)

// The pools hold no state, only memory: any buffer will do for anybody.
var (
	smallBuffers = sync.Pool{New: func() any { return new(smallBuffer) }}
	largeBuffers = sync.Pool{New: func() any { return new(largeBuffer) }}
)

var errTooLong = errors.New("record is longer than RFC 8446 allows")

// inbox is what was read from a socket and not yet consumed. It holds a
// buffer only while there are such bytes, and while it waits for the rest of a
// record only a small one. The zero value plus bind is ready. Not for concurrent use.
type inbox struct {
	raw syscall.RawConn
	try func(fd uintptr) bool // attempt, bound once so that reading allocates nothing

	// At most one of the two is held; b is the slice of it.
	small *smallBuffer
	large *largeBuffer
	b     []byte
	r, w  int // the bytes are b[r:w]

	full bool  // the last read filled its room: the next one takes a large buffer
	err  error // of the last attempt
}

func (in *inbox) bind(raw syscall.RawConn) {
	in.raw = raw
	in.try = in.attempt
}

// bytes are those not consumed yet; valid until the next call.
func (in *inbox) bytes() []byte { return in.b[in.r:in.w] }

// consume drops n bytes from the front.
func (in *inbox) consume(n int) {
	in.r += n
	if in.r == in.w {
		in.giveBack()
	}
}

// record is the first record with its header, nil if it is not all there yet.
// It is not consumed.
func (in *inbox) record() ([]byte, error) {
	b := in.bytes()
	if len(b) < recordHeader {
		return nil, nil
	}
	n := int(binary.BigEndian.Uint16(b[3:]))
	if n > maxSealed {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errTooLong, n, maxSealed)
	}
	if len(b) < recordHeader+n {
		return nil, nil
	}
	return b[:recordHeader+n], nil
}

// fill blocks until more bytes were read, or the end or an error.
func (in *inbox) fill() error {
	in.err = nil
	if err := in.raw.Read(in.try); err != nil {
		return err
	}
	return in.err
}

// attempt reads once. With nothing to read it gives back what it can, and the
// poller calls it again when there is.
func (in *inbox) attempt(fd uintptr) bool {
	room := in.room()
	n, err := unix.Read(int(fd), room)
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), room)
	}
	switch {
	case err == unix.EAGAIN:
		in.full = false
		in.park()
		return false
	case err != nil:
		in.err = os.NewSyscallError("read", err)
	case n == 0:
		in.err = io.EOF
	default:
		in.w += n
		in.full = n == len(room)
		return true
	}
	in.park()
	return true
}

// room is where the next read goes: behind what is there, and no further than
// the end of a record if all records are full ones. A reader that falls behind
// then always finds whole records, and has no rest to move to the front.
func (in *inbox) room() []byte {
	in.hold(in.full)
	if in.r > 0 {
		copy(in.b, in.b[in.r:in.w])
		in.r, in.w = 0, in.w-in.r
	}
	end := fullRecord
	if in.w >= recordHeader {
		end = recordHeader + int(binary.BigEndian.Uint16(in.b[3:]))
	}
	if in.large != nil {
		end += (batch - 1) * fullRecord
	}
	if end <= in.w || end > len(in.b) {
		end = len(in.b)
	}
	return in.b[in.w:end]
}

// hold takes a buffer: a large one if that is asked for, or is held already.
func (in *inbox) hold(large bool) {
	switch {
	case in.large != nil, in.small != nil && !large:
	case large:
		l := largeBuffers.Get().(*largeBuffer)
		n := copy(l[:], in.bytes())
		in.giveBack()
		in.large, in.b, in.w = l, l[:], n
	default:
		in.small = smallBuffers.Get().(*smallBuffer)
		in.b = in.small[:]
	}
}

// park keeps nothing, or the start of a record in a small buffer.
func (in *inbox) park() {
	rest := in.bytes()
	switch {
	case len(rest) == 0:
		in.giveBack()
	case in.large != nil && len(rest) <= len(smallBuffer{}):
		s := smallBuffers.Get().(*smallBuffer)
		n := copy(s[:], rest)
		in.giveBack()
		in.small, in.b, in.w = s, s[:], n
	}
}

func (in *inbox) giveBack() {
	if in.small != nil {
		smallBuffers.Put(in.small)
	}
	if in.large != nil {
		largeBuffers.Put(in.large)
	}
	in.small, in.large, in.b, in.r, in.w = nil, nil, nil, 0, 0
}
