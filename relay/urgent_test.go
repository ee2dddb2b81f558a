package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// urgent sends p with its last byte marked urgent.
func urgent(t *testing.T, c *net.TCPConn, p string) {
	t.Helper()
	if err := sendUrgent(c, []byte(p)); err != nil {
		t.Fatalf("send %q urgent: %v", p, err)
	}
}

func sendUrgent(c *net.TCPConn, p []byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		for len(p) > 0 {
			var n int
			n, serr = unix.SendmsgN(int(fd), p, nil, nil, unix.MSG_OOB|unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if serr != nil {
				return serr != unix.EAGAIN
			}
			p = p[n:]
		}
		return true
	})
	if err != nil {
		return err
	}
	return serr
}

func inLine(t *testing.T, c *net.TCPConn) {
	t.Helper()
	control(t, c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
}

func control(t *testing.T, c *net.TCPConn, do func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var derr error
	if err := raw.Control(func(fd uintptr) { derr = do(int(fd)) }); err != nil || derr != nil {
		t.Fatal(err, derr)
	}
}

func awaitEvent(fd int, event int16) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: event}}
	if ready, err := unix.Poll(p, 10_000); ready != 1 || err != nil {
		return fmt.Errorf("no event %d within ten seconds (%v)", event, err)
	}
	return nil
}

// heard is what a server gets that first waits for the end of input, then asks for
// the urgent byte, and then reads.
func heard(t *testing.T, c *net.TCPConn) string {
	t.Helper()
	var apart [1]byte
	n := 0
	control(t, c, func(fd int) error {
		if err := awaitEvent(fd, unix.POLLRDHUP); err != nil {
			return err
		}
		n, _, _ = unix.Recvfrom(fd, apart[:], unix.MSG_OOB|unix.MSG_DONTWAIT)
		return nil
	})
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("read %q, %v", got, err)
	}
	return fmt.Sprintf("%q and apart %q", got, apart[:max(n, 0)])
}

// An urgent byte is delivered as it would be without a relay in between, and where the
// way has no urgent bytes, in line.
func TestUrgentByteIsDelivered(t *testing.T) {
	cases := []struct {
		name, all string
		send      func(t *testing.T, c *net.TCPConn)
	}{
		{"first", "!abc", func(t *testing.T, c *net.TCPConn) { urgent(t, c, "!"); say(t, c, "abc") }},
		{"in the middle", "abc!def", func(t *testing.T, c *net.TCPConn) { say(t, c, "abc"); urgent(t, c, "!"); say(t, c, "def") }},
		{"last", "abc!", func(t *testing.T, c *net.TCPConn) { say(t, c, "abc"); urgent(t, c, "!") }},
		{"nothing else", "!", func(t *testing.T, c *net.TCPConn) { urgent(t, c, "!") }},
		{"end of a line, as FTP's abort", "ABOR\r\n", func(t *testing.T, c *net.TCPConn) { urgent(t, c, "ABOR\r\n") }},
		{"two in a row", "abc!?def", func(t *testing.T, c *net.TCPConn) {
			say(t, c, "abc")
			urgent(t, c, "!")
			urgent(t, c, "?")
			say(t, c, "def")
		}},
	}
	for name, wrap := range ways {
		for _, tc := range cases {
			for _, inline := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/inline=%v", name, tc.name, inline), func(t *testing.T) {
					t.Parallel()
					r := start(t, wrap, Config{})
					from, to := pair(t) // without a relay
					r.b.SetDeadline(time.Now().Add(20 * time.Second))
					to.SetDeadline(time.Now().Add(20 * time.Second))
					if inline {
						inLine(t, r.b)
						inLine(t, to)
					}
					for _, c := range []*net.TCPConn{r.a, from} {
						tc.send(t, c)
						c.CloseWrite()
					}
					got, want := heard(t, r.b), heard(t, to)
					if !strings.HasPrefix(name, "tcp to tcp") {
						want = fmt.Sprintf("%q and apart %q", tc.all, "")
					}
					if got != want {
						t.Errorf("got %s, want %s", got, want)
					}
					r.b.Close()
					r.ends(Finished)
				})
			}
		}
	}
}

// A client waits for the answer to its urgent byte, with nothing behind it.
func TestUrgentByteIsAnswered(t *testing.T) {
	eachWay(t, func(t *testing.T, r *rig) {
		inLine(t, r.b)
		for range 3 {
			say(t, r.a, "abc")
			hear(t, r.b, "abc")
			urgent(t, r.a, "!")
			hear(t, r.b, "!")
			say(t, r.b, "ok")
			hear(t, r.a, "ok")
		}
		r.a.Close()
		hearEnd(t, r.b)
		r.b.Close()
		r.ends(Finished)
	})
}

// Whatever is urgent, however it is cut, and whoever ends first: the other side gets all
// of it, or, if somebody reset the connection, the beginning and no orderly end.
func TestAllOrAReset(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for name, wrap := range ways {
		for round := range uint64(12) {
			t.Run(fmt.Sprintf("%s/%d", name, round), func(t *testing.T) {
				t.Parallel()
				r := start(t, wrap, Config{})
				rnd := rand.New(rand.NewPCG(seed, round))
				ends := [2]*side{newSide(t, r.a, rnd), newSide(t, r.b, rnd)}
				resets := rnd.IntN(4) == 0
				ends[0].resets = resets
				if first := rnd.IntN(3); first < 2 {
					ends[first].waits = true
				}
				done := make(chan struct{})
				go func() { defer close(done); ends[1].run() }()
				ends[0].run()
				<-done
				for i, s := range ends {
					from := ends[1-i]
					s.err = errors.Join(s.err, s.wrote)
					switch {
					case !bytes.HasPrefix(from.sent, s.got):
						t.Errorf("end %d got other bytes than were sent", i)
					case s.err == nil && len(s.got) != len(from.sent):
						t.Errorf("end %d got %d of %d bytes, and an orderly end (resets: %v)", i, len(s.got), len(from.sent), resets)
					case s.err != nil && !resets:
						t.Errorf("end %d after %d of %d bytes: %v", i, len(s.got), len(from.sent), s.err)
					}
				}
				if res := <-r.result; t.Failed() {
					t.Logf("%+v; waits %v %v; errors %v | %v", res, ends[0].waits, ends[1].waits, ends[0].err, ends[1].err)
				}
			})
		}
	}
}

// side is one application of TestAllOrAReset.
type side struct {
	c *net.TCPConn
	// waits for the other's end before it says its own; resets after its last byte.
	waits, resets bool
	chunks        []chunk
	take          int // bytes of each read

	sent []byte
	got  []byte
	// err is nil for an orderly end; a reset is told to one call only, which may be
	// one that wrote.
	err, wrote error
}

type chunk struct {
	size   int
	urgent bool
}

func newSide(t *testing.T, c *net.TCPConn, rnd *rand.Rand) *side {
	inLine(t, c)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	s := &side{c: c, take: 1 + rnd.IntN(1<<(4+rnd.IntN(14)))}
	for range rnd.IntN(60) {
		k := chunk{1 + rnd.IntN(1<<rnd.IntN(17)), rnd.IntN(3) == 0}
		s.chunks = append(s.chunks, k)
		p := make([]byte, k.size)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		s.sent = append(s.sent, p...)
	}
	return s
}

func (s *side) run() {
	read := make(chan struct{})
	go func() { defer close(read); s.read() }()
	rest := s.sent
	for _, k := range s.chunks {
		send := func(p []byte) error { _, err := s.c.Write(p); return err }
		if k.urgent {
			send = func(p []byte) error { return sendUrgent(s.c, p) }
		}
		if s.wrote = send(rest[:k.size]); s.wrote != nil {
			break
		}
		rest = rest[k.size:]
	}
	if s.resets {
		reset(s.c)
		<-read
		return
	}
	if s.waits {
		<-read
	}
	s.wrote = errors.Join(s.wrote, s.c.CloseWrite())
	<-read
	s.c.Close()
}

func (s *side) read() {
	buf := make([]byte, s.take)
	for {
		n, err := s.c.Read(buf)
		s.got = append(s.got, buf[:n]...)
		if err == io.EOF {
			return
		}
		if err != nil {
			s.err = err
			return
		}
	}
}
