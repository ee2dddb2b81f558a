package relay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	defaultHalfCloseTimeout = time.Hour
	// lastWords is how long bytes that came before a reset may take to reach
	// the other end.
	lastWords = time.Second
	// little is how many bytes of a turn a step would have carried as well.
	little = 8 << 10
	// A passage rests after patience turns in a row that were little. That is so many at first,
	// and more up to most, the sooner it had to rise again.
	patienceFirst, patienceMost = 32, 32 << 8
)

// Passage is a connection with two ends. Each direction is a half. It begins up: each half
// has a goroutine, which waits, reads and writes. When it has been quiet for a while, or has
// said little at a time for many turns, it rests in one of the Loops, and is only state. It
// stays there as long as what is said is little at a time; bulk, ends and errors have it rise.
//
//	     quiet for a while (rest), little for many turns (settle)
//	up ───────────────────────────────────────────► resting
//	 │ ◄─────────────────────────────────────────────  │
//	 │   a step that is not done at once (riseLocked)  │
//	 │                                                 │
//	 └─both halves have ended──► over ◄──────Cancel────┘
//
// While it is up:
//
//	both open ──end of input on one──► half-closed ──on the other──► finished: Close both
//	    │                                  │
//	    ├──read error, Cancel──────────────┴────────────────────────► Abort both
//	    └──write error──► last words of the other half ─────────────► Abort both
//
// The first cause is what Result tells.
type Passage struct {
	a, b     Conn
	pool     *Pool
	quiet    time.Duration
	done     func(Result)
	stop     func() bool // of the context: Cancel is not called any more
	to, back half

	halfClosed atomic.Bool // one half has ended orderly
	// asked is set while the halves are asked to end their goroutines.
	asked atomic.Bool
	// littles counts the turns of both halves, in a row, that were little.
	littles atomic.Int32
	// patience is how many have it rest. It changes while no half has a goroutine.
	patience int32

	// mu is held for the time of a step, which does not block.
	mu      sync.Mutex
	mode    mode
	loop    *loop  // nil: it is never at rest
	id      uint64 // in the loop, 0 before it was first at rest
	dozing  bool   // it is at rest, and has been quiet
	steps   int32  // since it rests
	running int    // goroutines of halves
	open    int    // halves that have not ended
	ended   Ending // the first cause, "" while there is none
	err     error  // goes with ended
}

type mode uint8

const (
	up mode = iota
	resting
	over
)

// Join carries bytes between a and b until both directions have ended, then
// releases both. The end of input on one becomes CloseWrite on the other. A
// reset, a truncation or any other error on one aborts both, and so does the end
// of ctx. Join owns a and b from the call on, lifts their deadlines, and blocks
// until all it started has ended.
func Join(ctx context.Context, a, b Conn, cfg Config) Result {
	res := make(chan Result, 1)
	Start(ctx, a, b, cfg, func(r Result) { res <- r })
	return <-res
}

// Start is Join that does not block. It calls done once, in a goroutine of its own, when
// neither a nor b is used any more; done may take its time.
func Start(ctx context.Context, a, b Conn, cfg Config, done func(Result)) *Passage {
	p := &Passage{a: a, b: b, pool: cfg.Pool, quiet: cfg.HalfCloseTimeout, done: done, open: 2, patience: patienceFirst}
	if p.pool == nil {
		p.pool = NewPool()
		p.done = func(r Result) { p.pool.Close(); done(r) }
	}
	if p.quiet == 0 {
		p.quiet = defaultHalfCloseTimeout
	}
	p.to = half{p: p, from: a, to: b, fromEnd: ByA, toEnd: ByB, back: &p.back}
	p.back = half{p: p, from: b, to: a, fromEnd: ByB, toEnd: ByA, back: &p.to}
	p.to.limit(time.Time{})
	p.back.limit(time.Time{})
	if cfg.Loops != nil && canStep(a) && canStep(b) {
		p.loop = cfg.Loops.pick()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop = context.AfterFunc(ctx, func() { p.Cancel(context.Cause(ctx)) })
	p.riseLocked()
	return p
}

func canStep(c Conn) bool {
	s, ok := c.(Stepper)
	return ok && s.CanStep()
}

// Cancel resets both ends, if the passage is not over.
func (p *Passage) Cancel(cause error) { p.abort(Canceled, fmt.Errorf("canceled: %w", cause)) }

// restLocked has the loop carry it, which begins with what is in the sockets by now. The halves
// have nothing in hand: each has waited for its socket.
func (p *Passage) restLocked() {
	if !p.loop.watch(p) {
		p.riseLocked()
		return
	}
	p.mode, p.steps = resting, 0
	p.loop.liven(p)
}

// riseLocked gives both halves a goroutine. Each leaves; with the last one the passage is
// over, or at rest.
func (p *Passage) riseLocked() {
	p.mode, p.running = up, 2
	p.littles.Store(0)
	if p.loop != nil {
		p.wakeLocked()
	}
	go p.to.run()
	go p.back.run()
}

// event is what the socket that h reads from tells. b is scratch memory.
func (p *Passage) event(h *half, told uint32, b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode != resting { // its goroutines are told, too
		p.loop.unwatch(h)
		return
	}
	if p.dozing {
		p.wakeLocked()
	}
	if told != readable { // an end, a reset, an urgent byte
		p.riseLocked()
		return
	}
	if p.steps++; !h.step(b) {
		p.learn()
		p.riseLocked()
	}
}

// learn has a passage that rises for more than a step can do rest later the next time, if
// this time was not worth it. p.mu is held.
func (p *Passage) learn() {
	if p.steps > p.patience {
		p.patience = patienceFirst
	} else {
		p.patience = min(2*p.patience, patienceMost)
	}
}

func (p *Passage) wakeLocked() {
	p.dozing = false
	p.loop.liven(p)
}

// leave ends the goroutine of a half.
func (p *Passage) leave() {
	p.mu.Lock()
	if p.running--; p.running > 0 {
		p.mu.Unlock()
		return
	}
	if p.to.out && p.back.out && p.ended == "" {
		p.unaskLocked()
		p.to.out, p.back.out = false, false
		p.restLocked()
		p.mu.Unlock()
		return
	}
	res := p.overLocked()
	p.mu.Unlock()
	p.done(res)
}

// overLocked lets go of everything.
func (p *Passage) overLocked() Result {
	p.mode = over
	p.stop()
	if p.loop != nil {
		p.loop.forget(p)
	}
	return Result{AtoB: p.to.moved, BtoA: p.back.moved, Ended: p.ended, Err: p.err}
}

// rest is called at intervals. If nothing has been carried in between, a passage at rest dozes.
// One that is up, and of which both halves wait for something to read, is asked to rest: its
// halves to end their goroutines. At this moment they may begin to carry: one that does sees
// asked, or is seen here.
func (p *Passage) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.mode == resting:
		if quiet := p.to.isQuiet(); p.back.isQuiet() && quiet {
			p.dozeLocked()
		}
		return
	case p.mode == over || p.open < 2 || p.ended != "" || p.asked.Load():
		return
	}
	p.asked.Store(true)
	if quiet := p.to.isQuiet(); !p.back.isQuiet() || !quiet {
		p.asked.Store(false)
		return
	}
	p.interruptLocked()
}

// settle asks a passage that is up and says little at a time to rest, as rest does. If a half
// carries something right now, it is asked again after as many turns.
func (p *Passage) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.littles.Store(0)
	if p.mode != up || p.open < 2 || p.ended != "" || p.asked.Load() {
		return
	}
	p.asked.Store(true)
	if !p.to.waits() || !p.back.waits() {
		p.asked.Store(false)
		return
	}
	p.interruptLocked()
}

// interruptLocked ends what the halves wait for.
func (p *Passage) interruptLocked() {
	for _, c := range [2]Conn{p.a, p.b} {
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}

func (p *Passage) dozeLocked() {
	p.dozing = true
	p.loop.still(p)
	for _, c := range []Conn{p.a, p.b} {
		c.(Stepper).Doze()
	}
}

// unaskLocked takes back what rest has asked for.
func (p *Passage) unaskLocked() {
	if !p.asked.Load() {
		return
	}
	for _, c := range []Conn{p.a, p.b} {
		_ = c.SetReadDeadline(time.Time{})
	}
	p.asked.Store(false)
}

// stay is called by a half that has something to carry or to tell while it is asked to
// end its goroutine. The other half may have ended its own.
func (p *Passage) stay(h *half) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unaskLocked()
	if h.back.out {
		h.back.out = false
		p.running++
		go h.back.run()
	}
}

// yield reports what a half is to do whose wait for something to read has ended with err:
// to end its goroutine, or to wait again.
func (p *Passage) yield(h *half, err error) (out, again bool) {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !h.until.IsZero() && !time.Now().Before(h.until): // half-closed for too long, or last words
		return false, false
	case p.asked.Load():
		h.out = true
		return true, false
	}
	return false, true
}

// halfEnded notes that a half ended orderly and reports whether it was the last,
// in which case both connections are released. rest is the other half.
func (p *Passage) halfEnded(rest *half) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
	if p.open > 0 && p.ended == "" {
		p.halfClosed.Store(true)
		rest.limit(time.Now().Add(p.quiet))
		return false
	}
	p.releaseLocked()
	return true
}

// alive prolongs a half-closed connection: h has just carried something.
func (p *Passage) alive(h *half) {
	if !p.halfClosed.Load() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended == "" {
		h.limit(time.Now().Add(p.quiet))
	}
}

// lastWords notes that a half can no longer write, and leaves the rest a moment.
func (p *Passage) lastWords(rest *half, why Ending, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
	p.noteLocked(why, err)
	if p.open > 0 {
		rest.limit(time.Now().Add(lastWords))
		return
	}
	p.releaseLocked()
}

// abort notes the cause and resets both ends. What still runs ends by that.
func (p *Passage) abort(why Ending, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == over {
		return
	}
	p.noteLocked(why, err)
	p.releaseLocked()
	if p.mode == resting {
		go p.done(p.overLocked())
	}
}

func (p *Passage) noteLocked(why Ending, err error) {
	if p.ended == "" {
		p.ended, p.err = why, err
	}
}

// releaseLocked closes both ends if all went well, and aborts them if not.
func (p *Passage) releaseLocked() {
	if p.ended == "" {
		p.ended = Finished
	}
	if p.ended == Finished {
		p.a.Close()
		p.b.Close()
		return
	}
	p.a.Abort()
	p.b.Abort()
}
