package netns

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Sysctl reads one of the namespace's own, such as net/ipv4/tcp_fwmark_accept.
func (n *NS) Sysctl(name string) (value string, err error) {
	err = n.Do(func() error {
		b, err := os.ReadFile("/proc/sys/" + name)
		value = strings.TrimSpace(string(b))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read sysctl %s in namespace %d: %w", name, n.key.Inode, err)
	}
	return value, nil
}

// SetSysctl sets one, and returns what it was. In a container /proc/sys is read-only: then
// a proc of our own is used, which is mounted nowhere and ends with its descriptor.
func (n *NS) SetSysctl(name, value string) (old string, err error) {
	if old, err = n.Sysctl(name); err != nil || old == value {
		return old, err
	}
	err = n.Do(func() error {
		err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
			return writeDetached("sys/"+name, value)
		}
		return err
	})
	if err != nil {
		return old, fmt.Errorf("set sysctl %s=%s in namespace %d: %w", name, value, n.key.Inode, err)
	}
	return old, nil
}

// writeDetached writes a file of a proc of our own. What is below sys/net is of the
// namespace of the thread that opens it.
func writeDetached(path, value string) error {
	proc, err := detachedProc()
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	fd, err := unix.Openat(proc, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return os.NewSyscallError("write", err)
}

func detachedProc() (fd int, err error) {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen proc (needs CAP_SYS_ADMIN): %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("fsconfig proc: %w", err)
	}
	fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	return fd, os.NewSyscallError("fsmount", err)
}
