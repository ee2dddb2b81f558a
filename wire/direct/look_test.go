package direct

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"
)

// clientHello is what crypto/tls really sends.
func clientHello(t testing.TB, cfg *tls.Config) []byte {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go func() { _ = tls.Client(a, cfg).Handshake() }()
	buf := make([]byte, 8192)
	n, err := b.Read(buf)
	must(t, err)
	return buf[:n]
}

func hellos(t testing.TB) (ours, other []byte) {
	ours = clientHello(t, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", ALPN}})
	other = clientHello(t, &tls.Config{ServerName: "example.com", NextProtos: []string{"h2", "tacit/10", "xtacit/1"}})
	return ours, other
}

func TestHelloKind(t *testing.T) {
	ours, other := hellos(t)
	none := clientHello(t, &tls.Config{ServerName: "example.com"})
	big := append([]byte(nil), ours...)
	big[6] = 1 // a message longer than its record
	rows := []struct {
		name string
		b    []byte
		want Kind
	}{
		{"nothing", nil, KindQuiet},
		{"ours", ours, KindDirect},
		{"ours and more", append(ours[:len(ours):len(ours)], 1, 2, 3), KindDirect},
		{"another ALPN", other, KindOtherTLS},
		{"no ALPN", none, KindOtherTLS},
		{"small", smallHello(ALPN), KindDirect},
		{"small other", smallHello("h2"), KindOtherTLS},
		{"HTTP", []byte("GET / HTTP/1.1\r\n"), KindPlain},
		{"one byte of HTTP", []byte("G"), KindPlain},
		{"one byte of TLS", []byte{22}, KindQuiet},
		{"TLS, no ClientHello", []byte{22, 3, 1, 0, 100, 2}, KindPlain},
		{"application data", []byte{23, 3, 3, 0, 100, 2}, KindPlain},
		{"record of no length", []byte{22, 3, 1, 0, 0, 1, 0, 0, 4}, KindPlain},
		{"record too long", []byte{22, 3, 1, 0xff, 0xff, 1, 0, 0, 4}, KindPlain},
		{"hello in two records", []byte{22, 3, 1, 0, 100, 1, 0, 1, 0}, KindOtherTLS},
		{"hello of 64 KiB", big[:9], KindPlain},
	}
	for _, r := range rows {
		if got := helloKind(r.b); got != r.want {
			t.Errorf("%s: %v, want %v", r.name, got, r.want)
		}
	}
	for n := range ours {
		if got := helloKind(ours[:n]); got != KindQuiet {
			t.Fatalf("%d of %d bytes of our ClientHello: %v, want %v", n, len(ours), got, KindQuiet)
		}
	}
}

// The look decides as soon as it can, whatever pieces the bytes come in, and
// leaves all of them to be read.
func TestLook(t *testing.T) {
	w := newWorld(t)
	ours, other := hellos(t)
	rows := []struct {
		name   string
		pieces [][]byte
		want   Kind
	}{
		{"ours", [][]byte{ours}, KindDirect},
		{"ours in three", [][]byte{ours[:1], ours[1:700], ours[700:]}, KindDirect},
		{"another's", [][]byte{other}, KindOtherTLS},
		{"text", [][]byte{[]byte("hello")}, KindPlain},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			c, s := w.sockets(t)
			must(t, c.SetNoDelay(true))
			kind := make(chan Kind, 1)
			go func() {
				k, err := Look(soon(t), s, 10*time.Second)
				if err != nil {
					t.Error(err)
				}
				kind <- k
			}()
			sent := 0
			for _, p := range r.pieces {
				n, err := c.Write(p)
				must(t, err)
				sent += n
			}
			if got := <-kind; got != r.want {
				t.Errorf("%v, want %v", got, r.want)
			}
			n, err := s.Read(make([]byte, 1))
			if n != 1 || err != nil {
				t.Errorf("after the look: read %d, %v", n, err)
			}
		})
	}
}

func TestLookEnds(t *testing.T) {
	w := newWorld(t)
	c, s := w.sockets(t)
	if k, err := Look(soon(t), s, time.Millisecond); k != KindQuiet || err != nil {
		t.Errorf("silence: %v, %v", k, err)
	}
	_, err := c.Write([]byte{22, 3, 1})
	must(t, err)
	if k, err := Look(soon(t), s, time.Millisecond); k != KindQuiet || err != nil {
		t.Errorf("the start of a ClientHello: %v, %v", k, err)
	}
	ctx, cancel := context.WithCancel(soon(t))
	cancel()
	if _, err := Look(ctx, s, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	c, s = w.sockets(t)
	must(t, c.CloseWrite())
	if k, err := Look(soon(t), s, time.Minute); k != KindPlain || err != nil {
		t.Errorf("FIN: %v, %v", k, err)
	}
	c, s = w.sockets(t)
	_, err = c.Write([]byte{22, 3, 1})
	must(t, errors.Join(err, c.CloseWrite()))
	if k, err := Look(soon(t), s, time.Minute); k != KindPlain || err != nil {
		t.Errorf("the start of a ClientHello and FIN: %v, %v", k, err)
	}
	c, s = w.sockets(t)
	_, err = c.Write([]byte{22, 3, 1})
	must(t, errors.Join(err, c.SetLinger(0), c.Close()))
	if _, err := Look(soon(t), s, 0); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the start of a ClientHello and RST: %v", err)
	}
	c, s = w.sockets(t)
	must(t, c.SetLinger(0))
	must(t, c.Close())
	if _, err := Look(soon(t), s, time.Minute); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("RST: %v", err)
	}
}

// smallHello is a ClientHello with nothing but a protocol: always the same bytes,
// which a fuzzer needs for its seeds.
func smallHello(protocol string) []byte {
	b := []byte{typeHandshake, 3, 1, 0, 0, msgClientHello, 0, 0, 0, 3, 3}
	b = append(b, make([]byte, 32)...)       // random
	b = append(b, 0, 0, 2, 0x13, 0x01, 1, 0) // session, suites, compression
	b = append(b, 0, byte(7+len(protocol)), 0, extALPN, 0, byte(3+len(protocol)), 0, byte(1+len(protocol)), byte(len(protocol)))
	b = append(b, protocol...)
	b[4], b[8] = byte(len(b)-5), byte(len(b)-9)
	return b
}

func FuzzHelloKind(f *testing.F) {
	f.Add(smallHello(ALPN))
	f.Add(smallHello("h2"))
	f.Add(smallHello(ALPN)[:20])
	f.Fuzz(func(t *testing.T, b []byte) {
		kind := helloKind(b)
		if kind == KindQuiet {
			if len(b) > maxPlain+recordHeader {
				t.Errorf("undecided after %d bytes", len(b))
			}
			return
		}
		// What is decided stays so when more comes.
		if again := helloKind(append(b[:len(b):len(b)], 22, 3, 1, 0)); again != kind {
			t.Errorf("%v, with more bytes %v", kind, again)
		}
	})
}
