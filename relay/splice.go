package relay

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// errNoPipe: nothing was taken, and splicing cannot go on.
var errNoPipe = errors.New("no pipe to splice through")

// splicer moves bytes from one TCPConn to another without taking them out of the
// kernel. It holds a pipe only while there are bytes in it: io.Copy would hold
// one for as long as the connection lives.
type splicer struct {
	from, to *TCPConn
	pool     *Pool
	tryFill  func(fd uintptr) bool // fill, bound once
	tryDrain func(fd uintptr) bool // drain, bound once

	pipe   *pipe // not nil if and only if left > 0
	left   int   // bytes in pipe
	result error // of the last fill or drain
}

func newSplicer(from, to *TCPConn, pool *Pool) *splicer {
	s := &splicer{from: from, to: to, pool: pool}
	s.tryFill, s.tryDrain = s.fill, s.drain
	return s
}

// take blocks until there are bytes in the pipe, or an end: io.EOF, errNoPipe
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
	case err == nil:
		err = io.EOF
	case err == unix.EINVAL || err == unix.ENOSYS:
		err = errNoPipe
	}
	s.result = err
	return err != unix.EAGAIN
}

// give blocks until the pipe is empty, and returns how much of it was written.
func (s *splicer) give() (int, error) {
	before := s.left
	err := s.to.raw.Write(s.tryDrain)
	if err == nil {
		err = s.result
	}
	if err != nil {
		written := before - s.left
		s.pipe.close() // it is not empty: nobody else may have it
		s.pipe, s.left = nil, 0
		return written, err
	}
	s.pool.keepPipe(s.pipe)
	s.pipe = nil
	return before, nil
}

func (s *splicer) drain(fd uintptr) bool {
	for s.left > 0 {
		n, err := splice(s.pipe.r, int(fd), s.left)
		if err != nil {
			s.result = err
			return err != unix.EAGAIN
		}
		s.left -= n
	}
	s.result = nil
	return true
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, spliceFlags)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}
