package direct

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// endsOf are both ends of a connection of TCP.
func endsOf(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer l.Close()
	a, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	must(t, err)
	b, err = l.AcceptTCP()
	must(t, err)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// recordsOn is a record layer on c, with keys that all tests know.
func recordsOn(t testing.TB, c *net.TCPConn) *records {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	in := new(inbox)
	in.bind(raw)
	r := &records{c: c, raw: raw, in: in, rekey: rekeyAfter, answer: new(atomic.Bool)}
	r.out.Bind(raw)
	must(t, errors.Join(r.open.start(&aes128, bytes.Repeat([]byte{1}, 32)), r.seal.start(&aes128, bytes.Repeat([]byte{1}, 32))))
	return r
}

// What a step cannot send goes out before what is written next, also if that is nothing.
func TestTryWriteThatBlocks(t *testing.T) {
	a, b := endsOf(t)
	must(t, a.SetDeadline(time.Now().Add(20*time.Second)))
	must(t, b.SetDeadline(time.Now().Add(20*time.Second)))
	from, to := recordsOn(t, a), recordsOn(t, b)
	for _, more := range []int{0, 5000, 200_000} {
		var sent []byte
		next := func(n int) []byte {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte((len(sent) + i) % 251)
			}
			return p
		}
		for {
			p := next(3000)
			n, err := from.tryWrite(p)
			sent = append(sent, p[:n]...)
			if err == unix.EAGAIN {
				break
			}
			must(t, err)
		}
		wrote := make(chan error, 1)
		last := next(more)
		go func() {
			n, err := from.write(last)
			if err == nil && n < len(last) {
				err = io.ErrShortWrite
			}
			wrote <- err
		}()
		want := append(sent, last...)
		got := make([]byte, len(want))
		_, err := io.ReadFull(streamReader{to}, got)
		must(t, err)
		must(t, <-wrote)
		if !bytes.Equal(got, want) {
			t.Errorf("with %d bytes more, other bytes came than were sent", more)
		}
	}
}

// FuzzSteps cuts a stream of records anywhere: in steps, and dozing in between, the same
// comes as was sent, and then the end.
func FuzzSteps(f *testing.F) {
	f.Add([]byte{1, 200, 3}, []byte{1, 4, 5, 30, 2}, true)
	f.Add([]byte{255, 255, 0, 255}, []byte{255, 255, 255, 7}, false)
	f.Add([]byte{}, []byte{3}, true)
	f.Fuzz(func(t *testing.T, sizes, cuts []byte, ends bool) {
		a, b := endsOf(t)
		to := recordsOn(t, b)
		var k keys
		must(t, k.start(&aes128, bytes.Repeat([]byte{1}, 32)))
		var stream, want []byte
		for i, n := range sizes[:min(len(sizes), 40)] {
			p := bytes.Repeat([]byte{byte(i + 1)}, int(n)*int(n)/4)
			want = append(want, p...)
			if len(p) > 0 {
				stream = append(stream, k.seal(make([]byte, 0, recordHeader+maxSealed), typeApplication, p)...)
			}
			if n%16 == 15 {
				stream = append(stream, k.seal(make([]byte, 0, 64), typeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 0})...)
				must(t, k.update())
			}
		}
		if ends {
			stream = append(stream, k.seal(make([]byte, 0, 64), typeAlert, []byte{1, alertCloseNotify})...)
		}
		go feed(a, stream, cuts)
		got, err := steps(to)
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes, and not the %d that were sent", len(got), len(want))
		}
		if ends && err != io.EOF || !ends && !errors.Is(err, ErrTruncated) {
			t.Errorf("ended with %v", err)
		}
		if _, rerr := to.read(make([]byte, 1)); rerr != err {
			t.Errorf("a read after %v says %v", err, rerr)
		}
	})
}

// feed writes stream in pieces, and ends it.
func feed(c *net.TCPConn, stream, cuts []byte) {
	for i := 0; len(stream) > 0; i++ {
		n := len(stream)
		if i < min(len(cuts), 200) {
			n = min(n, 1+int(cuts[i])*int(cuts[i]))
		}
		if _, err := c.Write(stream[:n]); err != nil {
			return
		}
		stream = stream[n:]
	}
	_ = c.CloseWrite()
}

// steps reads to the end as a loop does: a step for each time that the socket tells of
// something, and further ones only while the step says that there may be more.
func steps(s *records) (got []byte, err error) {
	p := make([]byte, 60<<10)
	for {
		s.open.doze()
		err = s.raw.Read(func(fd uintptr) bool {
			ask := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, _ := unix.Poll(ask[:], 0)
			return n > 0
		})
		for more := true; more && err == nil; {
			var n int
			n, more, err = s.tryRead(p)
			got = append(got, p[:n]...)
		}
		if err != nil {
			return got, err
		}
	}
}
