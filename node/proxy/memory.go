package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"tacit.dev/pause"
	"tacit.dev/relay"
)

const (
	// unsentMost is how many bytes a socket takes that it cannot send yet, because the other
	// end reads slowly or not at all. It does not bound what is on its way, so a long
	// way is as fast as without it. Two writes of relay's fit in: who may write at all seldom blocks.
	unsentMost = 512 << 10
	// buffersOf is what a connection with bytes that wait may hold besides, in buffers of the process.
	buffersOf = 2 * relay.BufferSize
	// queuedDefault is Config.MaxQueued.
	queuedDefault = 640 << 20
	// queuedTick is how often is looked what waits. It takes a fiftieth of the time if it can. What it
	// took is no measure on a busy machine: after queuedPause it is looked in any case.
	queuedTick, queuedShare, queuedPause = 250 * time.Millisecond, 50, time.Second
	// brokenLooks is at how many looks one end may have been reset.
	brokenLooks = 4
)

var (
	errMemoryLimit = errors.New("its bytes waited while too many did (--max-queued)")
	errBroken      = errors.New("one end reset it while the other one did not read")
)

// boundUnsent sets unsentMost on a socket, or on a listener for those that it accepts. Without it each
// connection whose other end has stopped reading would hold up to net.ipv4.tcp_wmem (4 MiB).
// What waits unread is bounded by the agent: that takes a right that the proxy has not.
func boundUnsent(fd int) error {
	err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentMost)
	return os.NewSyscallError("setsockopt TCP_NOTSENT_LOWAT", err)
}

// queued is what waits in the sockets of one connection.
type queued struct {
	d    *pod
	near *net.TCPConn
	// far is set once, when it is there.
	far  atomic.Pointer[net.TCPConn]
	born time.Time
	// peer is who has proved to be at the other end, nil for nobody.
	peer atomic.Pointer[peerConn]
	// passage is set once, when near and far are joined.
	passage atomic.Pointer[relay.Passage]
	// bytes are those of the last look, broken is at how many looks an end had been reset, and alive
	// are the ends that have what the pod has for keepalive. They belong to who looks.
	bytes  int64
	broken int
	alive  [2]*net.TCPConn
	// cut is why it was reset, nil if it was not.
	cut atomic.Pointer[refusal]

	mu   sync.Mutex
	over bool // guarded by mu
}

// queues are all connections of a proxy, and bound what waits in them. TCP has each end send
// what the other one's host takes, and that host is us: when an application does not read,
// its bytes wait here, in the sockets. Even a reset is not noticed then: nobody reads on from a connection
// whose bytes are not taken, so look does. The kernel charges them to the proxy's memory limit, at which
// it would end the proxy with all connections of the node. So before that the largest of the pod that
// holds most is reset, and then the next one: no pod is in another's way. It is safe for concurrent use.
type queues struct {
	most int64
	log  *slog.Logger
	// overdue resets a connection that may not go on at that time.
	overdue func(*queued, time.Time)
	// now is what waited at the last look.
	now  atomic.Int64
	cuts prometheus.Counter

	mu  sync.Mutex
	all map[*queued]struct{} // guarded by mu
	// scratch belongs to who looks.
	scratch []*queued
}

func newQueues(reg prometheus.Registerer, most int64, log *slog.Logger) *queues {
	q := &queues{most: most, log: log, overdue: func(*queued, time.Time) {}, all: make(map[*queued]struct{}), cuts: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_queued_resets_total", Help: "Connections that were reset because too many bytes waited in the sockets of all.",
	})}
	reg.MustRegister(q.cuts, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tacit_queued_bytes", Help: "Memory of bytes that wait in sockets and buffers of connections, because an end reads slowly or not at all.",
	}, func() float64 { return float64(q.now.Load()) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tacit_queued_limit_bytes", Help: "Most memory of bytes that wait, above which the largest connections of the pod that holds most are reset.",
	}, func() float64 { return float64(most) }))
	return q
}

// join has a connection looked at until leave.
func (q *queues) join(d *pod, near *net.TCPConn) *queued {
	c := &queued{d: d, near: near, born: time.Now()}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all[c] = struct{}{}
	return c
}

func (q *queues) leave(c *queued) {
	c.end()
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.all, c)
}

// reach notes the connection's other end.
func (c *queued) reach(far relay.Conn) {
	if f, ok := far.(interface{ Raw() *net.TCPConn }); ok {
		c.far.Store(f.Raw())
	}
}

// carriedBy notes what carries the connection. It may have been reset just before.
func (c *queued) carriedBy(p *relay.Passage) {
	c.passage.Store(p)
	if why := c.cut.Load(); why != nil {
		p.Cancel(why)
	}
}

// tend looks until ctx ends.
func (q *queues) tend(ctx context.Context) error {
	for wait := queuedTick; pause.For(ctx, wait); {
		began := time.Now()
		q.look()
		wait = min(max(queuedTick, queuedShare*time.Since(began)), queuedPause)
	}
	return nil
}

// look adds up what waits, and resets what is too much.
func (q *queues) look() {
	q.scratch = q.list(q.scratch[:0])
	now := time.Now()
	sum, old := int64(0), now.Add(-aliveAfter)
	for _, c := range q.scratch {
		if c.born.Before(old) {
			c.keepAlive()
		}
		q.overdue(c, now)
		before := c.bytes
		c.bytes = c.memory()
		sum += c.bytes
		if c.isBroken(before) {
			c.reset(&refusal{reasonReset, flagDownstreamReset, errBroken})
		}
	}
	q.now.Store(sum)
	if sum > q.most {
		q.cut(excess(q.scratch, sum-q.most))
	}
	clear(q.scratch)
}

// keepAlive gives each end what the pod has, once.
func (c *queued) keepAlive() {
	for i, end := range [2]*net.TCPConn{c.near, c.far.Load()} {
		if end != nil && c.alive[i] != end {
			c.d.keepAlive(end)
			c.alive[i] = end
		}
	}
}

// list appends the connections of now.
func (q *queues) list(to []*queued) []*queued {
	q.mu.Lock()
	defer q.mu.Unlock()
	for c := range q.all {
		to = append(to, c)
	}
	return to
}

// cut resets connections.
func (q *queues) cut(all []*queued) {
	for _, c := range all {
		c.reset(&refusal{reasonMemoryLimit, flagOverload, errMemoryLimit})
		q.cuts.Inc()
	}
	q.log.Warn("connections reset, too many bytes waited", "connections", len(all), "limit", q.most)
}

// reset ends both ends, unless the connection is over: then its sockets may be another's. Neither lingers.
// It reports false where that was so, or it was reset before.
func (c *queued) reset(why *refusal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || !c.cut.CompareAndSwap(nil, why) {
		return false
	}
	if p := c.passage.Load(); p != nil {
		p.Cancel(why)
		return true
	}
	c.near.Close()
	if far := c.far.Load(); far != nil {
		far.Close()
	}
	return true
}

// end has nobody reset the connection any more.
func (c *queued) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
}

// isBroken reports whether one end has been reset for brokenLooks, while the same bytes waited: what
// was said before the reset is still passed on for as long as somebody takes it.
func (c *queued) isBroken(before int64) bool {
	if c.bytes == 0 || c.bytes != before || !hasFailed(c.near) && !hasFailed(c.far.Load()) {
		c.broken = 0
		return false
	}
	c.broken++
	return c.broken > brokenLooks
}

// hasFailed reports whether a socket has an error of which nobody has been told.
func hasFailed(c *net.TCPConn) (failed bool) {
	if c == nil {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		p := [1]unix.PollFd{{Fd: int32(fd)}} // POLLERR is always asked for
		n, err := unix.Poll(p[:], 0)
		failed = err == nil && n > 0 && p[0].Revents&unix.POLLERR != 0
	})
	return failed
}

// excess are the connections without which at least that many bytes less wait: one after the other
// the largest one of the pod that then holds most.
func excess(all []*queued, bytes int64) (out []*queued) {
	of := make(map[*pod][]*queued)
	held := make(map[*pod]int64)
	for _, c := range all {
		of[c.d] = append(of[c.d], c)
		held[c.d] += c.bytes
	}
	for _, cs := range of {
		slices.SortFunc(cs, func(a, b *queued) int { return int(a.bytes - b.bytes) })
	}
	for bytes > 0 {
		var most *pod
		for d, n := range held {
			if most == nil || n > held[most] {
				most = d
			}
		}
		last := len(of[most]) - 1
		c := of[most][last]
		of[most], held[most] = of[most][:last], held[most]-c.bytes
		out, bytes = append(out, c), bytes-c.bytes
	}
	return out
}

// memory is what waits in both sockets, and with it in buffers of ours.
func (c *queued) memory() int64 {
	n := socketMemory(c.near) + socketMemory(c.far.Load())
	if n > 0 {
		n += buffersOf
	}
	return n
}

// socketMemory is the kernel's memory for what waits in a socket, 0 if that is closed or nil.
func socketMemory(c *net.TCPConn) (n int64) {
	if c == nil {
		return 0
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		var info [unix.SK_MEMINFO_VARS]uint32
		size := uint32(unsafe.Sizeof(info))
		_, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno == 0 {
			n = int64(info[unix.SK_MEMINFO_RMEM_ALLOC]) + int64(info[unix.SK_MEMINFO_WMEM_QUEUED])
		}
	})
	return n
}
