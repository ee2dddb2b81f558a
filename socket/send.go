package socket

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read reads once from a socket that does not block. p is not empty.
func Read(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// Events are what an epoll has now.
func Events(epoll int, events []unix.EpollEvent) (int, error) {
	return unix.EpollWait(epoll, events, 0)
}

// ReadQuietly is Read, WriteQuietly writes once, and EventsQuietly are what an epoll has now.
// None of them waits, and none tells the runtime's scheduler, as package syscall does, of what
// may take long: that wakes a thread of the runtime, which then looks every 20 µs whether the
// call has come back, and may give the CPU to another thread meanwhile. For small messages it
// costs more than the call. Whoever may go on for long, without a wait, has to make other
// calls, too: that thread is also who sees to it that all goroutines get their turn.
func ReadQuietly(fd uintptr, p []byte) (int, error)  { return transfer(unix.SYS_READ, fd, p) }
func WriteQuietly(fd uintptr, p []byte) (int, error) { return transfer(unix.SYS_WRITE, fd, p) }

func EventsQuietly(epoll int, events []unix.EpollEvent) (int, error) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func transfer(call, fd uintptr, p []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Sender writes to a socket of package net, quietly. One of its methods may be called at a time.
type Sender struct {
	raw  syscall.RawConn
	once func(fd uintptr)      // bound once, so that writing allocates nothing
	all  func(fd uintptr) bool // the same
	p    []byte                // what is left
	err  error
}

// Bind is called once, before anything else.
func (s *Sender) Bind(raw syscall.RawConn) {
	s.raw = raw
	s.once = func(fd uintptr) { s.write(fd) }
	s.all = func(fd uintptr) bool {
		for len(s.p) > 0 && s.err == nil {
			s.write(fd)
		}
		if s.err == unix.EAGAIN {
			s.err = nil
			return false
		}
		return true
	}
}

func (s *Sender) write(fd uintptr) {
	var n int
	n, s.err = WriteQuietly(fd, s.p)
	s.p = s.p[n:]
}

// Send writes all of p, and waits where it has to, until the deadline of the socket.
func (s *Sender) Send(p []byte) (int, error) {
	s.p, s.err = p, nil
	err := s.raw.Write(s.all)
	if err == nil {
		err = os.NewSyscallError("write", s.err)
	}
	return s.done(len(p)), err
}

// TrySend writes what can be written now. If that is not all, the error is EAGAIN, or worse.
func (s *Sender) TrySend(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.p, s.err = p, nil
	err := s.raw.Control(s.once)
	if err == nil {
		err = s.err
	}
	if err == nil && len(s.p) > 0 {
		err = unix.EAGAIN
	}
	return s.done(len(p)), err
}

// done is how much of all has been written.
func (s *Sender) done(all int) int {
	left := len(s.p)
	s.p = nil
	return all - left
}
