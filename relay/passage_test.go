package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startIn is start that gives the passage, carried by loops.
func startIn(t testing.TB, l *Loops, kind string) (*rig, *Passage) {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	r := &rig{cancel: cancel, result: make(chan Result, 1)}
	if t, ok := t.(*testing.T); ok {
		r.t = t
	}
	var a, b *net.TCPConn
	r.a, a = pair(t)
	r.b, b = pair(t)
	r.b.SetDeadline(time.Now().Add(20 * time.Second))
	pool := NewPool()
	t.Cleanup(pool.Close)
	joinA, joinB := kinds[kind](TCP(a), TCP(b))
	return r, Start(ctx, joinA, joinB, Config{Pool: pool, Loops: l}, func(res Result) { r.result <- res })
}

func (p *Passage) is(m mode) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode == m && (m != resting || p.dozing)
}

// awaitMode waits until p is that; at rest means that it dozes.
func awaitMode(t testing.TB, p *Passage, m mode) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !p.is(m); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("not in mode %d within ten seconds", m)
		}
	}
}

// isEmpty reports whether loops hold nothing.
func (l *Loops) isEmpty() bool {
	for _, one := range l.all {
		one.mu.Lock()
		n := len(one.passages) + len(one.lively)
		one.mu.Unlock()
		if n > 0 {
			return false
		}
	}
	return true
}

// A connection that says little at a time has no goroutine, and none when it is quiet.
func TestAtRestNoGoroutine(t *testing.T) {
	l := runLoops(t)
	for kind := range kinds {
		before := goroutinesOf("relay.(*half)")
		r, p := startIn(t, l, kind)
		for range 3 {
			say(t, r.a, "question")
			hear(t, r.b, "question")
			say(t, r.b, "answer")
			hear(t, r.a, "answer")
			awaitMode(t, p, resting)
		}
		if now := goroutinesOf("relay.(*half)"); now > before {
			t.Errorf("%s: %d goroutines more", kind, now-before)
		}
		r.a.Close()
		hearEnd(t, r.b)
		r.b.Close()
		if got := r.ends(Finished); got.AtoB != 24 || got.BtoA != 18 {
			t.Errorf("%s: counted %d and %d bytes, want 24 and 18", kind, got.AtoB, got.BtoA)
		}
		awaitMode(t, p, over)
	}
	if !l.isEmpty() {
		t.Error("something is left in the loops")
	}
}

// goroutinesOf counts those that have a function of that name on their stack.
func goroutinesOf(name string) int {
	n := 0
	records := make([]runtime.StackRecord, 10_000)
	count, _ := runtime.GoroutineProfile(records)
	for _, r := range records[:count] {
		frames := runtime.CallersFrames(r.Stack())
		for more := true; more; {
			var f runtime.Frame
			f, more = frames.Next()
			if strings.Contains(f.Function, name) {
				n++
				break
			}
		}
	}
	return n
}

// Bulk has goroutines, and when it is over, none; nothing is lost on the way there and back.
func TestBulkRises(t *testing.T) {
	l := runLoops(t)
	for kind := range kinds {
		r, p := startIn(t, l, kind)
		for range 3 {
			const size = 4 << 20
			var wait sync.WaitGroup
			wait.Go(func() { r.a.Write(make([]byte, size)) })
			if n, err := io.CopyN(io.Discard, r.b, size); n != size || err != nil {
				t.Fatalf("%s: %d bytes, %v", kind, n, err)
			}
			wait.Wait()
			awaitMode(t, p, resting)
			say(t, r.b, "thanks")
			hear(t, r.a, "thanks")
		}
		r.a.Close()
		r.b.Close()
		r.ends(Finished)
	}
}

// Little by little, but more than the other end takes: what a step could not write is
// written later, and in order.
func TestStepThatBlocks(t *testing.T) {
	l := runLoops(t)
	for kind := range kinds {
		r, p := startIn(t, l, kind)
		sent := 0
		chunk := make([]byte, 3000)
		for {
			for i := range chunk {
				chunk[i] = byte((sent + i) % 251)
			}
			r.a.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			n, err := r.a.Write(chunk)
			sent += n
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		awaitMode(t, p, up)
		say(t, r.b, "the other direction goes on")
		hear(t, r.a, "the other direction goes on")
		got := make([]byte, sent)
		if _, err := io.ReadFull(r.b, got); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		for i, c := range got {
			if c != byte(i%251) {
				t.Fatalf("%s: byte %d of %d is another one", kind, i, sent)
			}
		}
		awaitMode(t, p, resting)
		r.b.Close()
		hearEnd(t, r.a)
		r.a.Close()
		r.ends(Finished)
	}
}

// A step cannot write since the other end was reset, which nobody has noticed yet.
func TestStepThatFails(t *testing.T) {
	r, p := startIn(t, nil, "tcp to tcp")
	awaitMode(t, p, up)
	r.cancel()
	r.ends(Canceled)
	nearApp, near := pair(t)
	farApp, far := pair(t)
	p = &Passage{a: TCP(near), b: TCP(far), pool: NewPool(), loop: NewLoops(1).all[0], open: 2}
	res := make(chan Result, 1)
	p.done = func(r Result) { res <- r }
	p.stop = func() bool { return true }
	p.to = half{p: p, from: p.a, to: p.b, fromEnd: ByA, toEnd: ByB, back: &p.back}
	p.back = half{p: p, from: p.b, to: p.a, fromEnd: ByB, toEnd: ByA, back: &p.to}
	p.mode = resting
	say(t, nearApp, "x")
	control(t, near, func(fd int) error { return awaitEvent(fd, unix.POLLIN) })
	reset(farApp)
	control(t, far, func(fd int) error { return awaitEvent(fd, unix.POLLIN) })
	p.event(&p.to, readable, make([]byte, BufferSize))
	hearReset(t, nearApp)
	if got := <-res; got.Ended != ByB || !errors.Is(got.Err, unix.ECONNRESET) && !errors.Is(got.Err, unix.EPIPE) {
		t.Errorf("ended %q, %v", got.Ended, got.Err)
	}
	p.pool.Close()
}

// Cancel ends a passage in whichever mode, once.
func TestCancelAtRest(t *testing.T) {
	l := runLoops(t)
	r, p := startIn(t, l, "tcp to other")
	awaitMode(t, p, resting)
	cause := errors.New("a cause")
	p.Cancel(cause)
	p.Cancel(errors.New("another one"))
	r.cancel()
	if got := r.ends(Canceled); !errors.Is(got.Err, cause) {
		t.Errorf("error %v, want the cause", got.Err)
	}
	hearReset(t, r.a)
	hearReset(t, r.b)
	if !l.isEmpty() {
		t.Error("something is left in the loops")
	}
}

// When the loops end, connections go on.
func TestLoopsEnd(t *testing.T) {
	l := NewLoops(1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- l.Run(ctx) }()
	r, p := startIn(t, l, "other to tcp")
	early, q := startIn(t, NewLoops(1), "tcp to tcp") // which never run
	awaitMode(t, p, resting)
	awaitMode(t, q, up)
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	awaitMode(t, p, up)
	for _, r := range []*rig{r, early} {
		say(t, r.a, "question")
		hear(t, r.b, "question")
		r.a.Close()
		hearEnd(t, r.b)
		r.b.Close()
		r.ends(Finished)
	}
}

// FuzzPassage does what the bytes say, one after the other, at both ends of a connection,
// over real sockets: whatever the order, nobody gets other bytes than were sent, or an end
// that was none, and nothing is left.
func FuzzPassage(f *testing.F) {
	f.Add(byte(0), []byte{0x50, 0x49, 0x58, 0x41, 0x05, 0x02, 0x0a})
	f.Add(byte(1), []byte{0x50, 0x49, 0x05, 0xf0, 0x05, 0xf9, 0xf9, 0x02, 0xf8, 0xf1, 0x0b})
	f.Add(byte(2), []byte{0xf0, 0xf0, 0xf8, 0x05, 0xf9, 0x0d, 0x03})
	f.Add(byte(3), []byte{0x05, 0x20, 0x04, 0x28, 0x04, 0x0a, 0x04, 0x40, 0x02})
	f.Add(byte(1), []byte{0x50, 0x07, 0x49, 0x58, 0x07, 0xf0, 0x07, 0xf9, 0x05, 0x07, 0x02, 0xf8, 0x07, 0x0b})
	l := runLoops(f)
	names := []string{"tcp to tcp", "tcp to other", "other to tcp", "other to other"}
	f.Fuzz(func(t *testing.T, kind byte, ops []byte) {
		r, p := startIn(t, l, names[kind%4])
		ends := [2]*actor{{c: r.a}, {c: r.b}}
		for _, op := range ops[:min(len(ops), 100)] {
			me := ends[op>>3&1]
			switch size := 1 << (op >> 4); op & 7 {
			case 0:
				me.write(size)
			case 1:
				me.read(t, size, ends[1-op>>3&1])
			case 2:
				me.closeWrite()
			case 3:
				me.reset()
			case 4:
				p.rest()
			case 5:
				for range 100 {
					runtime.Gosched()
				}
			case 6: // a lot at once
				me.write(17 * size)
			case 7:
				p.settle()
			}
		}
		finish(t, ends)
		res := <-r.result
		if anyReset := ends[0].isReset || ends[1].isReset; !anyReset &&
			(res.Ended != Finished || res.AtoB != ends[0].sent || res.BtoA != ends[1].sent) {
			t.Errorf("%+v after %d and %d bytes", res, ends[0].sent, ends[1].sent)
		}
		awaitMode(t, p, over)
		if p.loop.passage(p.id) != nil {
			t.Error("it is left in the loop")
		}
	})
}

// actor is an application that FuzzPassage has act. The bytes that it sends are numbered.
type actor struct {
	c                 *net.TCPConn
	sent, got         int64
	isShut, isReset   bool // it has ended its direction, it has reset
	sawEnd, sawBroken bool
}

func (a *actor) write(n int) {
	if a.isShut || a.isReset {
		return
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = byte((a.sent + int64(i)) % 251)
	}
	a.c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	m, err := a.c.Write(b)
	a.sent += int64(m)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		a.sawBroken = true
	}
}

func (a *actor) read(t *testing.T, n int, from *actor) (err error) {
	if a.isReset || a.sawEnd || a.sawBroken {
		return io.EOF
	}
	b := make([]byte, n)
	a.c.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
	n, err = a.c.Read(b)
	for i, c := range b[:n] {
		if c != byte((a.got+int64(i))%251) {
			t.Fatalf("byte %d is another one", a.got+int64(i))
		}
	}
	a.got += int64(n)
	switch {
	case err == io.EOF:
		a.sawEnd = true
		if !from.isShut || a.got != from.sent {
			t.Errorf("an orderly end after %d of %d bytes (ended %v, reset %v)", a.got, from.sent, from.isShut, from.isReset)
		}
	case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
		a.sawBroken = true
		if !from.isReset {
			t.Errorf("after %d of %d bytes: %v", a.got, from.sent, err)
		}
	}
	return err
}

func (a *actor) closeWrite() {
	if !a.isShut && !a.isReset {
		a.isShut = true
		_ = a.c.CloseWrite()
	}
}

func (a *actor) reset() {
	if !a.isReset {
		a.isReset = true
		reset(a.c)
	}
}

// finish has both ends end, and read what there is.
func finish(t *testing.T, ends [2]*actor) {
	for i := range ends {
		ends[i].closeWrite()
	}
	for limit := time.Now().Add(10 * time.Second); ; {
		open := false
		for i, a := range ends {
			if err := a.read(t, 1<<16, ends[1-i]); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				open = true
			}
		}
		if !open {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("no end: %+v %+v", ends[0], ends[1])
		}
	}
	for _, a := range ends {
		a.c.Close()
	}
}
