package xds

import (
	"context"
	"math/rand/v2"
	"time"

	"tacit.dev/pause"
)

// Backoff is how long to wait after failed attempts. The zero value means 50 ms,
// doubling up to 1 s; each wait is drawn between half of that and all of it, so
// that the nodes of a mesh do not come back all at once.
type Backoff struct {
	First, Max time.Duration
}

// after is the wait after n failures in a row, n ≥ 1.
func (b Backoff) after(n int) time.Duration {
	first, most := b.First, b.Max
	if first <= 0 {
		first = 50 * time.Millisecond
	}
	if most <= 0 {
		most = time.Second
	}
	d := most
	if n < 16 {
		d = min(first<<(n-1), most)
	}
	return d/2 + rand.N(d/2+1)
}

// wait returns false if ctx ended first.
func (b Backoff) wait(ctx context.Context, n int) bool {
	return pause.For(ctx, b.after(n))
}
