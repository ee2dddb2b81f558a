package proxy

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

// lineLimit is how long a connection waits for the one before it.
const lineLimit = 250 * time.Millisecond

// lines keep connections in order. An application whose connect has returned
// knows that the server has that connection, and makes the next one: the server
// accepts them in that order, and protocols with several connections rely on it
// (iperf3 --bidir takes the first for there and the second for back). Through the
// mesh, connect returns when this node's proxy has accepted. So the proxies dial in the
// order in which they accepted, and only what comes before the dial, such as the
// handshake of the receiver, is done at once.
//
//	join ──► await: those before have left, or lineLimit ──► dial ──► leave
//
// It is safe for concurrent use.
type lines struct {
	mu sync.Mutex
	// last is who stands at the end of each line that is not empty.
	last map[line]*place
}

// line tells who stands in order: connections from one address to one address
// and port.
type line struct {
	from netip.Addr
	to   netip.AddrPort
}

// place is where one connection stands. One goroutine owns it.
type place struct {
	of    *lines
	line  line
	ahead <-chan struct{} // closed when the one before has left; nil if there is none
	left  chan struct{}
	gone  bool
}

func newLines() *lines { return &lines{last: make(map[line]*place)} }

// join stands at the end of a line. The caller calls leave.
func (l *lines) join(at line) *place {
	p := &place{of: l, line: at, left: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	if before := l.last[at]; before != nil {
		p.ahead = before.left
	}
	l.last[at] = p
	return p
}

// await returns when the one before has left, after lineLimit, or when ctx ends:
// who is stuck does not hold up the others for long. Who has left does not wait.
func (p *place) await(ctx context.Context) {
	if p.ahead == nil || p.gone {
		return
	}
	select {
	case <-p.ahead:
		return
	default:
	}
	late := time.NewTimer(lineLimit)
	defer late.Stop()
	select {
	case <-p.ahead:
	case <-late.C:
	case <-ctx.Done():
	}
}

// leave lets the next one go ahead. Only the first call counts.
func (p *place) leave() {
	if p.gone {
		return
	}
	p.gone = true
	close(p.left)
	p.of.mu.Lock()
	defer p.of.mu.Unlock()
	if p.of.last[p.line] == p {
		delete(p.of.last, p.line)
	}
}
