// Package netns enters network namespaces: to listen, to make sockets, to talk
// to the kernel, or to run a function there. A socket belongs for ever to the
// namespace that it was made in; that is how the proxy, which may enter none,
// dials from inside a pod with sockets that the agent made.
//
// It is the only package that changes a thread's namespace. It does so on a
// goroutine of its own, locked to its thread; the thread is put back and checked,
// or it dies: a thread that went on in the wrong namespace would put somebody's
// listener into somebody else's pod.
//
// It refuses to know what happens there: rules are pod/redirect's.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// self is the namespace of the calling thread.
const self = "/proc/thread-self/ns/net"

// ErrGone says that a path leads to no network namespace, or to another one.
var ErrGone = errors.New("the network namespace is gone")

// Key tells namespaces apart while they exist. The kernel may use it again later.
type Key struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// NS is an open network namespace. While it is open the namespace lives, even
// when nobody else is in it; who opened it closes it. All methods may be called
// by many goroutines at once, also while it is closed: they then fail.
type NS struct {
	file *os.File
	key  Key
}

// Open opens the namespace at path, such as /run/netns/NAME or /proc/PID/ns/net.
// The error is ErrGone if there is none.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open namespace %s: %w", path, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	key, err := keyOf(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open namespace %s: %w", path, err)
	}
	return &NS{file: f, key: key}, nil
}

// keyOf identifies f, which must be a network namespace. A path whose mount is
// gone is an ordinary, empty file.
func keyOf(f *os.File) (Key, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return Key{}, err
	}
	var st unix.Stat_t
	var kind int
	var kindErr error
	if e := raw.Control(func(fd uintptr) {
		err = unix.Fstat(int(fd), &st)
		kind, kindErr = unix.IoctlRetInt(int(fd), unix.NS_GET_NSTYPE)
	}); e != nil {
		return Key{}, e
	}
	if err != nil {
		return Key{}, fmt.Errorf("stat: %w", err)
	}
	if kindErr != nil || kind != unix.CLONE_NEWNET {
		return Key{}, ErrGone
	}
	return Key{Device: st.Dev, Inode: st.Ino}, nil
}

// Key identifies the namespace.
func (n *NS) Key() Key { return n.key }

// Inode is what ls -i and lsns show.
func (n *NS) Inode() uint64 { return n.key.Inode }

// Is reports whether path still leads to this namespace.
func (n *NS) Is(path string) bool {
	o, err := Open(path)
	if err != nil {
		return false
	}
	defer o.Close()
	return o.key == n.key
}

// Close lets go of the namespace. It may be called more than once.
func (n *NS) Close() error {
	if err := n.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Do runs fn inside the namespace and waits for it. fn runs on a goroutine and
// thread of its own, so it must not end the test it is part of, and what it
// starts with "go" is elsewhere again. A process that it starts is inside.
//
// An error that wraps none of fn's says that the namespace was not entered, and
// fn not run, or that the way back failed; the thread is then gone.
func (n *NS) Do(fn func() error) error {
	return aside(n.enter, fn)
}

// aside runs enter and then fn on a thread of its own, which is home again
// afterwards.
func aside(enter, fn func() error) error {
	err := errors.New("netns: the function ended its goroutine")
	done := make(chan struct{})
	go thread(enter, fn, &err, done)
	<-done
	return err
}

// thread is aside on its goroutine. The thread is unlocked last, and only when it
// is where it was, however enter and fn end. If the way back fails it stays
// locked, and so dies with the goroutine; no other ever runs on it.
func thread(enter, fn func() error, result *error, done chan<- struct{}) {
	defer close(done)
	runtime.LockOSThread()
	home, err := Open(self)
	if err != nil {
		*result = fmt.Errorf("namespace of this thread: %w", err)
		return
	}
	defer home.Close()
	defer func() {
		if err := home.enter(); err != nil {
			*result = errors.Join(*result, err)
			return
		}
		runtime.UnlockOSThread()
	}()
	if err := enter(); err != nil {
		*result = err
		return
	}
	*result = fn()
}

// enter moves the calling thread, and checks that it has moved.
func (n *NS) enter() error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("enter namespace %d: %w", n.key.Inode, err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.Setns(int(fd), unix.CLONE_NEWNET) }); e != nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("enter namespace %d (needs CAP_SYS_ADMIN): %w", n.key.Inode, err)
	}
	now, err := Open(self)
	if err != nil {
		return fmt.Errorf("enter namespace %d: %w", n.key.Inode, err)
	}
	defer now.Close()
	if now.key != n.key {
		return fmt.Errorf("enter namespace %d: the thread is in %d", n.key.Inode, now.key.Inode)
	}
	return nil
}
