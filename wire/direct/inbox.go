package direct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

var errTooLong = errors.New("record is longer than RFC 8446 allows")

// inbox is what was read from a socket and not yet consumed. It holds a
// buffer only while there are such bytes, and while it waits for the rest of a
// record only a small one. The zero value plus bind is ready. Not for concurrent use.
type inbox struct {
	raw  syscall.RawConn
	try  func(fd uintptr) bool // attempt, bound once so that reading allocates nothing
	once func(fd uintptr)      // the same, whatever comes of it

	b    []byte // a lent buffer, or nil
	r, w int    // the bytes are b[r:w]

	want int   // bytes of buffer for the next read: more after each that filled its room
	full bool  // the last attempt filled its room
	err  error // of the last attempt
}

func (in *inbox) bind(raw syscall.RawConn) {
	in.raw = raw
	in.try = func(fd uintptr) bool { return in.attempt(fd, socket.Read) }
	in.once = func(fd uintptr) { in.attempt(fd, socket.ReadQuietly) }
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
func (in *inbox) attempt(fd uintptr, read func(uintptr, []byte) (int, error)) bool {
	room := in.room()
	n, err := read(fd, room)
	in.full = n == len(room)
	switch {
	case err == unix.EAGAIN:
		in.want = 0
		in.park()
		return false
	case err != nil:
		in.err = os.NewSyscallError("read", err)
	case n == 0:
		in.err = io.EOF
	default:
		in.w += n
		in.want = len(in.b)
		if in.full {
			in.want++
		}
		return true
	}
	in.park()
	return true
}

// room is where the next read goes: behind what is there, and no further than
// the end of a record if all records are full ones. A reader that falls behind
// then always finds whole records, and has no rest to move to the front.
func (in *inbox) room() []byte {
	in.hold()
	if in.r > 0 {
		copy(in.b, in.b[in.r:in.w])
		in.r, in.w = 0, in.w-in.r
	}
	end := fullRecord
	if in.w >= recordHeader {
		end = recordHeader + int(binary.BigEndian.Uint16(in.b[3:]))
	}
	end += (len(in.b) - smallSize) / fullRecord * fullRecord
	if end <= in.w || end > len(in.b) {
		end = len(in.b)
	}
	return in.b[in.w:end]
}

// hold takes a buffer of the size that the last read asks for.
func (in *inbox) hold() {
	switch {
	case in.b == nil:
		in.b = lend(in.want)
	case in.want > len(in.b) && len(in.b) < hugeSize:
		in.move(lend(in.want))
	}
}

// park keeps nothing, or the start of a record in a small buffer.
func (in *inbox) park() {
	rest := in.bytes()
	switch {
	case len(rest) == 0:
		in.giveBack()
	case len(in.b) > smallSize && len(rest) <= smallSize:
		in.move(lend(smallSize))
	}
}

// move takes what is there into another buffer, which has room for it.
func (in *inbox) move(to []byte) {
	n := copy(to, in.bytes())
	in.giveBack()
	in.b, in.w = to, n
}

func (in *inbox) giveBack() {
	if in.b != nil {
		takeBack(in.b)
	}
	in.b, in.r, in.w = nil, 0, 0
}
