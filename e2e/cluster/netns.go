package cluster

import (
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsPath is the network namespace of a process.
func netnsPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

// within runs fn on a thread that is in the network namespace at path. The thread
// comes back or, if it cannot, ends with its goroutine: it is never used elsewhere.
func within(path string, fn func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- enterAndRun(path, fn) }()
	return <-ended
}

func enterAndRun(path string, fn func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	target, err := os.Open(path)
	if err != nil {
		return err
	}
	defer target.Close()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	err = fn()
	if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// withLinks runs fn with an rtnetlink socket of the namespace at path.
func withLinks(path string, fn func(links) error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("rtnetlink in %s: %w", path, err)
	}
	defer h.Close()
	return fn(links{h})
}
