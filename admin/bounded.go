package admin

import (
	"net"
	"slices"
	"sync"
)

// mostConnections is how many connections one address of a process holds at once.
const mostConnections = 32

// bounded is a listener that holds at most mostConnections. The next one takes the
// place of the oldest: if it waited instead, whoever holds them all and says nothing
// would keep everybody else out.
type bounded struct {
	net.Listener
	// mu guards open.
	mu sync.Mutex
	// open are the connections, the oldest first.
	open []*boundedConn
}

// boundedConn is one of them.
type boundedConn struct {
	net.Conn
	l *bounded
}

func (l *bounded) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	b := &boundedConn{c, l}
	if oldest := l.add(b); oldest != nil {
		oldest.Close()
	}
	return b, nil
}

// add notes c, and returns the one that has to go for it, if any.
func (l *bounded) add(c *boundedConn) (oldest *boundedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) >= mostConnections {
		oldest = l.open[0]
	}
	l.open = append(l.open, c)
	return oldest
}

func (c *boundedConn) Close() error {
	c.l.mu.Lock()
	if i := slices.Index(c.l.open, c); i >= 0 {
		c.l.open = slices.Delete(c.l.open, i, i+1)
	}
	c.l.mu.Unlock()
	return c.Conn.Close()
}
