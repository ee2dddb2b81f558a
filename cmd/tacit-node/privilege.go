package main

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dropPrivileges gives up, for all threads and for good, what capabilities this
// process was started with. The proxy is meant to be started with none: this is
// for the case that it was not.
func dropPrivileges() error {
	held, err := holdsCapability()
	if err != nil {
		return err
	}
	bound, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("read no_new_privs: %w", err)
	}
	if !held && bound == 1 {
		return nil
	}
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("set no_new_privs: %w", remedy(errno))
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	// Capabilities and no_new_privs are a thread's, so each one has to do it.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&none[0])), 0)
	if errno != 0 {
		return fmt.Errorf("drop capabilities: %w", remedy(errno))
	}
	return nil
}

// remedy says what to do where not all threads can be reached.
func remedy(errno syscall.Errno) error {
	if errors.Is(errno, syscall.ENOTSUP) {
		return fmt.Errorf("%w: build with CGO_ENABLED=0, or start without capabilities and with no_new_privs", errno)
	}
	return errno
}

func holdsCapability() (bool, error) {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&head, &has[0]); err != nil {
		return false, fmt.Errorf("read capabilities: %w", err)
	}
	any := uint32(0)
	for _, c := range has {
		any |= c.Effective | c.Permitted | c.Inheritable
	}
	return any != 0, nil
}
