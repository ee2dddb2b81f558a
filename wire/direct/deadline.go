package direct

import (
	"context"
	"time"
)

// bound lets a deadline and the end of ctx interrupt what blocks on a socket.
// set is one of its SetDeadline methods; a zero until is none. The caller calls
// lift once the socket is its own again; then there is no deadline any more.
func bound(ctx context.Context, until time.Time, set func(time.Time) error) (lift func()) {
	_ = set(until)
	if ctx.Done() == nil {
		return func() { _ = set(time.Time{}) }
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		_ = set(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-ended
		}
		_ = set(time.Time{})
	}
}

// deadline is that of ctx, or zero.
func deadline(ctx context.Context) time.Time {
	d, _ := ctx.Deadline()
	return d
}
