package relay

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// errNoPipe: nothing was taken, and splicing cannot go on.
var errNoPipe = errors.New("no pipe to splice through")

// splicer moves bytes from one TCPConn to another without taking them out of the
// kernel. It holds a pipe only while there are bytes in it: io.Copy would hold
// one for as long as the connection lives.
//
// splice(2) stops before an urgent byte, for ever, and then says "nothing yet", or
// "the end" if a FIN has come; it may say that too when it has no memory. So
// neither is believed: an urgent byte is read into a buffer, by itself, and sent as
// urgent again, and the end is the end only if read(2) says so.
type splicer struct {
	from, to *TCPConn
	pool     *Pool
	tryFill  func(fd uintptr) bool // fill, bound once
	tryDrain func(fd uintptr) bool // drain, bound once

	pipe   *pipe  // not nil if and only if bytes in it are left
	buf    []byte // not nil if and only if bytes in it are left: buf[off:off+left]
	off    int
	urgent bool  // the byte in buf is
	left   int   // bytes in pipe or buf
	result error // of the last fill or drain
}

func newSplicer(from, to *TCPConn, pool *Pool) *splicer {
	s := &splicer{from: from, to: to, pool: pool}
	s.tryFill, s.tryDrain = s.fill, s.drain
	return s
}

// take blocks until there are bytes to give, or an end: io.EOF, errNoPipe
// or what is wrong with from.
func (s *splicer) take() error {
	if err := s.from.raw.Read(s.tryFill); err != nil {
		return err
	}
	if s.result == io.EOF && s.from.wasReset() {
		return unix.ECONNRESET
	}
	return s.result
}

func (s *splicer) fill(fd uintptr) bool {
	q, err := s.pool.pipe()
	if err != nil {
		s.result = errNoPipe
		return true
	}
	n, err := splice(int(fd), q.w, pipeSize)
	if n > 0 {
		s.pipe, s.left, s.result = q, n, nil
		return true
	}
	s.pool.keepPipe(q)
	switch {
	case err == nil, err == unix.EAGAIN && atUrgent(fd):
		return s.copy(fd)
	case err == unix.EINVAL || err == unix.ENOSYS:
		err = errNoPipe
	}
	s.result = err
	return err != unix.EAGAIN
}

// copy reads what splice does not take.
func (s *splicer) copy(fd uintptr) bool {
	s.urgent = atUrgent(fd)
	buf := s.pool.buffer(false)
	most := len(buf)
	if s.urgent {
		most = 1
	}
	n, err := socket.Read(fd, buf[:most])
	if n > 0 {
		s.buf, s.off, s.left, s.result = buf, 0, n, nil
		return true
	}
	s.pool.keepBuffer(buf)
	if err == nil {
		err = io.EOF
	}
	s.result = err
	return err != unix.EAGAIN
}

// give blocks until all that was taken is written, and returns how much was.
func (s *splicer) give() (int, error) {
	before := s.left
	err := s.to.raw.Write(s.tryDrain)
	if err == nil {
		err = s.result
	}
	written := before - s.left
	switch {
	case s.buf != nil:
		s.pool.keepBuffer(s.buf)
	case err != nil:
		s.pipe.close() // it is not empty: nobody else may have it
	default:
		s.pool.keepPipe(s.pipe)
	}
	s.pipe, s.buf, s.left = nil, nil, 0
	return written, err
}

func (s *splicer) drain(fd uintptr) bool {
	for s.left > 0 {
		n, err := s.put(int(fd))
		if err != nil {
			s.result = err
			return err != unix.EAGAIN
		}
		s.off += n
		s.left -= n
	}
	s.result = nil
	return true
}

func (s *splicer) put(fd int) (int, error) {
	if s.buf == nil {
		return splice(s.pipe.r, fd, s.left)
	}
	flags := unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT
	if s.urgent {
		flags |= unix.MSG_OOB
	}
	for {
		n, err := unix.SendmsgN(fd, s.buf[s.off:s.off+s.left], nil, nil, flags)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// atUrgent reports whether the next byte is urgent.
func atUrgent(fd uintptr) bool {
	n, err := unix.IoctlGetInt(int(fd), unix.SIOCATMARK)
	return err == nil && n != 0
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, spliceFlags)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}
