package proxy

import (
	"context"
	"sync/atomic"
)

// slots bounds how many of something are under way at once. Who finds no slot
// waits for one, no longer than its context lasts: a burst is delayed, a flood
// is refused. It is safe for concurrent use.
type slots struct {
	free chan struct{}
	// used is how many slots are taken, for the gauge.
	used atomic.Int64
}

func newSlots(n int) *slots { return &slots{free: make(chan struct{}, n)} }

// take returns when there is a slot, or with errHandshakeLimit when ctx ends.
func (s *slots) take(ctx context.Context) error {
	select {
	case s.free <- struct{}{}:
	default:
		select {
		case s.free <- struct{}{}:
		case <-ctx.Done():
			return errHandshakeLimit
		}
	}
	s.used.Add(1)
	return nil
}

// give returns a slot.
func (s *slots) give() {
	s.used.Add(-1)
	<-s.free
}

// quota bounds the connections of one pod, those going out and those coming in
// together. Who finds it used up is refused at once.
type quota struct {
	max  int64
	open atomic.Int64
}

// take reserves one, or reports false if all are taken.
func (q *quota) take() bool {
	if q.open.Add(1) > q.max {
		q.open.Add(-1)
		return false
	}
	return true
}

// give returns one and reports whether it was the last.
func (q *quota) give() (last bool) { return q.open.Add(-1) == 0 }
