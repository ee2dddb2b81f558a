package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/wire/handle"
)

// limit bounds everything that these tests wait for.
const limit = 10 * time.Second

// space is a network namespace.
type space struct{ file *os.File }

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{}
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if s.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		return sh("ip link set lo up; echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start")
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.file.Close() })
	return s
}

// onThread runs f on a thread that is not used for anything else after.
func onThread(f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		err = f()
	}()
	<-done
	return err
}

func (s *space) do(t testing.TB, f func() error) {
	t.Helper()
	err := onThread(func() error {
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func sh(script string) error {
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}

// cluster is a bridge with pods on it, the nodes that serve them, and one World.
type cluster struct {
	t   testing.TB
	hub *space
	ca  *testCA
	// pods in the order of their making.
	pods     []*testPod
	services []*mesh.Service
	places   []*mesh.Place
	// policies are those that order has told.
	policies []*mesh.Policy
	nodes    []*node
	log      *logBuffer
	// making is held while an agent opens files.
	making sync.Mutex
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, hub: newSpace(t), ca: newTestCA(t), log: &logBuffer{}}
	c.hub.do(t, func() error {
		return sh("ip link add br0 type bridge; ip link set br0 up; ip addr add 10.77.0.254/16 dev br0; ip addr add fd77::ffff/64 dev br0 nodad")
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the proxies:\n%s", c.log.text())
		}
	})
	return c
}

// testPod is a namespace on the bridge.
type testPod struct {
	c      *cluster
	name   string
	space  *space
	v4, v6 netip.Addr
	wl     *mesh.Workload
	node   *node
	files  []int
	roles  []handle.Role

	mu sync.Mutex
	// spares are sockets for dial, by family.
	spares map[int][]int
}

// pod makes a pod that is not in the mesh.
func (c *cluster) pod(name string) *testPod {
	c.t.Helper()
	n := len(c.pods) + 1
	p := &testPod{c: c, name: name, space: newSpace(c.t),
		v4:     netip.AddrFrom4([4]byte{10, 77, 0, byte(n)}),
		v6:     netip.MustParseAddr(fmt.Sprintf("fd77::%x", n)),
		spares: map[int][]int{},
	}
	c.t.Cleanup(func() { closeAll(p.spares[4]); closeAll(p.spares[6]) })
	p.wl = &mesh.Workload{
		UID: "Kubernetes//Pod/default/" + name, Namespace: "default", Name: name, Addresses: []netip.Addr{p.v4, p.v6},
		ID: idOf(name), Ready: true, Services: map[string][]mesh.Port{},
	}
	link := fmt.Sprintf("veth%d", n)
	c.hub.do(c.t, func() error {
		la := netlink.NewLinkAttrs()
		la.Name = link
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.space.file.Fd())}); err != nil {
			return err
		}
		return sh("ip link set " + link + " up master br0")
	})
	p.space.do(c.t, func() error {
		return sh(fmt.Sprintf("ip addr add %s/16 dev eth0; ip addr add %s/64 dev eth0 nodad; ip link set eth0 up; ip route add default via 10.77.0.254; ip -6 route add default via fd77::ffff", p.v4, p.v6))
	})
	c.hub.do(c.t, func() error { return plugged(link) })
	p.space.do(c.t, func() error { return plugged("eth0") })
	c.pods = append(c.pods, p)
	return p
}

// plugged waits until the kernel has taken notice of a cable: until then it drops what
// is sent, and a connection takes the second after which its SYN is sent again.
func plugged(link string) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); time.Now().Before(end); <-tick.C {
		l, err := netlink.LinkByName(link)
		if err != nil || l.Attrs().OperState == netlink.OperUp {
			return err
		}
	}
	return fmt.Errorf("%s is not up within %v", link, limit)
}

func idOf(name string) mesh.ID {
	return mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: name}
}

// service makes a ClusterIP service of port 80 with these endpoints.
func (c *cluster) service(name string, target uint16, pods ...*testPod) *mesh.Service {
	n := byte(len(c.services) + 1)
	s := &mesh.Service{
		Namespace: "default", Name: name, Hostname: name + ".default.svc.cluster.local",
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 78, 0, n}), netip.MustParseAddr(fmt.Sprintf("fd78::%x", n))},
		Ports:     []mesh.Port{{Service: 80, Target: target}},
	}
	for _, p := range pods {
		p.wl.Services[s.Key()] = []mesh.Port{{Service: 80, Target: target}}
	}
	c.services = append(c.services, s)
	return s
}

// told is what control would tell. Workloads are copies, so that a test may change them.
func (c *cluster) told() mesh.Changes {
	var wls []*mesh.Workload
	for _, p := range c.pods {
		wl := *p.wl
		wls = append(wls, &wl)
	}
	return mesh.Changes{Workloads: wls, Services: c.services, Places: c.places}
}

// publish gives the World to all nodes.
func (c *cluster) publish() {
	for _, n := range c.nodes {
		n.proxy.Apply(c.told())
	}
}

// node is a proxy with a fake agent.
type node struct {
	c     *cluster
	proxy *Proxy
	reg   *prometheus.Registry
	agent *fakeAgent
	path  string
	// stop ends the proxy and waits for it.
	stop func()
}

func (c *cluster) node(change func(*Config)) *node {
	c.t.Helper()
	n := &node{c: c, reg: prometheus.NewRegistry(), path: filepath.Join(c.t.TempDir(), "handle.sock")}
	n.agent = c.startAgent(n.path)
	keeper := identity.NewKeeper(identity.KeeperConfig{Signer: c.ca})
	cfg := Config{
		Node: fmt.Sprintf("n%d", len(c.nodes)+1), Handle: n.path,
		Leaves: keeper, TLS: identity.NewTLS(identity.TLSConfig{}),
		DrainQuiet: 30 * time.Millisecond, Registry: n.reg,
		Log: slog.New(slog.NewTextHandler(c.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	n.proxy = p
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { keeper.Run(ctx) })
	wg.Go(func() {
		if err := p.Run(ctx); err != nil {
			c.t.Errorf("proxy: %v", err)
		}
	})
	n.stop = func() { cancel(); wg.Wait() }
	c.t.Cleanup(n.stop)
	c.nodes = append(c.nodes, n)
	return n
}

// enroll captures p, as the agent of n would, and announces it.
func (n *node) enroll(p *testPod) {
	n.c.t.Helper()
	p.node = n
	n.proxy.Apply(n.c.told())
	p.listen()
	n.agent.add(p)
	n.agent.expect(n.c.t, handle.Ready, p.name)
	p.capture("capture.nft")
	p.wl.Direct = true
	n.c.publish()
}

// buffers bounds what the sockets that the pod makes from now on hold, in bytes each way.
func (p *testPod) buffers(n int) {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error {
		return sh(fmt.Sprintf("for f in rmem wmem; do echo 4096 %d %[1]d >/proc/sys/net/ipv4/tcp_$f; done", n))
	})
}

// listen opens the listeners of the capture.
func (p *testPod) listen() {
	p.space.do(p.c.t, func() error {
		for _, l := range []struct {
			role    handle.Role
			network string
			addr    string
		}{
			{handle.Outbound4, "tcp4", "127.0.0.1:15101"},
			{handle.Outbound6, "tcp6", "[::1]:15101"},
			{handle.Inbound4, "tcp4", "0.0.0.0:15106"},
			{handle.Inbound6, "tcp6", "[::]:15106"},
		} {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false) // as the agent's
			nl, err := lc.Listen(context.Background(), l.network, l.addr)
			if err != nil {
				return err
			}
			raw, _ := nl.(*net.TCPListener).SyscallConn()
			raw.Control(func(fd uintptr) {
				level, option := unix.SOL_IP, unix.IP_TRANSPARENT
				if strings.HasSuffix(l.network, "6") {
					level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
				}
				unix.SetsockoptInt(int(fd), level, option, 1)
				dup, _ := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
				p.files = append(p.files, dup)
			})
			p.roles = append(p.roles, l.role)
			nl.Close()
		}
		return nil
	})
	p.c.t.Cleanup(func() { closeAll(p.files) })
}

// capture loads the agent's rules.
func (p *testPod) capture(rules string) {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error {
		return sh("nft -f ../../pod/redirect/testdata/" + rules + `
for s in ipv4/tcp_fwmark_accept ipv4/fwmark_reflect ipv6/fwmark_reflect; do echo 1 >/proc/sys/net/$s; done
echo 0 >/proc/sys/net/ipv4/tcp_early_demux
ip -4 rule add fwmark 0x7ac18 lookup 31425 2>/dev/null || true; ip -4 route replace local default dev lo table 31425
ip -6 rule add fwmark 0x7ac18 lookup 31425 2>/dev/null || true; ip -6 route replace local default dev lo table 31425`)
	})
}

// keep has the rules of a draining pod know a captured connection, as the agent's do.
func (p *testPod) keep(c net.Conn) {
	p.c.t.Helper()
	near, far := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
	p.space.do(p.c.t, func() error {
		return sh(fmt.Sprintf("nft add element inet tacit captured4 '{ %s . %d . %s . %d }'", near.IP, near.Port, far.IP, far.Port))
	})
}

// logBuffer keeps what the proxies log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// app is a program in a pod that listens.
type app struct {
	l    *net.TCPListener
	seen chan netip.AddrPort
}

// listenAt serves each connection at a port of the pod with f.
func (p *testPod) serve(port uint16, f func(*net.TCPConn)) *app {
	p.c.t.Helper()
	a := &app{seen: make(chan netip.AddrPort, 100000)}
	p.space.do(p.c.t, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		a.l, _ = l.(*net.TCPListener)
		return err
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := a.l.AcceptTCP()
			if err != nil {
				return
			}
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			a.seen <- netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(4 * limit))
				f(c)
			})
		}
	})
	p.c.t.Cleanup(func() { a.l.Close(); wg.Wait() })
	return a
}

// dial connects from inside the pod, as its application does.
func (p *testPod) dial(to netip.AddrPort) (*net.TCPConn, error) {
	p.c.t.Helper()
	return p.dialWithin(to, limit)
}

func (p *testPod) dialWithin(to netip.AddrPort, patience time.Duration) (*net.TCPConn, error) {
	p.c.t.Helper()
	family := 4
	if to.Addr().Is6() {
		family = 6
	}
	fd, ok := p.spare(family)
	if !ok {
		files := p.plainSockets(p.c.t, family, 32)
		fd = files[0]
		p.mu.Lock()
		p.spares[family] = append(p.spares[family], files[1:]...)
		p.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := connectSocket(ctx, fd, to)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(4 * limit))
	return c, nil
}

// spare returns a socket that was made before: entering a namespace takes long.
func (p *testPod) spare(family int) (fd int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.spares[family])
	if n == 0 {
		return -1, false
	}
	fd = p.spares[family][n-1]
	p.spares[family] = p.spares[family][:n-1]
	return fd, true
}

func (p *testPod) dialWith(d net.Dialer, to netip.AddrPort) (*net.TCPConn, error) {
	p.c.t.Helper()
	var c net.Conn
	err := onThread(func() (err error) {
		if err := unix.Setns(int(p.space.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		d.FallbackDelay = -1
		c, err = d.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(4 * limit))
	return c.(*net.TCPConn), nil
}

// bare dials past the capture, from a source port of choice: what the network
// would bring from anybody.
func (p *testPod) bare(from uint16, to netip.AddrPort) (*net.TCPConn, error) {
	return p.bareFrom(netip.AddrPortFrom(p.addr(to.Addr().Is6()), from), to)
}

// bareFrom is bare from any of its addresses.
func (p *testPod) bareFrom(from, to netip.AddrPort) (*net.TCPConn, error) {
	return p.dialWith(net.Dialer{
		Timeout: limit, LocalAddr: net.TCPAddrFromAddrPort(from),
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			raw.Control(func(fd uintptr) {
				err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mesh.Mark),
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			})
			return err
		},
	}, to)
}

func (p *testPod) addr(v6 bool) netip.Addr {
	if v6 {
		return p.v6
	}
	return p.v4
}

func (p *testPod) at(v6 bool, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.addr(v6), port)
}

// count reads a metric: the sum of those whose labels contain all pairs.
func (n *node) count(name string, pairs ...string) float64 {
	n.c.t.Helper()
	families, err := n.reg.Gather()
	if err != nil {
		n.c.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var has []string
			for _, l := range m.GetLabel() {
				has = append(has, l.GetName()+"="+l.GetValue())
			}
			if !slices.ContainsFunc(pairs, func(p string) bool { return !slices.Contains(has, p) }) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// await waits until what is true, without burning a core.
func await(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); !f(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waited %v until %s", limit, what)
		}
	}
}

func isRST(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || strings.Contains(fmt.Sprint(err), "reset")
}
