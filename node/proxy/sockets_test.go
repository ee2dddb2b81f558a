package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asked is a fake agent's end of a pool: it only notes.
type asked struct {
	n    []int
	away bool
}

func (a *asked) ask(n int) bool {
	if a.away {
		return false
	}
	a.n = append(a.n, n)
	return true
}

func (a *asked) last() int { return a.n[len(a.n)-1] }

func files(t *testing.T, n int) (fds []int) {
	t.Helper()
	for range n {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	return fds
}

func isOpen(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil
}

// newPool is a pool whose seeds make what sprout does; nil makes nothing.
func newPool(a *asked, sprout func(n int) ([]int, error)) *sockets {
	s := newSockets(false, &atomic.Uint64{}, slog.New(slog.DiscardHandler), a.ask)
	s.sprout = func(_ *seeds, n int, _ bool) ([]int, error) {
		if sprout == nil {
			return nil, errors.New("barren")
		}
		return sprout(n)
	}
	return s
}

// The agent is asked for two; others are made from them, at half empty.
func TestSocketsAreMadeAtHalfEmpty(t *testing.T) {
	a := &asked{}
	var made atomic.Int64
	s := newPool(a, func(n int) ([]int, error) { made.Add(1); return files(t, n), nil })
	defer s.close()
	s.connected()
	s.connected() // another agent: what the one before was asked for will not come
	if len(a.n) != 2 || a.last() != seedCount {
		t.Fatalf("asked for %v at first: want %d, twice", a.n, seedCount)
	}
	s.deliver(files(t, seedCount))
	await(t, "as many as there should be are ready", func() bool { return s.ready() == minLevel })
	for i := range minLevel / 2 {
		got, err := s.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got.close()
		if n := made.Load(); n != 1 && i < minLevel/2-1 {
			t.Errorf("after %d taken, made %d times: want 1", i+1, n)
		}
	}
	await(t, "there are as many as before", func() bool { return s.ready() == minLevel })
	if n := made.Load(); n != 2 || len(a.n) != 3 || a.last() != 1 {
		t.Errorf("made %d times, asked for %v: want to have made twice, and asked for what is told with one", n, a.n)
	}
	s.deliver(files(t, 1))
	if n := s.ready(); n != minLevel {
		t.Errorf("%d ready: want %d", n, minLevel)
	}
}

// What cannot be made is asked for.
func TestSocketsAreAskedForIfNoneCanBeMade(t *testing.T) {
	a := &asked{}
	s := newPool(a, nil)
	defer s.close()
	s.connected()
	s.deliver(files(t, seedCount))
	s.growing.Wait()
	if len(a.n) != 2 || a.last() != minLevel {
		t.Fatalf("asked for %v: want %d at last", a.n, minLevel)
	}
	s.deliver(files(t, minLevel))
	if n := s.ready(); n != minLevel {
		t.Errorf("%d ready: want %d", n, minLevel)
	}
}

// Without an agent it is tried again for as long as somebody waits.
func TestSocketsAreMadeForWhoWaits(t *testing.T) {
	a := &asked{}
	tries := 0
	s := newPool(a, func(n int) ([]int, error) {
		if tries++; tries < 3 {
			return nil, errors.New("no port is free")
		}
		return files(t, n), nil
	})
	defer s.close()
	s.connected()
	a.away = true
	s.deliver(files(t, seedCount))
	got, err := s.take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got.close()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestSocketsGrowAndShrink(t *testing.T) {
	a := &asked{}
	s := newPool(a, nil)
	defer s.close()
	for range 8 { // each time it is found empty
		got := make(chan spare)
		go func() {
			one, _ := s.take(t.Context())
			got <- one
		}()
		await(t, "somebody waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.waiters) == 1 })
		s.deliver(files(t, 1))
		(<-got).close()
	}
	if s.level != maxLevel {
		t.Errorf("level %d: want %d", s.level, maxLevel)
	}
	fds := files(t, maxLevel)
	s.deliver(files(t, seedCount))
	s.growing.Wait()
	s.deliver(fds)
	for range 10 {
		s.trim()
	}
	if s.level != minLevel || s.ready() != minLevel {
		t.Errorf("quiet: level %d and %d ready: want %d", s.level, s.ready(), minLevel)
	}
	n := 0
	for _, fd := range fds {
		n += btoi(isOpen(fd))
	}
	if n != minLevel {
		t.Errorf("%d open: want %d", n, minLevel)
	}
}

func TestWaitingForASocketEnds(t *testing.T) {
	a := &asked{}
	s := newPool(a, nil)
	defer s.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.take(ctx); !errors.Is(err, errNoSocket) || !errors.Is(err, context.Canceled) {
		t.Errorf("take with a context that has ended: %v", err)
	}
	if len(s.waiters) != 0 {
		t.Error("somebody still waits")
	}
	for _, end := range []func(){func() { s.deliver(nil) }, s.close} {
		done := make(chan error)
		go func() { _, err := s.take(t.Context()); done <- err }()
		await(t, "somebody waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.waiters) == 1 })
		end()
		if err := <-done; !errors.Is(err, errNoSocket) {
			t.Errorf("take: %v", err)
		}
	}
	fds := files(t, 2)
	s.deliver(fds)
	if isOpen(fds[0]) || isOpen(fds[1]) {
		t.Error("what comes too late is not closed")
	}
}

func TestSocketsAreAskedForAgainWhenTheAgentIsBack(t *testing.T) {
	a := &asked{away: true}
	s := newPool(a, nil)
	defer s.close()
	s.connected()
	a.away = false
	s.connected()
	if len(a.n) != 1 {
		t.Errorf("asked %v: want once", a.n)
	}
}

// What the proxy makes of two of the agent's sockets is as good as theirs.
func TestMadeSocketsAreAsTheAgents(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, echo)
	both(t, func(t *testing.T, v6 bool) {
		family, level, transparent := 4, unix.SOL_IP, unix.IP_TRANSPARENT
		if v6 {
			family, level, transparent = 6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		given := client.sockets(t, family, 3)
		s := &seeds{given[0], given[1]}
		defer s.close()
		made, err := s.sockets(5, v6)
		if err != nil {
			t.Fatal(err)
		}
		// What is asked of each: its mark, whether it is transparent, shares its port, which ports the
		// kernel gives it, and its namespace.
		traits := func(fd int) [5]uint64 {
			mark, err1 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
			is, err2 := unix.GetsockoptInt(fd, level, transparent)
			shares, err3 := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
			ports, err4 := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE)
			home, err5 := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
			if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
				t.Fatal(err)
			}
			return [5]uint64{uint64(mark), uint64(is), uint64(shares), uint64(ports), home}
		}
		want := traits(given[2])
		scale := windowScale(t, given[2], server.at(v6, 1), client.addr(v6))
		for _, fd := range made {
			if got := traits(fd); got != want {
				t.Errorf("traits %v: want %v", got, want)
			}
			if got := windowScale(t, fd, server.at(v6, 1), client.addr(v6)); got != scale {
				t.Errorf("window scale %d: want %d", got, scale)
			}
		}
	})
}

// windowScale connects fd and closes it. It is small where a socket keeps what its last connection
// has come to. The source is the kernel's choice, and should be own.
func windowScale(t *testing.T, fd int, to netip.AddrPort, own netip.Addr) uint8 {
	t.Helper()
	c, err := connectSocket(t.Context(), fd, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); got != own {
		t.Errorf("source %s: want %s", got, own)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil {
		t.Fatal(err)
	}
	return (*[8]byte)(unsafe.Pointer(info))[6] >> 4 // tcpi_rcv_wscale, a bit field: what we offered
}

// A socket is used again after its connection, and nothing is left of that: who ends first does not
// matter, and one that was reset is closed.
func TestSocketsAreUsedAgain(t *testing.T) {
	_, client, server := pair(t)
	hello := func(c *net.TCPConn) { io.ReadFull(c, make([]byte, 5)); c.Write([]byte("hello")) }
	server.serve(9, echo)
	for port, f := range map[uint16]func(*net.TCPConn){
		1: echo, 2: hello, 3: func(c *net.TCPConn) { hello(c); c.SetLinger(0) },
	} {
		app := server.serve(port, f)
		both(t, func(t *testing.T, v6 bool) {
			d := server.node.proxy.pod(server.name)
			s := d.sockets(v6)
			for range 2 * minLevel {
				conn := mustDial(t, client, server.at(v6, port))
				own := conn.LocalAddr().(*net.TCPAddr).AddrPort()
				if err := ask(conn); err != nil && port != 3 {
					t.Fatal(err)
				}
				if from := <-app.seen; from.Port() != own.Port() || from.Addr() != client.addr(v6) {
					t.Errorf("the application saw %s: want %s", from, own)
				}
				await(t, "it is over", func() bool { return d.quota.open.Load() == 0 })
			}
			n := 0
			s.mu.Lock()
			for _, one := range s.idle {
				n += btoi(one.conn != nil)
			}
			s.mu.Unlock()
			if n != btoi(port != 3) {
				t.Errorf("%d sockets were used before: want %d", n, btoi(port != 3))
			}
			if port == 3 {
				return
			}
			// As the agent's the last one is, too.
			g := &dialling{to: server.at(v6, 9)}
			for range 2 {
				c, err := d.dial(t.Context(), g)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if from := ownAddr(t, c); from.Addr() != server.addr(v6) {
					t.Errorf("source %s: want the pod's own, %s", from, server.addr(v6))
				}
			}
		})
	}
}

func ownAddr(t *testing.T, c *net.TCPConn) (own netip.AddrPort) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { own, err = ownEnd(int(fd)) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return own
}
