package relay

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	defaultHalfCloseTimeout = time.Hour
	// lastWords is how long bytes that came before a reset may take to reach
	// the other end.
	lastWords = time.Second
)

// join is a connection with two ends. Each direction is a half:
//
//	both open ──end of input on one──► half-closed ──on the other──► finished: Close both
//	    │                                  │
//	    ├──read error, end of ctx──────────┴────────────────────────► Abort both
//	    └──write error──► last words of the other half ─────────────► Abort both
//
// The first cause is what Result tells.
type join struct {
	a, b  Conn
	pool  *Pool
	quiet time.Duration

	halfClosed atomic.Bool // one half has ended orderly

	mu    sync.Mutex
	open  int    // guarded by mu: halves that have not ended
	ended Ending // guarded by mu: the first cause, "" while there is none
	err   error  // guarded by mu, goes with ended
}

// Join carries bytes between a and b until both directions have ended, then
// releases both. The end of input on one becomes CloseWrite on the other. A
// reset, a truncation or any other error on one aborts both, and so does the end
// of ctx. Join owns a and b from the call on, lifts their deadlines, and blocks
// until all it started has ended.
func Join(ctx context.Context, a, b Conn, cfg Config) Result {
	j := newJoin(a, b, cfg)
	if cfg.Pool == nil {
		defer j.pool.Close()
	}
	to := &half{j: j, from: a, to: b, fromEnd: ByA, toEnd: ByB}
	back := &half{j: j, from: b, to: a, fromEnd: ByB, toEnd: ByA, back: to}
	to.back = back
	to.limit(time.Time{})
	back.limit(time.Time{})

	cancelled := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cancelled)
		j.abort(Cancelled, fmt.Errorf("cancelled: %w", context.Cause(ctx)))
	})
	var wait sync.WaitGroup
	wait.Go(to.run)
	back.run()
	wait.Wait()
	if !stop() {
		<-cancelled
	}
	return Result{AtoB: to.moved, BtoA: back.moved, Ended: j.ended, Err: j.err}
}

func newJoin(a, b Conn, cfg Config) *join {
	j := &join{a: a, b: b, pool: cfg.Pool, quiet: cfg.HalfCloseTimeout, open: 2}
	if j.pool == nil {
		j.pool = NewPool()
	}
	if j.quiet == 0 {
		j.quiet = defaultHalfCloseTimeout
	}
	return j
}

// halfEnded notes that a half ended orderly and reports whether it was the last,
// in which case both connections are released. rest is the other half.
func (j *join) halfEnded(rest *half) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.open--
	if j.open > 0 && j.ended == "" {
		j.halfClosed.Store(true)
		rest.limit(time.Now().Add(j.quiet))
		return false
	}
	j.releaseLocked()
	return true
}

// alive prolongs a half-closed connection: h has just carried something.
func (j *join) alive(h *half) {
	if !j.halfClosed.Load() {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended == "" {
		h.limit(time.Now().Add(j.quiet))
	}
}

// lastWords notes that a half can no longer write, and leaves the rest a moment.
func (j *join) lastWords(rest *half, why Ending, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.open--
	j.noteLocked(why, err)
	if j.open > 0 {
		rest.limit(time.Now().Add(lastWords))
		return
	}
	j.releaseLocked()
}

// abort notes the cause and resets both ends. What still runs ends by that.
func (j *join) abort(why Ending, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.noteLocked(why, err)
	j.releaseLocked()
}

func (j *join) noteLocked(why Ending, err error) {
	if j.ended == "" {
		j.ended, j.err = why, err
	}
}

// releaseLocked closes both ends if all went well, and aborts them if not.
func (j *join) releaseLocked() {
	if j.ended == "" {
		j.ended = Finished
	}
	if j.ended == Finished {
		j.a.Close()
		j.b.Close()
		return
	}
	j.a.Abort()
	j.b.Abort()
}
