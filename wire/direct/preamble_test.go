package direct

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"
)

func TestHelloRoundTrip(t *testing.T) {
	for _, h := range []Hello{
		{},
		{Service: "default/db.default.svc.cluster.local:5432"},
		{Service: "a/b:1", SourcePod: "default/client-0"},
		{SourcePort: 20},
		{Service: "a/b:1", SourcePort: 65535},
	} {
		b, err := appendHello([]byte("before"), h)
		must(t, err)
		r := bytes.NewReader(append(b[len("before"):], "after"...))
		got, err := readHello(iotest.OneByteReader(r))
		if err != nil || got != h {
			t.Errorf("%+v: got %+v, %v", h, got, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != "after" {
			t.Errorf("%+v: %q was left", h, rest)
		}
	}
	for _, n := range []int{maxHello - 3, maxHello, 70000} {
		_, err := appendHello(nil, Hello{Service: strings.Repeat("x", n)})
		if (err == nil) != (n == maxHello-3) {
			t.Errorf("service of %d bytes: %v", n, err)
		}
	}
}

func TestHelloErrors(t *testing.T) {
	rows := []struct{ name, b string }{
		{"nothing", ""},
		{"cut header", "\x01\x00"},
		{"other version", "\x02\x00\x00"},
		{"cut body", "\x01\x00\x05\x01\x00\x02a"},
		{"field too long", "\x01\x00\x04\x01\x00\x02a"},
		{"stray bytes", "\x01\x00\x02\x01\x00"},
		{"field twice", "\x01\x00\x08\x01\x00\x01a\x01\x00\x01b"},
		{"not UTF-8", "\x01\x00\x04\x01\x00\x01\xff"},
		{"too long", "\x01\xff\xff"},
		{"port of one byte", "\x01\x00\x04\x04\x00\x01\x14"},
		{"port of three bytes", "\x01\x00\x06\x04\x00\x03\x00\x00\x14"},
		{"port twice", "\x01\x00\x0a\x04\x00\x02\x00\x14\x04\x00\x02\x00\x14"},
	}
	for _, r := range rows {
		if h, err := readHello(strings.NewReader(r.b)); err == nil {
			t.Errorf("%s: got %+v", r.name, h)
		}
	}
	for _, typ := range []string{"\x63", "\x02"} { // unknown, reserved
		h, err := readHello(strings.NewReader("\x01\x00\x08" + typ + "\x00\x01\xff\x01\x00\x01a"))
		if err != nil || h != (Hello{Service: "a"}) {
			t.Errorf("field %q: %+v, %v: want it skipped", typ, h, err)
		}
	}
}

func TestReplyReason(t *testing.T) {
	rows := []struct{ reason, want string }{
		{"", ""},
		{"connection refused", "connection refused"},
		{strings.Repeat("x", maxReason+5), strings.Repeat("x", maxReason)},
		{strings.Repeat("x", maxReason-1) + "é", strings.Repeat("x", maxReason-1)},
	}
	for _, r := range rows {
		got, err := readReply(bytes.NewReader(appendReply(nil, Reply{StatusRefused, r.reason})))
		if err != nil || got != (Reply{StatusRefused, r.want}) {
			t.Errorf("%q: got %+v, %v", r.reason, got, err)
		}
	}
	for _, b := range []string{"", "\x01\x00\x00", "\x02\x00\x00\x00", "\x01\x00\xff\xff", "\x01\x00\x00\x02a", "\x01\x00\x00\x01\xff"} {
		if r, err := readReply(strings.NewReader(b)); err == nil {
			t.Errorf("%q: got %+v", b, r)
		}
	}
}

func FuzzHello(f *testing.F) {
	b, _ := appendHello(nil, Hello{Service: "a/b:1", SourcePod: "p", SourcePort: 20})
	f.Add(b)
	f.Add([]byte("\x01\x00\x05\x04\x00\x02\x00\x00"))
	f.Add([]byte("\x01\x00\x04\x04\x00\x01\x14"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHello(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := appendHello(nil, h)
		if err != nil {
			t.Fatalf("%+v was read and cannot be written: %v", h, err)
		}
		if got, err := readHello(bytes.NewReader(again)); err != nil || got != h {
			t.Errorf("%+v became %+v, %v", h, got, err)
		}
	})
}

func FuzzReply(f *testing.F) {
	f.Add(appendReply(nil, Reply{StatusDenied, "policy default/deny"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readReply(bytes.NewReader(b))
		if err != nil {
			return
		}
		if !utf8.ValidString(r.Reason) || len(r.Reason) > maxReason {
			t.Errorf("reason %q", r.Reason)
		}
		if again := appendReply(nil, r); !bytes.HasPrefix(b, again) {
			t.Errorf("%q was read as %+v, which is %q", b, r, again)
		}
	})
}
