// Package relay joins two connections and carries bytes between them until both
// have finished. It is the last station of a connection on either node: between
// the application's socket and the wire.
//
// It maps ends one to one: FIN becomes FIN, RST becomes RST, and a half-closed
// connection stays half-closed. It keeps no buffer for a quiet connection, and with Loops
// no goroutine. It refuses to look at the bytes, to dial, to accept, and to decide anything.
package relay

import (
	"io"
	"time"
)

// BufferSize is the length in bytes of the buffers that Join reads into, and
// LargeBufferSize of those for a connection that had more to say than one held. A
// Conn does best to fill as much of one as it can without blocking, and to take one
// whole in a single Write. BufferSize, with headers, fits into one packet of the kernel's.
const (
	BufferSize      = 60 << 10
	LargeBufferSize = 4 * BufferSize
)

// Conn is one end of a joined connection. One Read and one Write may run at the
// same time; CloseWrite follows the last Write; Abort and Close may be called at
// any moment, from anywhere, and make whatever blocks return.
type Conn interface {
	// Read returns io.EOF only if the peer ended orderly. A reset is
	// ECONNRESET, a truncation io.ErrUnexpectedEOF.
	io.Reader
	io.Writer
	// CloseWrite tells the peer that no more bytes come. Reading goes on.
	CloseWrite() error
	// Abort resets both directions and releases the socket. Idempotent.
	Abort() error
	// Close ends orderly, once both directions have, and releases the socket.
	// Idempotent; after Abort it does nothing.
	Close() error
	// AwaitReadable blocks until a Read would not: there is data, the end, or
	// an error. While it blocks it holds no buffer. It may read ahead into a
	// buffer of the Conn's own that it keeps until Read has emptied it; that
	// is cheaper than a look at the socket first.
	AwaitReadable() error
	// SetReadDeadline bounds Read and AwaitReadable, SetWriteDeadline Write.
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// ResetWatcher is a Conn that can still notice a reset after its Read returned
// io.EOF. Without it a reset in that state shows at the next Write only.
type ResetWatcher interface {
	// AwaitReset blocks until the peer resets the connection, and returns that
	// error. It returns net.ErrClosed when the connection is over otherwise. It
	// is called after Read has returned io.EOF, next to a Write.
	AwaitReset() error
}

// Stepper is a Conn that can be carried by Loops, in steps of which none blocks. Whoever
// calls TryRead or TryWrite calls no other method at the same time, but Abort and Close.
type Stepper interface {
	Conn
	// CanStep reports whether it can, now and for as long as it lives.
	CanStep() bool
	// Control lets f use the socket, which stays the Conn's.
	Control(f func(fd uintptr)) error
	// TryRead reads once, if there is something. more says that there may be more of which
	// the socket does not tell again. After an error Read says it, too.
	TryRead(p []byte) (n int, more bool, err error)
	// TryWrite writes as much of p as can be written now, and if that is not all, says why:
	// EAGAIN, or what Write says from now on. Of what it takes, some may not have been
	// sent before the next Write, even an empty one.
	TryWrite(p []byte) (n int, err error)
	// Doze is called when it has been quiet for a while: what takes memory, and no time to
	// make again, may go.
	Doze()
}

// Config says how to join.
type Config struct {
	// HalfCloseTimeout bounds how long a connection of which one direction has
	// ended may be quiet in the other. 0 means one hour. A connection that is
	// open in both directions is never cut.
	HalfCloseTimeout time.Duration
	// Pool lends buffers and pipes. One pool serves a whole process. nil means
	// a pool for this call only, which is slow: for tests.
	Pool *Pool
	// Loops carry connections of Steppers that have been quiet, for as long as they say
	// little at a time. nil means two goroutines for each connection, always.
	Loops *Loops
}

// Ending tells what ended a joined connection.
type Ending string

const (
	// Finished: both sides ended orderly.
	Finished Ending = "finished"
	// ByA and ByB: that end was reset, truncated or failed.
	ByA Ending = "a"
	ByB Ending = "b"
	// HalfClosedTooLong: HalfCloseTimeout ran out.
	HalfClosedTooLong Ending = "half-closed too long"
	// Canceled: the context ended.
	Canceled Ending = "canceled"
)

// Result is what became of a joined connection.
type Result struct {
	// AtoB and BtoA are bytes that were written to B and to A.
	AtoB, BtoA int64
	Ended      Ending
	// Err is nil if and only if Ended is Finished.
	Err error
}
