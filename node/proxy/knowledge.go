package proxy

import (
	"cmp"
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/mesh"
)

// knowledge is the World that decides, and the record of which dials were
// decided under which World. It is safe for concurrent use.
//
//	apply(World 1)   apply(World 2)        apply(World 3)
//	     │                │                     │
//	   epoch 1 ───────► epoch 2 ────────────► epoch 3   current
//	   a lease each     closed; no lease      settled when 1 and 2 have no lease
//
// An acknowledgement of a World means that nothing is still being dialled as an
// older one said. Only then may control release a pod.
//
// A lease is of an epoch, which has no World: a dial that takes long keeps none alive.
// Whoever has one asks for the World of now each time. That is the epoch's or a newer
// one, and not settled before the lease ends.
type knowledge struct {
	current atomic.Pointer[reign]
	// known is closed when the first World is there.
	known chan struct{}

	// making is held while the next World is made of the current one. It is not mu, for
	// which the end of a dial may have to wait.
	making sync.Mutex
	// partial is the World with parts of what is to be applied, nil for none. It is guarded
	// by making.
	partial *mesh.World
	// review judges what is open by a World that decides now, which is not settled before. Sources are
	// addresses of which the World says something new, nil for all.
	review func(w *mesh.World, sources []netip.Addr)

	// mu guards older and what hangs on it.
	mu sync.Mutex
	// older are the epochs that are not yet settled, the current one last.
	older []*epoch
}

// reign is a World that decides, and the epoch for which it does.
type reign struct {
	world *mesh.World
	*epoch
}

// epoch is the time during which one World decides.
type epoch struct {
	// leases counts the dials decided in it, plus one while it is current.
	leases atomic.Int64
	// settled is closed when no older epoch has a lease.
	settled chan struct{}
	// over is closed when a newer World decides.
	over chan struct{}
}

func newKnowledge() *knowledge {
	k := &knowledge{known: make(chan struct{}), review: func(*mesh.World, []netip.Addr) {}}
	first := newEpoch()
	k.older = []*epoch{first}
	k.current.Store(&reign{&mesh.World{}, first})
	return k
}

func newEpoch() *epoch {
	e := &epoch{settled: make(chan struct{}), over: make(chan struct{})}
	e.leases.Store(1)
	return e
}

// apply lets the World with c decide from now on. The channel is closed when no dial
// decided under an older World is under way any more. A part of c decides nothing yet.
func (k *knowledge) apply(c mesh.Changes) <-chan struct{} {
	k.making.Lock()
	defer k.making.Unlock()
	had, e := k.current.Load(), newEpoch()
	next := &reign{cmp.Or(k.partial, had.world).With(c, time.Now()), e}
	if c.Part {
		k.partial = next.world
		return had.settled
	}
	sources := addressesOf(c, k.partial != nil)
	k.partial = nil
	k.mu.Lock()
	k.older = append(k.older, e)
	k.current.Store(next)
	if !k.isKnown() {
		close(k.known)
	}
	k.mu.Unlock()
	close(had.over)
	k.review(next.world, sources)
	k.release(had.epoch)
	return e.settled
}

// addressesOf are those of the workloads and places that are new or other ones; nil, for all, if only the
// last part is there, or other ranges are.
func addressesOf(c mesh.Changes, isPart bool) []netip.Addr {
	if isPart {
		return nil
	}
	all := make([]netip.Addr, 0, len(c.Workloads))
	for _, w := range c.Workloads {
		all = append(all, w.Addresses...)
	}
	for _, p := range c.Places {
		if len(p.Ranges) > 0 {
			return nil
		}
		all = append(all, p.Addresses...)
	}
	return all
}

// isKnown reports whether a World has ever been applied.
func (k *knowledge) isKnown() bool {
	select {
	case <-k.known:
		return true
	default:
		return false
	}
}

// await blocks until the first World is there. It returns ctx's error otherwise.
func (k *knowledge) await(ctx context.Context) error {
	select {
	case <-k.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitWorld blocks until what is known satisfies f, and reports false if ctx ended first.
func (k *knowledge) awaitWorld(ctx context.Context, f func(*mesh.World) bool) bool {
	for {
		now := k.current.Load()
		if f(now.world) {
			return true
		}
		select {
		case <-now.over:
		case <-ctx.Done():
			return false
		}
	}
}

// world returns what is known now.
func (k *knowledge) world() *mesh.World { return k.current.Load().world }

// lease returns the current epoch and keeps it unsettled until release.
func (k *knowledge) lease() *epoch {
	for {
		e := k.current.Load().epoch
		for n := e.leases.Load(); n > 0; n = e.leases.Load() {
			if e.leases.CompareAndSwap(n, n+1) {
				return e
			}
		}
		// e was replaced and emptied in between: there is a newer one.
	}
}

// release ends a lease.
func (k *knowledge) release(e *epoch) {
	if e.leases.Add(-1) == 0 {
		k.settle()
	}
}

// settle closes the settled channel of each epoch before which nothing is left.
func (k *knowledge) settle() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.older) > 1 && k.older[0].leases.Load() == 0 {
		k.older = k.older[1:]
		close(k.older[0].settled)
	}
}
