package mesh

import (
	"fmt"
	"strconv"
	"strings"
)

// What the pods' network namespaces and both halves of a node agree on.
const (
	// OutboundPort is where captured outgoing connections arrive, in the pod.
	OutboundPort = 15101
	// InboundPort is where captured incoming connections arrive, in the pod.
	InboundPort = 15106

	// Mark (SO_MARK) is on every socket that the proxy dials with. Packets
	// that carry it are never captured again.
	Mark = 0x7ac17
	// ReplyMark leads what an application sends to the proxy, over lo: connections that it
	// opens, and its replies to a connection that the proxy opened with a foreign source
	// address. It differs from Mark, which must not be routed to lo when it leaves the pod.
	ReplyMark = 0x7ac18
	// ResetMark is on resets that the kernel itself sends, as it has no socket for what came
	// from the network. They carry nothing of an application's.
	ResetMark = 0x72c19

	// DirectPortFirst and DirectPortLast bound the source ports of direct
	// connections. Linux takes ephemeral ports from 32768-60999 by default, so
	// a source port of this range hints, and only hints, at TLS.
	DirectPortFirst = 61000
	DirectPortLast  = 65535
)

// IsDirectPort reports whether a source port hints at a direct connection.
func IsDirectPort(p uint16) bool { return p >= DirectPortFirst }

// IsCapturePort reports whether p is a port of the capture itself. A connection
// whose destination is one of them would go in circles, and is refused.
func IsCapturePort(p uint16) bool { return p == OutboundPort || p == InboundPort }

// NodePorts are the ports out of which Services get ports of nodes (NodePort). The zero
// value has none.
type NodePorts struct{ First, Last uint16 }

// ParseNodePorts reads FIRST-LAST, or nothing for none.
func ParseNodePorts(s string) (r NodePorts, err error) {
	if s == "" {
		return r, nil
	}
	first, last, _ := strings.Cut(s, "-")
	a, err1 := strconv.ParseUint(first, 10, 16)
	b, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil || a == 0 || a > b {
		return r, fmt.Errorf("ports %.80q: want FIRST-LAST, of 1 to 65535", s)
	}
	return NodePorts{uint16(a), uint16(b)}, nil
}

// Has reports whether p is one of them.
func (r NodePorts) Has(p uint16) bool { return r.First != 0 && r.First <= p && p <= r.Last }
