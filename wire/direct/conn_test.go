package direct

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
)

var (
	idClient = mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "client"}
	idServer = mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "server"}
)

// world is two identities of one CA, and a listener.
type world struct {
	ca             *testCA
	tls            *identity.TLS
	client, server *identity.Leaf
	l              *net.TCPListener
}

func newWorld(t testing.TB) *world {
	ca := newTestCA(t)
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return &world{ca, identity.NewTLS(identity.TLSConfig{}), ca.leaf(t, idClient), ca.leaf(t, idServer), l}
}

func (w *world) clientConfig() *tls.Config {
	return w.tls.Client(w.client, idServer, w.l.Addr().String())
}

// sockets is one TCP connection.
func (w *world) sockets(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, w.l.Addr().(*net.TCPAddr))
	must(t, err)
	s, err := w.l.AcceptTCP()
	must(t, err)
	t.Cleanup(func() { c.Close(); s.Close() })
	return c, s
}

// connect makes a connection up to and with the reply.
func (w *world) connect(t testing.TB, clientOwn, serverOwn bool) (c, s *Conn) {
	t.Helper()
	cs, ss := w.sockets(t)
	ctx := soon(t)
	want := Hello{Service: "default/db.default.svc:5432", SourcePod: "default/client-1"}
	accepted := make(chan error, 1)
	go func() {
		var got Hello
		var err error
		s, got, err = serve(ctx, ss, w.tls.Server(w.server), side{own: serverOwn})
		if err == nil && got != want {
			err = fmt.Errorf("hello %+v: want %+v", got, want)
		}
		if err == nil {
			err = s.Reply(Reply{StatusOK, "fine"})
		}
		accepted <- err
	}()
	c, err := client(ctx, cs, w.clientConfig(), opening{hello: want}, side{client: true, own: clientOwn})
	must(t, err)
	r, err := c.AwaitReply(ctx)
	must(t, err)
	must(t, <-accepted)
	if r != (Reply{StatusOK, "fine"}) {
		t.Fatalf("reply %+v", r)
	}
	if c.Peer().ID != idServer || s.Peer().ID != idClient {
		t.Fatalf("peers %v and %v", c.Peer(), s.Peer())
	}
	return c, s
}

// layers are all pairs of record layers.
func layers(t *testing.T, f func(t *testing.T, client, server bool)) {
	name := map[bool]string{true: "own", false: "crypto_tls"}
	for _, c := range []bool{true, false} {
		for _, s := range []bool{true, false} {
			t.Run(name[c]+"_"+name[s], func(t *testing.T) { f(t, c, s) })
		}
	}
}

// pump writes n random bytes in pieces of random size, then ends, and returns their hash.
func pump(c *Conn, seed uint64, n int) ([]byte, error) {
	r := rand.New(rand.NewPCG(seed, 1))
	h := sha256.New()
	buf := random(seed, 300<<10)
	for n > 0 {
		start := r.IntN(len(buf))
		p := buf[start : start+min(n, 1+r.IntN(len(buf)-start))]
		h.Write(p)
		if _, err := c.Write(p); err != nil {
			return nil, err
		}
		n -= len(p)
	}
	return h.Sum(nil), c.CloseWrite()
}

// drain reads to the end with buffers of random size, and returns the hash.
func drain(c *Conn, seed uint64) ([]byte, error) {
	r := rand.New(rand.NewPCG(seed, 2))
	h := sha256.New()
	buf := make([]byte, 70<<10)
	for {
		if err := c.AwaitReadable(); err != nil {
			return nil, err
		}
		n, err := c.Read(buf[:1+r.IntN(len(buf))])
		h.Write(buf[:n])
		if err == io.EOF {
			return h.Sum(nil), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func both(t *testing.T, a, b *Conn, n int) {
	t.Helper()
	for _, c := range []*Conn{a, b} { // that one end fails must not hang the other
		must(t, c.Raw().SetDeadline(time.Now().Add(30*time.Second)))
	}
	var wg sync.WaitGroup
	var sum [4][]byte
	var errs [4]error
	seed := rand.Uint64()
	wg.Go(func() { sum[0], errs[0] = pump(a, seed, n) })
	wg.Go(func() { sum[1], errs[1] = drain(b, seed) })
	wg.Go(func() { sum[2], errs[2] = pump(b, seed, n) })
	wg.Go(func() { sum[3], errs[3] = drain(a, seed) })
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	if !bytes.Equal(sum[0], sum[1]) || !bytes.Equal(sum[2], sum[3]) {
		t.Fatalf("seed %d: other bytes arrived than were sent", seed)
	}
}

func TestBothWaysAtOnce(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		for _, resumed := range []bool{false, true} {
			if !resumed {
				w.tls.Forget(idClient)
			}
			c, s := w.connect(t, client, server)
			if c.Peer().Resumed != resumed || s.Peer().Resumed != resumed {
				t.Errorf("resumed: client says %v, server %v: want %v", c.Peer().Resumed, s.Peer().Resumed, resumed)
			}
			both(t, c, s, 4<<20)
		}
	})
}

func TestHalfClose(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		for _, first := range []string{"client", "server"} {
			c, s := w.connect(t, client, server)
			a, b := c, s
			if first == "server" {
				a, b = s, c
			}
			must(t, a.CloseWrite())
			if n, err := b.Read(make([]byte, 10)); n != 0 || err != io.EOF {
				t.Fatalf("%s ended: read %d, %v: want EOF", first, n, err)
			}
			if _, err := b.Write([]byte("still here")); err != nil {
				t.Fatal(err)
			}
			must(t, b.CloseWrite())
			got, err := io.ReadAll(a)
			if err != nil || string(got) != "still here" {
				t.Fatalf("%s ended: read %q, %v", first, got, err)
			}
			must(t, c.Close())
			must(t, s.Close())
		}
	})
}

// A FIN without close_notify is a truncation, wherever it comes from.
func TestTruncation(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		_, err := c.Write([]byte("part"))
		must(t, err)
		must(t, c.Raw().CloseWrite())
		got, err := io.ReadAll(s)
		if string(got) != "part" || !errors.Is(err, ErrTruncated) {
			t.Errorf("server read %q, %v: want %v", got, err, ErrTruncated)
		}
		must(t, s.Raw().CloseWrite())
		if _, err := io.ReadAll(c); !errors.Is(err, ErrTruncated) {
			t.Errorf("client read %v: want %v", err, ErrTruncated)
		}
	})
}

func TestReset(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		must(t, c.Abort())
		if err := s.AwaitReadable(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("server read %v: want a reset", err)
		}
		c, s = w.connect(t, client, server)
		must(t, s.CloseWrite())
		if _, err := c.Read(make([]byte, 10)); err != io.EOF {
			t.Fatal(err)
		}
		must(t, s.Abort())
		if err := c.AwaitReset(); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client after its end of input: %v: want a reset", err)
		}
	})
}

// TIME_WAIT stays with the server, whichever side ends first.
func TestTimeWaitIsTheAcceptors(t *testing.T) {
	w := newWorld(t)
	for _, first := range []string{"client", "server"} {
		c, s := w.connect(t, true, true)
		a, b := c, s
		if first == "server" {
			a, b = s, c
		}
		local, remote := c.Raw().LocalAddr().(*net.TCPAddr), c.Raw().RemoteAddr().(*net.TCPAddr)
		must(t, a.CloseWrite())
		_, _ = b.Read(make([]byte, 1))
		must(t, b.CloseWrite())
		_, _ = a.Read(make([]byte, 1))
		must(t, c.Close())
		must(t, s.Close())
		// TIME_WAIT at this end would last a minute; LAST_ACK may last a moment on a
		// busy machine.
		left := socketBetween(t, local, remote)
		for end := time.Now().Add(5 * time.Second); left != "" && time.Now().Before(end); runtime.Gosched() {
			left = socketBetween(t, local, remote)
		}
		if left != "" {
			t.Errorf("%s ended first: the client is left with %s", first, left)
		}
		if socketBetween(t, remote, local) == "" {
			t.Errorf("%s ended first: nothing is left with the server either: want TIME_WAIT", first)
		}
	}
}

// socketBetween is the line of proc_net_tcp(5) of the socket with these two addresses of
// IPv4, "" if there is none. Its fourth field is the state: 06 is TIME_WAIT.
func socketBetween(t *testing.T, local, remote *net.TCPAddr) string {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	hex := func(a *net.TCPAddr) string {
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a.IP.To4()), a.Port)
	}
	pair := hex(local) + " " + hex(remote)
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, pair) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// KeyUpdates go both ways, between both layers, while bytes flow.
func TestKeyUpdate(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		for _, conn := range []*Conn{c, s} {
			if r, ok := conn.s.(*records); ok {
				r.rekey = 7
			}
		}
		both(t, c, s, 4<<20)
	})
}

// A peer that asks for a KeyUpdate gets one before the next byte.
func TestKeyUpdateRequested(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		for _, end := range [][2]*Conn{{c, s}, {s, c}} {
			r, ok := end[0].s.(*records)
			if !ok {
				continue
			}
			before := bytes.Clone(r.open.secret)
			b := r.seal.seal(make([]byte, 0, 100), typeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 1})
			must(t, r.seal.update())
			_, err := r.c.Write(b)
			must(t, err)
			echo(t, end[0], end[1])
			if bytes.Equal(before, r.open.secret) {
				t.Error("the peer has kept its key")
			}
		}
	})
}

func echo(t testing.TB, a, b io.ReadWriter) {
	t.Helper()
	buf := make([]byte, 4)
	for _, x := range [][2]io.ReadWriter{{a, b}, {b, a}} {
		_, err := x[0].Write([]byte("ping"))
		must(t, err)
		_, err = io.ReadFull(x[1], buf)
		must(t, err)
	}
}

func TestUselessRecords(t *testing.T) {
	w := newWorld(t)
	rows := map[string]struct {
		typ   byte
		plain []byte
	}{
		"empty":         {typeApplication, nil},
		"user_canceled": {typeAlert, []byte{1, alertUserCanceled}},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			c, s := w.connect(t, true, true)
			s.keep.keeps = false // else an empty record is an end
			r := c.s.(*records)
			var b []byte
			for range maxUseless + 1 {
				b = append(b, r.seal.seal(make([]byte, 0, 100), row.typ, row.plain)...)
			}
			_, err := r.c.Write(b)
			must(t, err)
			if _, err := s.Read(make([]byte, 10)); !errors.Is(err, errUseless) {
				t.Errorf("%v: want %v", err, errUseless)
			}
		})
	}
}

func TestForgedRecord(t *testing.T) {
	w := newWorld(t)
	c, s := w.connect(t, true, true)
	r := c.s.(*records)
	b := r.seal.seal(make([]byte, 0, 100), typeApplication, []byte("hello"))
	b[len(b)-1] ^= 1
	_, err := r.c.Write(b)
	must(t, err)
	for range 2 { // the error stays
		if n, err := s.Read(make([]byte, 100)); n != 0 || err == nil || err == io.EOF {
			t.Errorf("read %d, %v: want an error", n, err)
		}
	}
}

func TestReplies(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, clientOwn, serverOwn bool) {
		for status := StatusOK; status <= StatusShuttingDown; status++ {
			cs, ss := w.sockets(t)
			go func() {
				s, _, err := serve(soon(t), ss, w.tls.Server(w.server), side{own: serverOwn})
				if err == nil {
					_ = s.Reply(Reply{status, "because"})
					_ = s.CloseWrite()
					_ = s.Close()
				}
			}()
			c, err := client(soon(t), cs, w.clientConfig(), opening{}, side{client: true, own: clientOwn})
			must(t, err)
			r, err := c.AwaitReply(soon(t))
			must(t, err)
			if want := (Reply{status, "because"}); r != want {
				t.Errorf("got %v, want %v", r, want)
			}
			must(t, c.Abort())
		}
	})
}

func TestTimeouts(t *testing.T) {
	w := newWorld(t)
	for name, f := range map[string]func(ctx context.Context, c *net.TCPConn) error{
		"client": func(ctx context.Context, c *net.TCPConn) error {
			_, err := Client(ctx, c, w.clientConfig(), Hello{})
			return err
		},
		"server": func(ctx context.Context, c *net.TCPConn) error {
			_, _, err := Server(ctx, c, w.tls.Server(w.server))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := w.sockets(t)
			ctx, cancel := context.WithTimeout(soon(t), 10*time.Millisecond)
			defer cancel()
			err := f(ctx, c)
			if got := identity.Reason(err); got != identity.ReasonTimeout {
				t.Errorf("%v is %s", err, got)
			}
			c, _ = w.sockets(t)
			ctx, cancel = context.WithCancel(soon(t))
			time.AfterFunc(10*time.Millisecond, cancel)
			err = f(ctx, c)
			if got := identity.Reason(err); got != identity.ReasonCanceled {
				t.Errorf("%v is %s", err, got)
			}
		})
	}
}

func TestReadDeadline(t *testing.T) {
	w := newWorld(t)
	layers(t, func(t *testing.T, client, server bool) {
		c, s := w.connect(t, client, server)
		must(t, c.SetReadDeadline(time.Now().Add(time.Millisecond)))
		if err := c.AwaitReadable(); !isTimeout(err) {
			t.Fatalf("await: %v", err)
		}
		must(t, c.SetReadDeadline(time.Time{}))
		echo(t, s, c)
	})
}

func TestWriteAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	c, s := w.connect(t, true, true)
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			if err := s.AwaitReadable(); err != nil {
				done <- err
				return
			}
			if _, err := s.Read(buf); err != nil {
				done <- err
				return
			}
		}
	}()
	p := make([]byte, 64<<10)
	allocs := testing.AllocsPerRun(2000, func() { _, _ = c.Write(p) })
	must(t, c.CloseWrite())
	if err := <-done; err != io.EOF {
		t.Fatal(err)
	}
	if allocs >= 1 && !raceEnabled {
		t.Errorf("%v allocations per 64 KiB written and read: want none", allocs)
	}
}

// A quiet connection is two sockets and two keys, not a tls.Conn and no buffer.
func TestQuietConnectionIsSmall(t *testing.T) {
	const n = 200
	w := newWorld(t)
	w.connect(t, true, true) // warm
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&before)
	keep := make([]*Conn, 0, 2*n)
	for range n {
		c, s := w.connect(t, true, true)
		echo(t, c, s)
		keep = append(keep, c, s)
	}
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := int64(after.HeapAlloc-before.HeapAlloc) / int64(len(keep))
	t.Logf("%d bytes of heap per end", per)
	if per > 6<<10 && !raceEnabled {
		t.Errorf("a quiet end holds %d bytes of heap: want at most 6 KiB", per)
	}
	for _, c := range keep {
		if c.in.b != nil {
			t.Fatal("a quiet end holds a buffer")
		}
	}
}

func dialTCP(t testing.TB, w *world) *net.TCPConn {
	c, err := net.DialTCP("tcp", nil, w.l.Addr().(*net.TCPAddr))
	must(t, err)
	return c
}
