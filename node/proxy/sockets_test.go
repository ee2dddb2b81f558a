package proxy

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// asked is a fake agent's end of a pool: it only notes.
type asked struct {
	n    []int
	away bool
}

func (a *asked) ask(n int) bool {
	if a.away {
		return false
	}
	a.n = append(a.n, n)
	return true
}

func (a *asked) last() int { return a.n[len(a.n)-1] }

func files(t *testing.T, n int) (fds []int) {
	t.Helper()
	for range n {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	return fds
}

func isOpen(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil
}

func TestSocketsAreAskedForAtHalfEmpty(t *testing.T) {
	a := &asked{}
	s := newSockets(&atomic.Uint64{}, a.ask)
	defer s.close()
	s.connected()
	if len(a.n) != 1 || a.last() != minLevel {
		t.Fatalf("asked for %v at first: want %d", a.n, minLevel)
	}
	s.deliver(files(t, minLevel))
	for i := range minLevel {
		fd, err := s.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		if want := 1 + btoi(i >= minLevel/2-1); len(a.n) != want {
			t.Errorf("after %d taken, asked %d times: want %d", i+1, len(a.n), want)
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestSocketsGrowAndShrink(t *testing.T) {
	a := &asked{}
	s := newSockets(&atomic.Uint64{}, a.ask)
	defer s.close()
	for range 8 { // each time it is found empty
		got := make(chan int)
		go func() {
			fd, _ := s.take(t.Context())
			got <- fd
		}()
		await(t, "somebody waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.waiters) == 1 })
		s.deliver(files(t, 1))
		unix.Close(<-got)
	}
	if s.level != maxLevel || a.last() > maxLevel {
		t.Errorf("level %d, last asked for %d: want %d", s.level, a.last(), maxLevel)
	}
	fds := files(t, maxLevel)
	s.deliver(fds)
	for range 10 {
		s.trim()
	}
	if s.level != minLevel || s.ready() != minLevel {
		t.Errorf("quiet: level %d and %d ready: want %d", s.level, s.ready(), minLevel)
	}
	n := 0
	for _, fd := range fds {
		n += btoi(isOpen(fd))
	}
	if n != minLevel {
		t.Errorf("%d open: want %d", n, minLevel)
	}
}

func TestWaitingForASocketEnds(t *testing.T) {
	a := &asked{}
	s := newSockets(&atomic.Uint64{}, a.ask)
	defer s.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.take(ctx); !errors.Is(err, errNoSocket) || !errors.Is(err, context.Canceled) {
		t.Errorf("take with a context that has ended: %v", err)
	}
	if len(s.waiters) != 0 {
		t.Error("somebody still waits")
	}
	for _, end := range []func(){func() { s.deliver(nil) }, s.close} {
		done := make(chan error)
		go func() { _, err := s.take(t.Context()); done <- err }()
		await(t, "somebody waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.waiters) == 1 })
		end()
		if err := <-done; !errors.Is(err, errNoSocket) {
			t.Errorf("take: %v", err)
		}
	}
	fds := files(t, 2)
	s.deliver(fds)
	if isOpen(fds[0]) || isOpen(fds[1]) {
		t.Error("what comes too late is not closed")
	}
}

func TestSocketsAreAskedForAgainWhenTheAgentIsBack(t *testing.T) {
	a := &asked{away: true}
	s := newSockets(&atomic.Uint64{}, a.ask)
	defer s.close()
	s.connected()
	a.away = false
	s.connected()
	s.connected() // another agent: what the one before was asked for will not come
	if len(a.n) != 2 {
		t.Errorf("asked %v: want twice", a.n)
	}
}
