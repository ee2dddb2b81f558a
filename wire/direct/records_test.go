package direct

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The vectors are those of RFC 8448 §3: simple 1-RTT handshake.
func TestKeySchedule(t *testing.T) {
	secret := unhex(t, "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
	key, err := aes128.expand(secret, "key", 16)
	must(t, err)
	iv, err := aes128.expand(secret, "iv", 12)
	must(t, err)
	if diff := cmp.Diff(map[string]string{
		"key": "9f02283b6c9c07efc26bb9f2ac92e356",
		"iv":  "cf782b88dd83549aadf1e984",
	}, map[string]string{"key": hex.EncodeToString(key), "iv": hex.EncodeToString(iv)}); diff != "" {
		t.Error(diff)
	}
}

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(s)
	must(t, err)
	return b
}

func TestSuites(t *testing.T) {
	for _, id := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384} {
		var a, b keys
		st := suiteOf(id)
		secret := bytes.Repeat([]byte{7}, st.hash().Size())
		must(t, a.start(st, bytes.Clone(secret)))
		must(t, b.start(st, bytes.Clone(secret)))
		for range 3 { // generations
			for _, n := range []int{0, 1, 100, maxPlain} {
				p := random(uint64(n), n)
				record := a.seal(make([]byte, 0, recordHeader+maxSealed), 23, p)
				if len(record) != n+overhead {
					t.Fatalf("record of %d bytes for %d", len(record), n)
				}
				got, typ, err := b.open(make([]byte, 0, recordHeader+maxSealed), record)
				if err != nil || typ != 23 || !bytes.Equal(got, p) {
					t.Fatalf("%d bytes: type %d, %v", n, typ, err)
				}
			}
			must(t, a.update())
			must(t, b.update())
		}
	}
	if suiteOf(tls.TLS_CHACHA20_POLY1305_SHA256) != nil {
		t.Error("ChaCha20 is crypto/tls's")
	}
}

// Padding is taken away, and a record of nothing but padding is refused.
func TestPadding(t *testing.T) {
	rows := []struct {
		name, inner, want string
		typ               byte
		ok                bool
	}{
		{"none", "abc\x17", "abc", 23, true},
		{"some", "abc\x17\x00\x00", "abc", 23, true},
		{"zeros of the application", "a\x00\x00\x17\x00", "a\x00\x00", 23, true},
		{"nothing else", "\x00\x00\x00", "", 0, false},
		{"empty", "", "", 0, false},
	}
	for _, r := range rows {
		var a, b keys
		secret := bytes.Repeat([]byte{7}, 32)
		must(t, a.start(&aes128, bytes.Clone(secret)))
		must(t, b.start(&aes128, bytes.Clone(secret)))
		n := len(r.inner) + 16
		record := []byte{23, 3, 3, byte(n >> 8), byte(n)}
		record = a.cipher().Seal(record, a.next(), []byte(r.inner), record)
		got, typ, err := b.open(make([]byte, 0, 100), record)
		if (err == nil) != r.ok || string(got) != r.want || typ != r.typ {
			t.Errorf("%s: %q, type %d, %v", r.name, got, typ, err)
		}
	}
}

func TestSealedBy(t *testing.T) {
	var hs, app keys
	must(t, hs.start(&aes128, bytes.Repeat([]byte{1}, 32)))
	must(t, app.start(&aes128, bytes.Repeat([]byte{2}, 32)))
	fresh := app
	out := []byte{22, 3, 3, 0, 2, 9, 9, 20, 3, 3, 0, 1, 1} // ServerHello, CCS
	for range 4 {
		out = append(out, hs.seal(make([]byte, 0, 100), typeHandshake, []byte("flight"))...)
	}
	for want := range uint64(3) {
		if got := sealedBy(fresh, out); got != want {
			t.Errorf("%d tickets: counted %d", want, got)
		}
		out = append(out, app.seal(make([]byte, 0, 100), typeHandshake, []byte("ticket"))...)
	}
}

// FuzzRecords feeds bytes, as ciphertext and as content of good records, to
// the reading side.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("hello"), byte(23), false, false)
	f.Add([]byte{}, byte(23), false, true)
	f.Add([]byte{24, 0, 0, 1, 1}, byte(22), false, true)
	f.Add([]byte{4, 0, 0, 2, 1, 1}, byte(22), false, false)
	f.Add([]byte{1, 0}, byte(21), false, true)
	f.Add([]byte{23, 3, 3, 0, 20, 1, 2, 3}, byte(0), true, false)
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(f, err)
	f.Cleanup(func() { l.Close() })
	f.Fuzz(func(t *testing.T, b []byte, typ byte, raw, keeps bool) {
		c, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
		must(t, err)
		defer c.Close()
		s, err := l.AcceptTCP()
		must(t, err)
		defer s.Close()
		rc, err := s.SyscallConn()
		must(t, err)
		var in inbox
		in.bind(rc)
		r := &records{c: s, raw: rc, in: &in, keeps: keeps, rekey: rekeyAfter, answer: new(atomic.Bool)}
		must(t, r.open.start(&aes128, bytes.Repeat([]byte{1}, 32)))
		var k keys
		must(t, k.start(&aes128, bytes.Repeat([]byte{1}, 32)))
		sent := b
		if !raw {
			b = b[:min(len(b), maxPlain)]
			sent = k.seal(make([]byte, 0, recordHeader+maxSealed), typ, b)
			b, typ = content(b, typ)
		}
		must(t, c.SetWriteBuffer(1<<20))
		go func() { _, _ = c.Write(sent); _ = c.CloseWrite() }()
		got, err := io.ReadAll(struct{ io.Reader }{streamReader{r}})
		ended := typ == typeAlert || keeps && typ == typeApplication && len(b) == 0
		if err == nil && (raw || !ended) {
			t.Errorf("an orderly end after type %d, %x", typ, b)
		}
		if !raw && typ == typeApplication && !bytes.Equal(got, b) {
			t.Errorf("got %x, want %x", got, b)
		}
		if len(got) > 0 && (raw || typ != typeApplication) {
			t.Errorf("type %d gave %x", typ, got)
		}
	})
}

// content is what RFC 8446 §5.2 makes of b, type typ: zeros at the end are padding, also
// where they stand for the type.
func content(b []byte, typ byte) ([]byte, byte) {
	if typ != 0 {
		return b, typ
	}
	b = bytes.TrimRight(b, "\x00")
	if len(b) == 0 {
		return nil, 0
	}
	return b[:len(b)-1], b[len(b)-1]
}
