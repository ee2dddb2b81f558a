package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tacit.dev/socket"
)

// seeds are two sockets that the agent made in the namespace of a pod, from which the proxy
// makes the others. A socket that a listener accepts is where the listener is, and has its
// mark and its transparency. So one of the two listens on the loopback of the pod for a
// moment, the other one connects to it, and what was accepted is disconnected: it is then
// as if the agent had made it.
//
// Because of that the proxy goes on for any time without an agent. And because the kernel
// charges what waits in an accepted socket to the cgroup of the process that accepted it, the proxy
// pays for the bytes that it carries, and not the agent.
type seeds struct{ listener, caller int }

const (
	// sproutLimit is how long the loopback may take for one connection.
	sproutLimit = time.Second
	// sproutBacklog is how many connections may wait. One of ours does; others are of an
	// application that dials whatever listens.
	sproutBacklog = 16
)

// sproutAt is where the listener is, by family. Applications listen at other addresses of the
// loopback, so that no port is missed by them.
var sproutAt = map[bool]netip.AddrPort{
	false: netip.MustParseAddrPort("127.151.1.1:0"),
	true:  netip.MustParseAddrPort("[::1]:0"),
}

// sockets makes n sockets. With an error it returns those that were made before. It is
// called by one goroutine at a time.
func (s *seeds) sockets(n int, v6 bool) (made []int, err error) {
	defer func() {
		err = errors.Join(err, disconnect(s.listener), disconnect(s.caller))
	}()
	if err := unix.Bind(s.listener, socket.Address(sproutAt[v6])); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(s.listener, sproutBacklog); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	at, err := unix.Getsockname(s.listener)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	for range n {
		fd, err := s.sprout(at)
		if err != nil {
			return made, err
		}
		if err := renew(fd, v6); err != nil {
			unix.Close(fd)
			return made, err
		}
		made = append(made, fd)
	}
	return made, nil
}

// sprout returns a socket that was accepted, and ends the caller's connection with it.
func (s *seeds) sprout(at unix.Sockaddr) (int, error) {
	if err := unix.Connect(s.caller, at); err != nil && err != unix.EINPROGRESS {
		return -1, os.NewSyscallError("connect", err)
	}
	own, err := unix.Getsockname(s.caller)
	if err != nil {
		return -1, os.NewSyscallError("getsockname", err)
	}
	for end := time.Now().Add(sproutLimit); ; {
		fd, from, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case err == nil && socket.AddrPort(from) == socket.AddrPort(own):
			return fd, disconnect(s.caller)
		case err == nil: // an application of the pod
			unix.Close(fd)
		case err != unix.EAGAIN && err != unix.EINTR && err != unix.ECONNABORTED:
			return -1, os.NewSyscallError("accept", err)
		}
		left := time.Until(end)
		if left <= 0 {
			return -1, fmt.Errorf("accept: nothing came over the loopback within %v", sproutLimit)
		}
		// Mostly it is there at once.
		p := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return -1, os.NewSyscallError("poll", err)
		}
	}
}

func (s *seeds) close() {
	unix.Close(s.listener)
	unix.Close(s.caller)
}

// renew makes a socket that was connected as if it were new: it has no peer, no error,
// neither address nor port. That fails for one that was bound to a port.
func renew(fd int, v6 bool) error {
	if err := disconnect(fd); err != nil {
		return err
	}
	// What the reset said.
	if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil {
		return os.NewSyscallError("getsockopt SO_ERROR", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
	}
	any := netip.IPv4Unspecified()
	if v6 {
		any = netip.IPv6Unspecified()
	}
	return os.NewSyscallError("bind", unix.Bind(fd, socket.Address(netip.AddrPortFrom(any, 0))))
}

// disconnect takes a socket out of whatever it is in (connect(2): AF_UNSPEC).
func disconnect(fd int) error {
	to := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to)), unsafe.Sizeof(to))
	if errno != 0 {
		return os.NewSyscallError("disconnect", errno)
	}
	return nil
}
