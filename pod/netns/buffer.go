package netns

import (
	"os"

	"golang.org/x/sys/unix"
)

// BoundUnread bounds the kernel's memory for what waits unread in a TCP socket, and in those
// that are accepted from it or made from it later. 0 leaves that to the kernel, who lets it
// grow with the speed of the connection, up to net.ipv4.tcp_rmem: 6 MiB, or 32 since Linux 6.16.
func BoundUnread(fd, bytes int) error {
	if bytes == 0 {
		return nil
	}
	half := bytes / 2 // the kernel doubles it (socket(7))
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, half)
	if err == unix.EPERM { // an ordinary user: net.core.rmem_max bounds it further
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, half)
	}
	return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
}
