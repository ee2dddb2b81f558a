package direct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// ALPN names this protocol in the TLS handshake (RFC 7301).
const ALPN = "tacit/1"

// ALPNKeep names it where both sides can keep the connection: an empty record is
// the end of a direction, and when both have ended another preamble may follow.
// close_notify ends the connection, as with ALPN.
const ALPNKeep = "tacit-keep/1"

// The preambles, integers big-endian:
//
//	client: version 1 | length 2 | length bytes of TLVs: type 1, length 2, value
//	server: version 1 | status 1 | length 2 | length bytes of UTF-8: reason
//
// A client's TLV of unknown type is skipped, so that a newer client can tell
// more; a TLV that comes twice is an error.
const (
	version = 1

	tlvService = 1
	// 2 is reserved: it was a traceparent, which nobody ever sent.
	tlvSourcePod  = 3
	tlvSourcePort = 4

	clientHeader = 3
	serverHeader = 4
	// maxHello and maxReason bound what a peer can make us keep.
	maxHello  = 4096
	maxReason = 1024
)

// Hello is what the client tells before the first byte of the application.
type Hello struct {
	// Service is what the application dialled, NAMESPACE/HOSTNAME:PORT, "" if
	// it dialled a pod.
	Service string
	// SourcePod is NAMESPACE/NAME; for logs only, since nothing proves it.
	SourcePod string
	// SourcePort is the port that the client's application has, which is not the one that
	// this connection has; 0 is not told. Nothing proves it either.
	SourcePort uint16
}

// Status is the server's answer to a Hello.
type Status uint8

// The numbers are on the wire.
const (
	StatusOK           Status = 0
	StatusDenied       Status = 1
	StatusRefused      Status = 2
	StatusUnreachable  Status = 3
	StatusTimedOut     Status = 4
	StatusShuttingDown Status = 5
)

// String is the word for logs and counters.
func (s Status) String() string {
	switch s {
	case StatusOK:
		return "ok"
	case StatusDenied:
		return "denied"
	case StatusRefused:
		return "refused"
	case StatusUnreachable:
		return "unreachable"
	case StatusTimedOut:
		return "timeout"
	case StatusShuttingDown:
		return "shutting_down"
	}
	return "unknown"
}

// Reply is what the server answers after its dial to the application.
type Reply struct {
	Status Status
	// Reason is for people: the name of a policy, an errno. Cut at 1024 bytes.
	Reason string
}

// ErrPreamble says that what came is no preamble.
var ErrPreamble = errors.New("malformed preamble")

// appendHello encodes h.
func appendHello(b []byte, h Hello) ([]byte, error) {
	start := len(b)
	b = append(b, version, 0, 0)
	for _, f := range []struct {
		typ   byte
		value string
	}{{tlvService, h.Service}, {tlvSourcePod, h.SourcePod}} {
		if f.value == "" {
			continue
		}
		if len(f.value) > maxHello {
			return nil, fmt.Errorf("%w of our own: field %d has %d bytes, at most %d fit", ErrPreamble, f.typ, len(f.value), maxHello)
		}
		b = append(b, f.typ)
		b = binary.BigEndian.AppendUint16(b, uint16(len(f.value)))
		b = append(b, f.value...)
	}
	if h.SourcePort != 0 {
		b = append(b, tlvSourcePort, 0, 2)
		b = binary.BigEndian.AppendUint16(b, h.SourcePort)
	}
	n := len(b) - start - clientHeader
	if n > maxHello {
		return nil, fmt.Errorf("%w of our own: %d bytes, at most %d fit", ErrPreamble, n, maxHello)
	}
	binary.BigEndian.PutUint16(b[start+1:], uint16(n))
	return b, nil
}

// readHello reads a client's preamble, and not a byte more.
func readHello(r io.Reader) (Hello, error) {
	var head [clientHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Hello{}, fmt.Errorf("preamble of the client: %w", err)
	}
	if head[0] != version {
		return Hello{}, fmt.Errorf("%w of the client: unknown version %d", ErrPreamble, head[0])
	}
	n := binary.BigEndian.Uint16(head[1:])
	if n > maxHello {
		return Hello{}, fmt.Errorf("%w of the client: %d bytes, at most %d are taken", ErrPreamble, n, maxHello)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return Hello{}, fmt.Errorf("preamble of the client: %w", cutShort(err))
	}
	return parseFields(body)
}

func parseFields(body []byte) (Hello, error) {
	var h Hello
	var seen [256]bool
	for len(body) > 0 {
		if len(body) < 3 {
			return Hello{}, fmt.Errorf("%w of the client: %d stray bytes at its end", ErrPreamble, len(body))
		}
		typ, n := body[0], int(binary.BigEndian.Uint16(body[1:]))
		body = body[3:]
		if n > len(body) {
			return Hello{}, fmt.Errorf("%w of the client: field %d of %d bytes, %d are left", ErrPreamble, typ, n, len(body))
		}
		if seen[typ] {
			return Hello{}, fmt.Errorf("%w of the client: field %d twice", ErrPreamble, typ)
		}
		seen[typ] = true
		value := body[:n]
		body = body[n:]
		if !utf8.Valid(value) && (typ == tlvService || typ == tlvSourcePod) {
			return Hello{}, fmt.Errorf("%w of the client: field %d is not UTF-8", ErrPreamble, typ)
		}
		switch typ {
		case tlvService:
			h.Service = string(value)
		case tlvSourcePod:
			h.SourcePod = string(value)
		case tlvSourcePort:
			if n != 2 {
				return Hello{}, fmt.Errorf("%w of the client: a port of %d bytes: want 2", ErrPreamble, n)
			}
			h.SourcePort = binary.BigEndian.Uint16(value)
		}
	}
	return h, nil
}

// appendReply encodes r; a long reason is cut between two characters.
func appendReply(b []byte, r Reply) []byte {
	reason := r.Reason
	if len(reason) > maxReason {
		reason = reason[:maxReason]
		for len(reason) > 0 {
			if c, size := utf8.DecodeLastRuneInString(reason); c != utf8.RuneError || size != 1 {
				break
			}
			reason = reason[:len(reason)-1]
		}
	}
	b = append(b, version, byte(r.Status))
	b = binary.BigEndian.AppendUint16(b, uint16(len(reason)))
	return append(b, reason...)
}

// readReply reads a server's preamble, and not a byte more.
func readReply(r io.Reader) (Reply, error) {
	var head [serverHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Reply{}, fmt.Errorf("reply of the server: %w", err)
	}
	if head[0] != version {
		return Reply{}, fmt.Errorf("%w of the server: unknown version %d", ErrPreamble, head[0])
	}
	n := binary.BigEndian.Uint16(head[2:])
	if n > maxReason {
		return Reply{}, fmt.Errorf("%w of the server: reason of %d bytes, at most %d are taken", ErrPreamble, n, maxReason)
	}
	reason := make([]byte, n)
	if _, err := io.ReadFull(r, reason); err != nil {
		return Reply{}, fmt.Errorf("reply of the server: %w", cutShort(err))
	}
	if !utf8.Valid(reason) {
		return Reply{}, fmt.Errorf("%w of the server: the reason is not UTF-8", ErrPreamble)
	}
	return Reply{Status: Status(head[1]), Reason: string(reason)}, nil
}

// cutShort: an end in the middle is not an end.
func cutShort(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
