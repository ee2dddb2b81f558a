package redirect

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/socket"
)

// limit bounds everything that these tests wait for.
const limit = 5 * time.Second

// A family is what a test says of IPv4 and IPv6 alike.
type family struct {
	name          string
	number        int
	loopback, any netip.Addr
	peer, pod     netip.Addr
}

func families() []family {
	a := netip.MustParseAddr
	return []family{
		{"IPv4", 4, a("127.0.0.1"), a("0.0.0.0"), a("10.77.0.1"), a("10.77.0.2")},
		{"IPv6", 6, a("::1"), a("::"), a("fd77::1"), a("fd77::2")},
	}
}

// A world is a pod and a peer, with a link between them.
type world struct {
	t         testing.TB
	peer, pod *netns.NS
	kernel    *Kernel
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t}
	var err error
	if w.kernel, err = NewKernel(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.kernel.Close() })
	w.peer, w.pod = w.namespace(), w.namespace()
	w.link()
	return w
}

func (w *world) namespace() *netns.NS {
	w.t.Helper()
	ns, err := netns.Unnamed()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ns.Close() })
	return ns
}

// cable lays one from a namespace to the pod. The ends are named by where they lead.
func (w *world) cable(from *netns.NS, here, there string) {
	w.t.Helper()
	w.do(from, func() error {
		la := netlink.NewLinkAttrs()
		la.Name = here
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: there}); err != nil {
			return err
		}
		end, err := netlink.LinkByName(there)
		if err != nil {
			return err
		}
		return w.move(end)
	})
}

// link lays a cable between peer and pod, each the other's default route.
func (w *world) link() {
	w.t.Helper()
	w.cable(w.peer, "toPod", "toPeer")
	fs := families()
	w.do(w.peer, func() error { return configure("toPod", fs[0].peer, fs[1].peer, fs[0].pod, fs[1].pod) })
	w.do(w.pod, func() error { return configure("toPeer", fs[0].pod, fs[1].pod, fs[0].peer, fs[1].peer) })
	w.plugged(w.peer, "toPod")
	w.plugged(w.pod, "toPeer")
	w.settle(w.peer, fs[1].peer)
	w.settle(w.pod, fs[1].pod)
	for _, dev := range []string{"all", "default", "lo", "toPeer"} { // as strict as it gets
		w.do(w.pod, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/rp_filter", []byte("1"), 0)
		})
	}
}

// settle waits until the kernel has noticed that the cable is plugged in: only
// then it routes to the address.
func (w *world) settle(ns *netns.NS, own netip.Addr) {
	w.t.Helper()
	w.do(ns, func() error {
		for end := time.Now().Add(limit); time.Now().Before(end); runtime.Gosched() {
			routes, err := netlink.RouteListFiltered(unix.AF_INET6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Dst != nil && r.Dst.IP.Equal(own.AsSlice()) {
					return nil
				}
			}
		}
		return fmt.Errorf("no local route to %s within %v", own, limit)
	})
}

// plugged waits until the kernel has taken notice of a cable: until then it drops what
// is sent, and a connection takes the second after which its SYN is sent again.
func (w *world) plugged(ns *netns.NS, name string) {
	w.t.Helper()
	w.do(ns, func() error {
		for end := time.Now().Add(limit); time.Now().Before(end); runtime.Gosched() {
			l, err := netlink.LinkByName(name)
			if err != nil || l.Attrs().OperState == netlink.OperUp {
				return err
			}
		}
		return fmt.Errorf("%s is not up within %v", name, limit)
	})
}

func (w *world) move(l netlink.Link) error {
	f, err := os.CreateTemp(w.t.TempDir(), "ns")
	if err != nil {
		return err
	}
	f.Close()
	fd := make(chan int)
	go func() {
		// A descriptor of the pod's namespace, taken from inside.
		w.pod.Do(func() error {
			f, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				fd <- -1
				return err
			}
			defer f.Close()
			fd <- int(f.Fd())
			<-fd
			return nil
		})
	}()
	n := <-fd
	defer func() { fd <- 0 }()
	return netlink.LinkSetNsFd(l, n)
}

func configure(name string, own4, own6, via4, via6 netip.Addr) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{own4, own6} {
		if err := addAddress(name, a); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	for _, via := range []netip.Addr{via4, via6} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("route via %s: %w", via, err)
		}
	}
	return nil
}

func addAddress(link string, a netip.Addr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	text := a.String() + "/24"
	if a.Is6() {
		text = a.String() + "/64"
	}
	addr, err := netlink.ParseAddr(text)
	if err != nil {
		return err
	}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("address %s: %w", text, err)
	}
	return nil
}

func (w *world) do(ns *netns.NS, f func() error) {
	w.t.Helper()
	if err := ns.Do(f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) apply(c Config) {
	w.t.Helper()
	if err := w.kernel.Apply(w.t.Context(), w.pod, c); err != nil {
		w.t.Fatal(err)
	}
}

// listen opens a listener.
func (w *world) listen(ns *netns.NS, a netip.Addr, port uint16) *net.TCPListener {
	w.t.Helper()
	f, err := ns.Listen(netip.AddrPortFrom(a, port))
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// dial opens a connection from inside a namespace.
func (w *world) dial(ns *netns.NS, a netip.Addr, port uint16) *net.TCPConn {
	w.t.Helper()
	return w.dialFrom(ns, 0, netip.AddrPortFrom(a, port))
}

// dialFrom is dial with a source port of one's choice.
func (w *world) dialFrom(ns *netns.NS, port int, to netip.AddrPort) *net.TCPConn {
	w.t.Helper()
	var c net.Conn
	w.do(ns, func() (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Control: reusable}
		c, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	return w.keep(c)
}

// reusable lets sockets share a port.
func reusable(_, _ string, raw syscall.RawConn) (err error) {
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return err
}

// accept gives up after the limit.
func (w *world) accept(l *net.TCPListener) *net.TCPConn {
	w.t.Helper()
	l.SetDeadline(time.Now().Add(limit))
	c, err := l.AcceptTCP()
	if err != nil {
		w.t.Fatalf("accept at %s: %v", l.Addr(), err)
	}
	return w.keep(c)
}

func (w *world) keep(c net.Conn) *net.TCPConn {
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(4 * limit))
	return c.(*net.TCPConn)
}

// inner dials as the proxy dials an application: from inside the pod, with
// somebody else's address.
func (w *world) inner(f family, from, to netip.AddrPort) (*net.TCPConn, error) {
	w.t.Helper()
	fds, err := w.pod.Sockets(netns.SocketConfig{Family: f.number, Count: 1, Mark: mesh.Mark})
	if err != nil {
		w.t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "inner")
	defer file.Close()
	if from.IsValid() {
		if err := unix.Bind(fds[0], socket.Address(from)); err != nil {
			return nil, fmt.Errorf("bind %s: %w", from, err)
		}
	}
	if err := unix.Connect(fds[0], socket.Address(to)); err != nil && err != unix.EINPROGRESS {
		return nil, fmt.Errorf("connect %s: %w", to, err)
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLOUT}}, int(limit.Milliseconds()))
	if n != 1 {
		return nil, fmt.Errorf("connect %s from %s: no answer within %v (%v)", to, from, limit, err)
	}
	if e, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
		return nil, fmt.Errorf("connect %s: %w", to, unix.Errno(e))
	}
	c, err := net.FileConn(file)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.keep(c), nil
}

// dialled is where the peer of an accepted connection wanted to go.
func dialled(t *testing.T, f family, c *net.TCPConn) netip.AddrPort {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var a netip.AddrPort
	raw.Control(func(fd uintptr) {
		const originalDst = 80 // SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST
		if f.number == 4 {
			var m *unix.IPv6Mreq // room for a sockaddr_in
			if m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, originalDst); err == nil {
				b := m.Multiaddr
				a = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		var m *unix.IPv6MTUInfo // begins with a sockaddr_in6
		if m, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, originalDst); err == nil {
			p := m.Addr.Port
			a = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), p<<8|p>>8)
		}
	})
	if err != nil {
		t.Fatalf("original destination: %v", err)
	}
	return a
}

// talk sends bytes both ways between the two ends of one connection.
func talk(t *testing.T, what string, a, b net.Conn) {
	t.Helper()
	for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := c[0].Write([]byte("hello")); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		buf := make([]byte, 5)
		if _, err := io.ReadFull(c[1], buf); err != nil || string(buf) != "hello" {
			t.Fatalf("%s: read %q, %v", what, buf, err)
		}
	}
}

// closeBoth closes first and then, when it has seen the end, second: it is first that
// remembers the connection, and second's port is free.
func closeBoth(t *testing.T, first, second net.Conn) {
	t.Helper()
	first.Close()
	if _, err := second.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read: %v, want the end", err)
	}
	second.Close()
}

func addrPort(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
