package proxy

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// KeepAlive says when a quiet connection is asked whether its other end is there, and when it
// counts as gone. What is 0 is as the pod's kernel has it (net.ipv4.tcp_keepalive_time,
// tcp_keepalive_intvl and tcp_keepalive_probes: 2 h, 75 s and 9, if nobody has changed them).
type KeepAlive struct {
	Idle, Interval time.Duration
	Probes         int
}

// kernelAlive is Linux's own.
var kernelAlive = KeepAlive{Idle: 2 * time.Hour, Interval: 75 * time.Second, Probes: 9}

// aliveAge is for how long what the pod's kernel has is taken for granted. The settings
// of a pod are written after its network was made, before its application begins.
const aliveAge = 10 * time.Second

// alive is what was found at a time. It is not changed.
type alive struct {
	at time.Time
	KeepAlive
}

// aliveAfter is how old a connection is when it gets what the pod has for keepalive. Package net
// gives every socket values of its own, 15 s and 9 probes, of which nothing but others gets rid: a connection
// whose applications would wait for each other would be cut after 150 s. Most connections
// are over before any of it matters, and are spared the calls.
const aliveAfter = 3 * time.Second

// keepAlive gives c what the connections of the pod have now. An error means that
// c is over, which its user is told by the next call.
func (d *pod) keepAlive(c *net.TCPConn) {
	now := d.aliveNow()
	_ = c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: now.Idle, Interval: now.Interval, Count: now.Probes})
}

// aliveNow is what the connections of the pod have now.
func (d *pod) aliveNow() KeepAlive {
	now := d.alive.Load()
	if now == nil || time.Since(now.at) > aliveAge {
		now = &alive{time.Now(), d.p.cfg.KeepAlive.or(d.kernelAlive())}
		d.alive.Store(now)
	}
	return now.KeepAlive
}

// or is k, and where that says nothing, other.
func (k KeepAlive) or(other KeepAlive) KeepAlive {
	return KeepAlive{orDefault(k.Idle, other.Idle), orDefault(k.Interval, other.Interval), orDefault(k.Probes, other.Probes)}
}

// kernelAlive is what a socket of the pod has for which nobody has chosen, as its listeners.
func (d *pod) kernelAlive() KeepAlive {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.listeners {
		if k, err := l.alive(); err == nil {
			return k
		}
	}
	if had := d.alive.Load(); had != nil { // they were yielded
		return had.KeepAlive
	}
	return kernelAlive
}

func (l *listener) alive() (k KeepAlive, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return k, err
	}
	seconds := func(fd uintptr, option int) time.Duration {
		var n int
		if err == nil {
			n, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option)
		}
		return time.Duration(n) * time.Second
	}
	cerr := raw.Control(func(fd uintptr) {
		k = KeepAlive{seconds(fd, unix.TCP_KEEPIDLE), seconds(fd, unix.TCP_KEEPINTVL), int(seconds(fd, unix.TCP_KEEPCNT) / time.Second)}
	})
	if err == nil {
		err = cerr
	}
	return k, err
}
