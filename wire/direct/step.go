package direct

import (
	"io"

	"golang.org/x/sys/unix"
)

// A connection at rest is carried in steps of which none blocks (relay.Stepper). Between two
// of them it is nothing but its socket, two cipher states, what has come of a record, and
// what could not be sent.

// CanStep reports whether the record layer is ours: crypto/tls can only wait.
func (c *Conn) CanStep() bool {
	_, ok := c.s.(*records)
	return ok && c.replied
}

// Control lets f use the socket, which stays the connection's.
func (c *Conn) Control(f func(fd uintptr)) error { return c.in.raw.Control(f) }

// TryRead reads the socket once, unless whole records are here, and opens them into p. more
// says that there may be more now; the socket does not tell of it again. After an error Read
// says it, too. It is for a Conn that can step.
func (c *Conn) TryRead(p []byte) (n int, more bool, err error) { return c.s.(*records).tryRead(p) }

// TryWrite seals p and writes what can be written now. If the socket takes less, the error is
// EAGAIN, and what is sealed goes with the next Write, be it empty. It is for a Conn that can
// step.
func (c *Conn) TryWrite(p []byte) (int, error) { return c.s.(*records).tryWrite(p) }

// Doze lets go of what takes no time to make again. It is for a Conn that can step.
func (c *Conn) Doze() {
	s := c.s.(*records)
	s.open.doze()
	s.seal.doze()
}

func (s *records) tryRead(p []byte) (n int, more bool, err error) {
	full := false
	for tried := false; ; tried = true {
		if len(s.plain) > 0 {
			return s.readPlain(p), true, nil
		}
		if s.readErr != nil {
			return 0, false, s.readErr
		}
		n, s.readErr = s.openInto(p)
		if n > 0 {
			return n, full || s.holdsRecord(), nil
		}
		if s.readErr != nil || tried {
			return 0, full, s.readErr
		}
		if full, err = s.in.tryFill(); err != nil {
			if err == io.EOF {
				err = ErrTruncated
			}
			s.readErr = err
		}
	}
}

// holdsRecord reports whether there is something to read without the socket.
func (s *records) holdsRecord() bool {
	if len(s.plain) > 0 || s.readErr != nil {
		return true
	}
	record, err := s.in.record()
	return record != nil || err != nil
}

// tryFill is fill that does not block. full says that the socket may have more.
func (in *inbox) tryFill() (full bool, err error) {
	in.err = nil
	if err := in.raw.Control(in.once); err != nil {
		return false, err
	}
	return in.full, in.err
}

func (s *records) tryWrite(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		if s.writeErr != nil {
			return done, s.writeErr
		}
		if !s.leadFits(len(p) - done) {
			return done, unix.EAGAIN
		}
		buf := lendFor(len(p) - done)
		n := min(len(p)-done, fits(buf))
		b, err := s.sealInto(buf[:0], p[done:done+n])
		if err == nil {
			err = s.trySend(b, buf)
		} else {
			takeBack(buf)
		}
		if err != nil && err != unix.EAGAIN {
			return done, s.broken(err)
		}
		if done += n; err != nil {
			return done, err
		}
	}
	return done, nil
}

// trySend sends b, which lies in buf. What cannot be sent now becomes the lead of what is
// written next.
func (s *records) trySend(b, buf []byte) error {
	n, err := s.out.TrySend(b)
	if err == unix.EAGAIN {
		s.lead, s.leadBuf = b[n:], buf
		return err
	}
	takeBack(buf)
	return err
}
