// Package pause waits: between two tries, or for others to be done. It stands beside
// the way of the bytes. It refuses to outlast its context.
package pause

import (
	"context"
	"time"
)

// For waits that long, and reports false if ctx ended first.
func For(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
