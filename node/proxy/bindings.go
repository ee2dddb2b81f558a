package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tacit.dev/wire/handle"
)

const (
	// maxBindings bounds how many dials of a pod wait for a socket that the agent binds.
	maxBindings = 64
	// bindPatience is how long each waits: with another port it goes on without the agent.
	bindPatience = time.Second
)

var (
	errNoBinder = errors.New("no agent to bind the port")
	errNotBound = errors.New("the agent does not bind the port")
)

// bindings are sockets of one pod that the agent binds, because their port takes a
// privilege: it is that of a client that has it, and the application may ask for it. It is
// safe for concurrent use.
//
//	take ──ask──► the agent ──deliver──► the first who waits for that source
type bindings struct {
	// ask sends a request to the agent, without blocking. False means that there is
	// no agent now.
	ask func(source netip.AddrPort) bool

	// mu guards all below.
	mu sync.Mutex
	// waiters have room for one answer each, and get one.
	waiters map[netip.AddrPort][]chan binding
	waiting int
	closed  bool
}

// binding is the agent's answer: a socket, or why there is none.
type binding struct {
	fd  int
	err error
}

func newBindings(ask func(netip.AddrPort) bool) *bindings {
	return &bindings{ask: ask, waiters: make(map[netip.AddrPort][]chan binding)}
}

// take returns a socket that is bound to source, which is the caller's.
func (b *bindings) take(ctx context.Context, source netip.AddrPort) (int, error) {
	if !handle.CanBind(source) {
		return -1, fmt.Errorf("%w of %s", errNotBound, source)
	}
	w, err := b.join(source)
	if err != nil {
		return -1, err
	}
	late := time.NewTimer(bindPatience)
	defer late.Stop()
	if !b.ask(source) {
		late.Reset(0)
	}
	select {
	case got := <-w:
		return got.fd, got.err
	case <-late.C:
	case <-ctx.Done():
	}
	return b.leave(source, w)
}

func (b *bindings) join(source netip.AddrPort) (chan binding, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.waiting == maxBindings {
		return nil, fmt.Errorf("%w: %d wait for it", errNoBinder, b.waiting)
	}
	w := make(chan binding, 1)
	b.waiters[source] = append(b.waiters[source], w)
	b.waiting++
	return w, nil
}

// leave ends a wait. What has come meanwhile is the caller's.
func (b *bindings) leave(source netip.AddrPort, w chan binding) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.waiters[source], w)
	if i < 0 {
		got := <-w
		return got.fd, got.err
	}
	b.drop(source, i)
	return -1, errNoBinder
}

// drop takes one out of those who wait. The caller holds mu.
func (b *bindings) drop(source netip.AddrPort, i int) {
	b.waiting--
	if b.waiters[source] = slices.Delete(b.waiters[source], i, i+1); len(b.waiters[source]) == 0 {
		delete(b.waiters, source)
	}
}

// deliver takes over what the agent gave: one socket, or none and a reason.
func (b *bindings) deliver(m handle.Message, files []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiters[m.Source]) == 0 { // they waited too long
		closeAll(files)
		return
	}
	got := binding{-1, fmt.Errorf("%w: %s", errNotBound, m.Reason)}
	if len(files) == 1 {
		got = binding{fd: files[0]}
	}
	b.waiters[m.Source][0] <- got
	b.drop(m.Source, 0)
}

// close tells all who wait that nothing comes.
func (b *bindings) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for source := range b.waiters {
		for len(b.waiters[source]) > 0 {
			b.waiters[source][0] <- binding{-1, errNoBinder}
			b.drop(source, 0)
		}
	}
}
