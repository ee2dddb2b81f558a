package redirect

import (
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

// BenchmarkPackets says what a packet costs the kernel on each of the ways that a round trip
// between two applications has: all of it happens in the thread that writes, so that its
// processor time is the cost. An operation is a message and its answer, two packets; the result
// is the least of many samples, which a busy machine disturbs least.
func BenchmarkPackets(b *testing.B) {
	for _, f := range families() {
		w := newWorld(b)
		outbound, inbound := w.listen(w.pod, f.loopback, mesh.OutboundPort), w.listen(w.pod, f.any, mesh.InboundPort)
		atPeer, atPod := w.listen(w.peer, f.any, 9000), w.listen(w.pod, f.any, 8080)
		local := way{"without rules, on lo", w.dial(w.pod, f.pod, 8080), w.accept(atPod)}
		ways := []way{local, {"without rules, on the network", w.dial(w.pod, f.peer, 9000), w.accept(atPeer)}}
		b.Run(f.name, func(b *testing.B) { costs(b, ways) })
		ways[1].from.SetLinger(0) // nothing is older than the rules
		ways[1].from.Close()
		w.apply(Config{})
		app := w.dial(w.pod, f.peer, 9000)
		ways = []way{{"the application to the proxy", app, w.accept(outbound)}}
		direct, err := w.inner(f, netip.AddrPort{}, netip.AddrPortFrom(f.peer, 9000))
		if err != nil {
			b.Fatal(err)
		}
		ways = append(ways, way{"the proxy to the network", direct, w.accept(atPeer)})
		client := w.dial(w.peer, f.pod, 8080)
		ways = append(ways, way{"the network to the proxy", client, w.accept(inbound)})
		inner, err := w.inner(f, addrPort(client.LocalAddr()), netip.AddrPortFrom(f.pod, 8080))
		if err != nil {
			b.Fatal(err)
		}
		ways = append(ways, way{"the proxy to the application", inner, w.accept(atPod)}, way{"within the pod", local.from, local.to})
		b.Run(f.name, func(b *testing.B) { costs(b, ways) })
	}
}

// A way is a connection, from who speaks first.
type way struct {
	what     string
	from, to *net.TCPConn
}

func costs(b *testing.B, ways []way) {
	for _, way := range ways {
		b.Run(way.what, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			from, to := descriptor(b, way.from), descriptor(b, way.to)
			const sample = 200
			least := time.Duration(1<<63 - 1)
			for b.Loop() {
				began := threadTime()
				for range sample {
					carry(b, from, to)
					carry(b, to, from)
				}
				least = min(least, threadTime()-began)
			}
			b.ReportMetric(float64(least.Nanoseconds())/sample, "ns/round")
		})
	}
}

func descriptor(b *testing.B, c *net.TCPConn) (fd int) {
	b.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		b.Fatal(err)
	}
	return fd
}

// carry sends a small message, which has arrived when write returns, or soon.
func carry(b *testing.B, from, to int) {
	var buf [100]byte
	if _, err := unix.Write(from, buf[:]); err != nil {
		b.Fatal(err)
	}
	for {
		_, err := unix.Read(to, buf[:])
		if err == nil {
			return
		}
		if err != syscall.EAGAIN {
			b.Fatal(err)
		}
	}
}

func threadTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}
