package lab

import (
	"bytes"
	"net/netip"
	"testing"
)

// frame is an Ethernet frame with an IPv4 TCP segment.
func frame(payload string) []byte {
	ip := []byte{0x45, 0, 0, byte(40 + len(payload)), 0, 0, 0, 0, 64, 6, 0, 0, 10, 30, 1, 2, 10, 30, 2, 2}
	tcp := []byte{0xf2, 0x30, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flagACK, 0, 0, 0, 0, 0, 0}
	f := append(make([]byte, 12), 0x08, 0x00)
	return append(append(append(f, ip...), tcp...), payload...)
}

func TestParseSegment(t *testing.T) {
	s, ok := parseSegment(frame("hello"))
	if !ok {
		t.Fatal("not a segment")
	}
	if s.source != netip.MustParseAddrPort("10.30.1.2:62000") || s.destination != netip.MustParseAddrPort("10.30.2.2:8080") ||
		string(s.payload) != "hello" || s.flags != flagACK {
		t.Errorf("got %+v", s)
	}
	full := frame("hello")
	for n := range full {
		if _, ok := parseSegment(full[:n]); ok {
			t.Errorf("a frame cut to %d of %d bytes was taken for a segment", n, len(full))
		}
	}
}

// A text is found also where it is cut in two, and nowhere else.
func TestGrep(t *testing.T) {
	key := func(port uint16) segment {
		return segment{source: netip.AddrPortFrom(control4, port), destination: netip.AddrPortFrom(control4, 80)}
	}
	for _, test := range []struct {
		name  string
		parts []string
		ports []uint16
		found bool
	}{
		{"whole", []string{"a marker here"}, []uint16{1}, true},
		{"in two", []string{"a mar", "ker here"}, []uint16{1, 1}, true},
		{"byte by byte", []string{"m", "a", "r", "k", "e", "r"}, []uint16{1, 1, 1, 1, 1, 1}, true},
		{"in two connections", []string{"a mar", "ker here"}, []uint16{1, 2}, false},
		{"with an empty one between", []string{"a mar", "", "ker"}, []uint16{1, 1, 1}, true},
		{"not", []string{"a mark", "r here"}, []uint16{1, 1}, false},
	} {
		g := &grepCheck{text: []byte("marker"), tails: map[flowKey][]byte{}}
		for i, part := range test.parts {
			s := key(test.ports[i])
			s.payload = []byte(part)
			if err := g.see(s); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := g.verdict(); (err == nil) != test.found {
			t.Errorf("%s: %v, want found %v", test.name, err, test.found)
		}
	}
}

func FuzzParseSegment(f *testing.F) {
	f.Add(frame("hello"))
	f.Fuzz(func(t *testing.T, packet []byte) {
		if s, ok := parseSegment(packet); ok && !bytes.Contains(packet, s.payload) {
			t.Errorf("a payload that is not in the packet")
		}
	})
}

// A short text is found in ciphertext now and then, and the story would say plaintext.
func TestGrepWantsMoreThanChance(t *testing.T) {
	for text, ok := range map[string]bool{"key:": false, "12345": false, "123456": true} {
		_, err := newCaptureCheck("grep", []string{text}, nil)
		if (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}
