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

// throwaway runs fn on a thread that ends with it: where fn has been, no other
// goroutine may ever be. The process's first thread cannot end; it would stay there,
// hold the namespace, and show it as the process's own. So fn never runs on that one.
func throwaway(fn func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- lockAndRun(fn) }()
	return <-ended
}

func lockAndRun(fn func() error) error {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		return fn() // locked until the end: the thread ends too
	}
	defer runtime.UnlockOSThread()
	return throwaway(fn) // this one is taken meanwhile
}

// within runs fn in the network namespace at path.
func within(path string, fn func() error) error {
	return throwaway(func() error {
		target, err := os.Open(path)
		if err != nil {
			return err
		}
		defer target.Close()
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", path, err)
		}
		return fn()
	})
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
