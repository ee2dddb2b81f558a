package relay

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain fails on goroutines that outlive the tests.
func TestMain(m *testing.M) {
	if os.Getenv("RELAY_HOLD") != "" {
		hold()
		return
	}
	code := m.Run()
	left := goroutines()
	for end := time.Now().Add(10 * time.Second); left != "" && time.Now().Before(end); left = goroutines() {
		runtime.Gosched()
	}
	if code == 0 && left != "" {
		fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// goroutines are the stacks of all of them, "" if none is of this package.
func goroutines() string {
	buf := make([]byte, 1<<20)
	if all := string(buf[:runtime.Stack(buf, true)]); strings.Contains(all, "relay.(*") {
		return all
	}
	return ""
}

// other hides that a Conn is TCP, so that Join takes the way for any Conn.
type other struct{ *TCPConn }

// way is a kind of connection that Join tells apart, and whether Loops carry it.
type way struct {
	wrap  func(a, b *TCPConn) (Conn, Conn)
	loops bool
}

var kinds = map[string]func(a, b *TCPConn) (Conn, Conn){
	"tcp to tcp":     func(a, b *TCPConn) (Conn, Conn) { return a, b },
	"tcp to other":   func(a, b *TCPConn) (Conn, Conn) { return a, other{b} },
	"other to tcp":   func(a, b *TCPConn) (Conn, Conn) { return other{a}, b },
	"other to other": func(a, b *TCPConn) (Conn, Conn) { return other{a}, other{b} },
}

var ways = func() map[string]way {
	all := make(map[string]way)
	for name, wrap := range kinds {
		all[name] = way{wrap, false}
		all[name+", in loops"] = way{wrap, true}
	}
	return all
}()

func eachWay(t *testing.T, test func(t *testing.T, r *rig)) {
	for name, wrap := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, start(t, wrap, Config{}))
		})
	}
}

// rig is two applications with a Join between them.
type rig struct {
	t      *testing.T
	a, b   *net.TCPConn // the applications' ends
	cancel context.CancelFunc
	result chan Result
}

func start(t *testing.T, w way, cfg Config) *rig {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	r := &rig{t: t, cancel: cancel, result: make(chan Result, 1)}
	var a, b *net.TCPConn
	r.a, a = pair(t)
	r.b, b = pair(t)
	if cfg.Pool == nil {
		cfg.Pool = NewPool()
		t.Cleanup(cfg.Pool.Close)
	}
	if w.loops && cfg.Loops == nil {
		cfg.Loops = runLoops(t)
	}
	joinA, joinB := w.wrap(TCP(a), TCP(b))
	go r.join(ctx, joinA, joinB, cfg)
	return r
}

// runLoops returns loops that run, and in which a passage rests very soon.
func runLoops(t testing.TB) *Loops {
	l := NewLoops(2)
	l.tick = time.Millisecond
	runThem(t, l)
	return l
}

func runThem(t testing.TB, l *Loops) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, one := range l.all {
		for open := false; !open; runtime.Gosched() {
			one.mu.Lock()
			open = one.open
			one.mu.Unlock()
		}
	}
}

func (r *rig) join(ctx context.Context, a, b Conn, cfg Config) { r.result <- Join(ctx, a, b, cfg) }

// pair returns both ends of a TCP connection.
func pair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	near, far = c.(*net.TCPConn), s.(*net.TCPConn)
	limit := time.Now().Add(20 * time.Second)
	near.SetDeadline(limit)
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

func (r *rig) ends(want Ending) Result {
	r.t.Helper()
	var got Result
	select {
	case got = <-r.result:
	case <-time.After(30 * time.Second):
		r.t.Fatalf("it has not ended within half a minute, want %q", want)
	}
	if got.Ended != want || (got.Err == nil) != (want == Finished) {
		r.t.Fatalf("ended %q (%v), want %q", got.Ended, got.Err, want)
	}
	return got
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func say(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatalf("write %q: %v", s, err)
	}
}

func hear(t *testing.T, c net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func hearEnd(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v; want the end of input", n, err)
	}
}

func hearReset(t *testing.T, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want a reset", n, err)
	}
}

func TestHalfCloseThenDataTheOtherWay(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		say(t, r.a, "question")
		r.a.CloseWrite()
		hear(t, r.b, "question")
		hearEnd(t, r.b)
		say(t, r.b, "an")
		hear(t, r.a, "an")
		say(t, r.b, "swer")
		r.b.Close()
		hear(t, r.a, "swer")
		hearEnd(t, r.a)
		if got := r.ends(Finished); got.AtoB != 8 || got.BtoA != 6 {
			t.Fatalf("counted %d and %d bytes, want 8 and 6", got.AtoB, got.BtoA)
		}
	})
}

func TestResetIsReset(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		say(t, r.a, "x")
		hear(t, r.b, "x")
		reset(r.a)
		hearReset(t, r.b)
		r.ends(ByA)
	})
	eachWay(t, func(t *testing.T, r *rig) {
		say(t, r.a, "x")
		hear(t, r.b, "x")
		reset(r.b)
		hearReset(t, r.a)
		r.ends(ByB)
	})
}

func TestResetAfterHalfClose(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		r.a.CloseWrite()
		hearEnd(t, r.b)
		reset(r.a) // nobody reads a any more, nothing is written to it
		r.ends(ByA)
		if _, err := r.b.Write([]byte("x")); err == nil {
			_, err = r.b.Write([]byte("x"))
			if err == nil {
				t.Fatal("write after the reset succeeded twice")
			}
		}
	})
}

// A server answers and resets while the client is still asking.
func TestLastWordsBeforeAReset(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			junk := make([]byte, 1<<20)
			for {
				if _, err := r.a.Write(junk); err != nil {
					return
				}
			}
		}()
		hear(t, r.b, "\x00")
		say(t, r.b, "too large")
		reset(r.b)
		hear(t, r.a, "too large")
		r.ends(ByB)
		<-wrote
	})
}

func TestCancelResetsBoth(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		say(t, r.a, "x")
		hear(t, r.b, "x")
		r.cancel()
		hearReset(t, r.a)
		hearReset(t, r.b)
		if got := r.ends(Canceled); !errors.Is(got.Err, context.Canceled) {
			t.Fatalf("error %v, want that of the context", got.Err)
		}
	})
}

func TestHalfClosedQuietIsBounded(t *testing.T) {
	for name, wrap := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, wrap, Config{HalfCloseTimeout: time.Second})
			r.a.CloseWrite()
			hearEnd(t, r.b)
			hearReset(t, r.a)
			r.ends(HalfClosedTooLong)
		})
	}
}

// What moves prolongs a half-closed connection, and a deadline that somebody
// set before does not count.
func TestHalfClosedButAlive(t *testing.T) {
	r := start(t, ways["tcp to other"], Config{HalfCloseTimeout: 2 * time.Second})
	r.a.CloseWrite()
	hearEnd(t, r.b)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for range 5 {
		<-tick.C
		say(t, r.b, "still here")
		hear(t, r.a, "still here")
	}
	r.b.Close()
	hearEnd(t, r.a)
	r.ends(Finished)
}

func TestBothWaysAtOnce(t *testing.T) {
	const size = 16 << 20
	eachWay(t, func(t *testing.T, r *rig) {
		var wait sync.WaitGroup
		for seed, way := range []struct{ from, to *net.TCPConn }{{r.a, r.b}, {r.b, r.a}} {
			sent, got := sha256.New(), sha256.New()
			wait.Go(func() {
				src := io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), size)
				io.Copy(way.from, io.TeeReader(src, sent))
				way.from.CloseWrite()
			})
			wait.Go(func() {
				n, err := io.Copy(got, way.to)
				if n != size || err != nil {
					t.Errorf("received %d bytes, %v; want %d", n, err, size)
				}
			})
			defer func() {
				if string(sent.Sum(nil)) != string(got.Sum(nil)) {
					t.Error("received other bytes than were sent")
				}
			}()
		}
		wait.Wait()
		if got := r.ends(Finished); got.AtoB != size || got.BtoA != size {
			t.Errorf("counted %d and %d bytes, want %d", got.AtoB, got.BtoA, size)
		}
	})
}

// truncated is a Conn whose peer vanished without a close_notify.
type truncated struct{ other }

func (t truncated) Read(p []byte) (int, error) {
	n, err := t.other.Read(p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func TestTruncationIsReset(t *testing.T) {
	wrap := func(a, b *TCPConn) (Conn, Conn) { return a, truncated{other{b}} }
	for _, loops := range []bool{false, true} {
		truncate(t, start(t, way{wrap, loops}, Config{}))
	}
}

func truncate(t *testing.T, r *rig) {
	say(t, r.b, "half a mess")
	r.b.Close()
	hear(t, r.a, "half a mess")
	hearReset(t, r.a)
	if got := r.ends(ByB); !errors.Is(got.Err, io.ErrUnexpectedEOF) {
		t.Fatalf("error %v, want %v", got.Err, io.ErrUnexpectedEOF)
	}
}

// The kernel tells of a reset once. If a write was told, the next read gets 0
// bytes, which must not pass for an end of input.
func TestResetThatAWriteWasTold(t *testing.T) {
	app, c := pair(t)
	conn := TCP(c)
	defer conn.Abort()
	reset(app)
	control(t, c, func(fd int) error { return awaitEvent(fd, unix.POLLIN) })
	conn.Raw().Write([]byte("x"))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("read: %v, want %v", err, unix.ECONNRESET)
	}
	k := newTaker(conn, NewPool())
	if _, _, err := k.take(); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("take: %v, want %v", err, unix.ECONNRESET)
	}
}

// Nor must one that AwaitReadable was told of, also after a FIN of ours.
func TestResetThatALookWasTold(t *testing.T) {
	app, c := pair(t)
	conn := TCP(c)
	defer conn.Abort()
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	reset(app)
	if err := conn.AwaitReadable(); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("await: %v, want %v", err, unix.ECONNRESET)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("read: %v, want %v", err, unix.ECONNRESET)
	}
}

// Without a descriptor to spare the bytes still flow, through a buffer.
func TestNoPipeToSpliceThrough(t *testing.T) {
	r := start(t, ways["tcp to tcp"], Config{})
	had := limitFiles(t, 1)
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
			t.Fatal(err)
		}
	}()
	say(t, r.a, "question")
	hear(t, r.b, "question")
	r.a.Close()
	hearEnd(t, r.b)
	r.b.Close()
	r.ends(Finished)
}

func limitFiles(t *testing.T, most uint64) unix.Rlimit {
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: had.Max}); err != nil {
		t.Fatal(err)
	}
	return had
}

func TestPoolKeepsABoundedNumberOfPipes(t *testing.T) {
	pool := NewPool()
	before := openFiles(t)
	var lent []*pipe
	for range idlePipes + 10 {
		q, err := pool.pipe()
		if err != nil {
			t.Fatal(err)
		}
		lent = append(lent, q)
	}
	for _, q := range lent[:len(lent)-1] {
		pool.keepPipe(q)
	}
	if got := openFiles(t) - before; got != 2*(idlePipes+1) {
		t.Errorf("%d descriptors open, want %d", got, 2*(idlePipes+1))
	}
	pool.Close()
	pool.keepPipe(lent[len(lent)-1])
	if got := openFiles(t) - before; got != 0 {
		t.Errorf("%d descriptors open after Close, want none", got)
	}
}

func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A quiet connection holds neither a pipe nor a buffer.
func TestQuietHoldsNothing(t *testing.T) {
	pool := NewPool()
	defer pool.Close()
	r := start(t, ways["tcp to tcp"], Config{Pool: pool})
	say(t, r.a, "x")
	hear(t, r.b, "x")
	say(t, r.b, "y")
	hear(t, r.a, "y")
	r.a.Close()
	r.b.Close()
	r.ends(Finished)
	pool.mu.Lock()
	defer pool.mu.Unlock()
	if n := len(pool.pipes); n != 1 && n != 2 {
		t.Fatalf("%d pipes in the pool, want those that were lent", n)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	for name, wrap := range ways {
		b.Run(name, func(b *testing.B) {
			near, far := benchJoin(b, wrap)
			go io.Copy(far, far)
			msg := make([]byte, 128)
			for b.Loop() {
				near.Write(msg)
				io.ReadFull(near, msg)
			}
		})
	}
}

func BenchmarkBulk(b *testing.B) {
	for name, wrap := range ways {
		b.Run(name, func(b *testing.B) {
			near, far := benchJoin(b, wrap)
			go io.Copy(io.Discard, far)
			msg := make([]byte, 128<<10)
			b.SetBytes(int64(len(msg)))
			for b.Loop() {
				near.Write(msg)
			}
		})
	}
}

func benchJoin(b *testing.B, w way) (near, far *net.TCPConn) {
	near, joinA := pair(b)
	far, joinB := pair(b)
	far.SetDeadline(time.Time{})
	near.SetDeadline(time.Time{})
	pool := NewPool()
	cfg := Config{Pool: pool}
	if w.loops {
		cfg.Loops = runLoops(b)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		a, c := w.wrap(TCP(joinA), TCP(joinB))
		Join(context.Background(), a, c, cfg)
	}()
	b.Cleanup(func() { near.Close(); far.Close(); <-done; pool.Close() })
	return near, far
}

// A process that is killed resets its connections: the applications must not
// take its death for an end of input.
func TestKilledProcessResets(t *testing.T) {
	near, far := pair(t)
	f, err := far.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "RELAY_HOLD=1")
	cmd.ExtraFiles = []*os.File{f}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	far.Close()
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	hearReset(t, near)
}

// hold is the process that TestKilledProcessResets kills.
func hold() {
	f := os.NewFile(3, "conn")
	c, err := net.FileConn(f)
	if err != nil {
		panic(err)
	}
	f.Close()
	conn := TCP(c.(*net.TCPConn))
	os.Stdout.Write([]byte("h"))
	io.Copy(io.Discard, conn)
}
