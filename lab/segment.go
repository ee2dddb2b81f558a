package lab

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
)

// segment is one TCP segment as it was on a link.
type segment struct {
	source, destination netip.AddrPort
	flags               byte
	payload             []byte
}

const (
	flagFIN = 1 << 0
	flagSYN = 1 << 1
	flagRST = 1 << 2
	flagACK = 1 << 4
)

// parseSegment reads an Ethernet frame with TCP over IPv4 or IPv6 in it; anything
// else, and anything cut off, is not one.
func parseSegment(frame []byte) (segment, bool) {
	if len(frame) < 14 {
		return segment{}, false
	}
	switch packet := frame[14:]; binary.BigEndian.Uint16(frame[12:]) {
	case 0x0800:
		return parseIPv4(packet)
	case 0x86dd:
		return parseIPv6(packet)
	}
	return segment{}, false
}

func parseIPv4(p []byte) (segment, bool) {
	if len(p) < 20 {
		return segment{}, false
	}
	header, total := int(p[0]&0xf)*4, int(binary.BigEndian.Uint16(p[2:]))
	if total == 0 { // larger than the field can say: segmentation is left to hardware
		total = len(p)
	}
	if p[9] != 6 || header < 20 || total < header || total > len(p) {
		return segment{}, false
	}
	return parseTCP(netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[header:total])
}

func parseIPv6(p []byte) (segment, bool) {
	if len(p) < 40 || p[6] != 6 {
		return segment{}, false
	}
	total := 40 + int(binary.BigEndian.Uint16(p[4:]))
	if total == 40 {
		total = len(p)
	}
	if total > len(p) {
		return segment{}, false
	}
	return parseTCP(netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[40:total])
}

func parseTCP(source, destination netip.Addr, p []byte) (segment, bool) {
	if len(p) < 20 || int(p[12]>>4)*4 > len(p) {
		return segment{}, false
	}
	return segment{
		source:      netip.AddrPortFrom(source, binary.BigEndian.Uint16(p)),
		destination: netip.AddrPortFrom(destination, binary.BigEndian.Uint16(p[2:])),
		flags:       p[13],
		payload:     p[int(p[12]>>4)*4:],
	}, true
}

// flowKey is one direction of a connection.
type flowKey struct{ source, destination netip.AddrPort }

func (s segment) key() flowKey { return flowKey{s.source, s.destination} }

// captureCheck looks at every segment of a capture and then says what it found;
// the error says that it is not as asked.
type captureCheck interface {
	see(segment) error
	verdict() (string, error)
}

// grepCheck looks for a text in what was sent, also across segments.
type grepCheck struct {
	text  []byte
	tails map[flowKey][]byte
	found *segment
}

func (g *grepCheck) see(s segment) error {
	if g.found != nil || len(s.payload) == 0 {
		return nil
	}
	seen := append(g.tails[s.key()], s.payload...)
	if bytes.Contains(seen, g.text) {
		g.found = &segment{source: s.source, destination: s.destination}
	}
	g.tails[s.key()] = bytes.Clone(seen[max(0, len(seen)-len(g.text)+1):])
	return nil
}

func (g *grepCheck) verdict() (string, error) {
	if g.found == nil {
		return "", fmt.Errorf("%q was not on the wire", g.text)
	}
	return fmt.Sprintf("%q was on the wire, from %s to %s", g.text, g.found.source, g.found.destination), nil
}

// between are the addresses of two pods: client and server.
type between struct{ client, server []netip.Addr }

// toServer reports whether s goes from client to server, or back.
func (b between) toServer(s segment) (toServer, any bool) {
	switch {
	case slices.Contains(b.client, s.source.Addr()) && slices.Contains(b.server, s.destination.Addr()):
		return true, true
	case slices.Contains(b.server, s.source.Addr()) && slices.Contains(b.client, s.destination.Addr()):
		return false, true
	}
	return false, false
}

// addressesOf resolves pods, nodes (node/NAME) or addresses.
func (c *Cluster) addressesOf(name string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a}, nil
	}
	at, err := c.place(name)
	switch {
	case err != nil:
		return nil, err
	case at.pod != nil:
		return at.pod.address.list(), nil
	case at.node != nil:
		return nodeAddress(at.node.number).list(), nil
	}
	return []netip.Addr{control4, control6}, nil
}

// portsCheck: every segment between the two has one of these ports at the server,
// and there is one.
type portsCheck struct {
	between
	ports []uint16
	seen  int
	wrong *segment
}

func (p *portsCheck) see(s segment) error {
	toServer, any := p.toServer(s)
	if !any || p.wrong != nil {
		return nil
	}
	p.seen++
	port := s.source.Port()
	if toServer {
		port = s.destination.Port()
	}
	if !slices.Contains(p.ports, port) {
		p.wrong = &segment{source: s.source, destination: s.destination}
	}
	return nil
}

func (p *portsCheck) verdict() (string, error) {
	if p.wrong != nil {
		return "", fmt.Errorf("a segment from %s to %s has none of the ports %v", p.wrong.source, p.wrong.destination, p.ports)
	}
	if p.seen == 0 {
		return "", fmt.Errorf("no segment passed between the two")
	}
	return fmt.Sprintf("%d segments, all with one of the ports %v", p.seen, p.ports), nil
}

// countCheck counts segments between the two.
type countCheck struct {
	between
	segments, bytes int
}

func (k *countCheck) see(s segment) error {
	if _, any := k.toServer(s); any {
		k.segments++
		k.bytes += len(s.payload)
	}
	return nil
}

func (k *countCheck) verdict() (string, error) {
	if k.segments == 0 {
		return "", fmt.Errorf("no segment passed between the two")
	}
	return fmt.Sprintf("%d segments, %d bytes", k.segments, k.bytes), nil
}

// tlsCheck: every connection between the two begins with a TLS handshake record, in
// both directions, and there is one. Connections whose beginning was not recorded
// do not count.
type tlsCheck struct {
	between
	first map[flowKey]byte
	plain *flowKey
	flows int
}

const handshakeRecord = 0x16

func (t *tlsCheck) see(s segment) error {
	if _, any := t.toServer(s); !any {
		return nil
	}
	if s.flags&flagSYN != 0 {
		t.first[s.key()] = 0
		return nil
	}
	first, fresh := t.first[s.key()]
	if !fresh || first != 0 || len(s.payload) == 0 {
		return nil
	}
	t.first[s.key()] = s.payload[0] | 1
	t.flows++
	if len(s.payload) < 3 || s.payload[0] != handshakeRecord || s.payload[1] != 3 {
		key := s.key()
		t.plain = &key
	}
	return nil
}

func (t *tlsCheck) verdict() (string, error) {
	if t.plain != nil {
		return "", fmt.Errorf("from %s to %s it began without TLS", t.plain.source, t.plain.destination)
	}
	if t.flows == 0 {
		return "", fmt.Errorf("nothing was sent between the two")
	}
	return fmt.Sprintf("%d directions, all began with a TLS handshake", t.flows), nil
}
