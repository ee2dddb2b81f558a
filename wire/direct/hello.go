package direct

import "encoding/binary"

// The parts of a TLS record and of a ClientHello that the look needs
// (RFC 8446 §4.1.2, §5.1; RFC 7301 §3.1).
const (
	recordHeader    = 5
	typeAlert       = 21
	typeHandshake   = 22
	typeApplication = 23

	msgClientHello = 1
	extALPN        = 16
)

// helloKind tells what b, the first bytes of a stream, is the start of.
// KindQuiet means that more bytes are needed; it comes back only while b may
// still become a ClientHello, and never for more than maxPlain+recordHeader bytes.
func helloKind(b []byte) Kind {
	if !helloPrefix(b) {
		return KindPlain
	}
	if len(b) < recordHeader+4 {
		return KindQuiet
	}
	record := int(binary.BigEndian.Uint16(b[3:]))
	message := int(b[6])<<16 | int(b[7])<<8 | int(b[8])
	if record < 4 || record > maxPlain {
		return KindPlain
	}
	if message+4 > record {
		// A ClientHello in several records: nothing forbids it, ours is never so.
		return KindOtherTLS
	}
	if len(b) < recordHeader+4+message {
		return KindQuiet
	}
	if helloOffers(b[recordHeader+4:recordHeader+4+message], ALPN) {
		return KindDirect
	}
	return KindOtherTLS
}

// helloPrefix reports whether b can be the start of a record with a ClientHello.
func helloPrefix(b []byte) bool {
	want := [...]int{0: typeHandshake, 1: 3, 5: msgClientHello, 6: 0}
	for i, c := range b {
		switch i {
		case 0, 1, 5, 6:
			if int(c) != want[i] {
				return false
			}
		case 2:
			if c > 4 {
				return false
			}
		case 7:
			return true
		}
	}
	return true
}

// helloOffers reports whether the body of a ClientHello offers a protocol. A
// body that makes no sense offers nothing.
func helloOffers(body []byte, protocol string) bool {
	s := text(body)
	var sessionID, suites, compression, extensions text
	if !s.skip(2+32) || !s.prefixed8(&sessionID) || !s.prefixed16(&suites) ||
		!s.prefixed8(&compression) || !s.prefixed16(&extensions) {
		return false
	}
	for len(extensions) > 0 {
		var typ uint16
		var data, list text
		if !extensions.uint16(&typ) || !extensions.prefixed16(&data) {
			return false
		}
		if typ != extALPN {
			continue
		}
		if !data.prefixed16(&list) {
			return false
		}
		for len(list) > 0 {
			var name text
			if !list.prefixed8(&name) {
				return false
			}
			if string(name) == protocol {
				return true
			}
		}
		return false
	}
	return false
}

// text is bytes still to be read; each method takes from its front, or reports
// false and leaves it in an undefined state.
type text []byte

func (t *text) skip(n int) bool {
	if len(*t) < n {
		return false
	}
	*t = (*t)[n:]
	return true
}

func (t *text) uint16(v *uint16) bool {
	if len(*t) < 2 {
		return false
	}
	*v = binary.BigEndian.Uint16(*t)
	return t.skip(2)
}

func (t *text) prefixed8(out *text) bool {
	if len(*t) < 1 {
		return false
	}
	n := int((*t)[0])
	return t.skip(1) && t.take(n, out)
}

func (t *text) prefixed16(out *text) bool {
	var n uint16
	return t.uint16(&n) && t.take(int(n), out)
}

func (t *text) take(n int, out *text) bool {
	if len(*t) < n {
		return false
	}
	*out = (*t)[:n]
	return t.skip(n)
}
