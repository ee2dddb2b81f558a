package proxy

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/socket"
	"tacit.dev/wire/handle"
)

// fakeAgent makes listeners and sockets as node/agent does.
type fakeAgent struct {
	l    *handle.Listener
	told chan handle.Message

	// making is the cluster's, held while the agent opens files.
	making *sync.Mutex

	mu   sync.Mutex
	pods map[string]*testPod
	conn *handle.Conn
	held []handle.Message
	// broken has it make no sockets.
	broken bool
	stop   func()
}

// startAgent starts an agent that has these pods already.
func (c *cluster) startAgent(path string, pods ...*testPod) *fakeAgent {
	c.t.Helper()
	l, err := handle.Listen(path, -1)
	if err != nil {
		c.t.Fatal(err)
	}
	a := &fakeAgent{l: l, told: make(chan handle.Message, 1000), pods: map[string]*testPod{}, making: &c.making}
	for _, p := range pods {
		a.pods[p.name] = p
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			a.serve(c.t, conn)
		}
	})
	a.stop = func() {
		l.Close()
		a.disconnect()
		wg.Wait()
	}
	c.t.Cleanup(a.stop)
	return a
}

func (a *fakeAgent) disconnect() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil {
		a.conn.Close()
	}
}

func (a *fakeAgent) serve(t testing.TB, conn *handle.Conn) {
	defer conn.Close()
	for {
		m, files, err := conn.Receive()
		if err != nil {
			return
		}
		closeAll(files)
		switch m.Kind {
		case handle.Held:
			a.mu.Lock()
			a.held = append(a.held, m)
			a.mu.Unlock()
		case handle.Hello:
			a.mu.Lock()
			a.conn = conn
			for _, p := range a.pods {
				a.sendPod(p)
			}
			a.mu.Unlock()
		case handle.Need:
			a.give(t, conn, m)
		case handle.Bind:
			a.bind(t, conn, m)
		default:
			a.told <- m
		}
	}
}

func (a *fakeAgent) add(p *testPod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pods[p.name] = p
	a.sendPod(p)
}

// sendPod is called with mu.
func (a *fakeAgent) sendPod(p *testPod) {
	if a.conn != nil {
		a.conn.Send(handle.Message{Kind: handle.Pod, UID: p.name, Roles: p.roles, Pod: &handle.PodInfo{
			UID: p.name, Namespace: "default", Name: p.name, ID: p.wl.ID.String(), Addresses: p.wl.Addresses,
		}}, p.files...)
	}
}

func (a *fakeAgent) send(k handle.Kind, uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conn.Send(handle.Message{Kind: k, UID: uid})
}

func (a *fakeAgent) give(t testing.TB, conn *handle.Conn, m handle.Message) {
	a.making.Lock()
	defer a.making.Unlock()
	a.mu.Lock()
	p, broken := a.pods[m.UID], a.broken
	a.mu.Unlock()
	if p == nil || broken {
		conn.Send(handle.Message{Kind: handle.Sockets, UID: m.UID, Family: m.Family, Reason: "broken"})
		return
	}
	files := p.sockets(t, m.Family, min(m.Count, handle.MaxFiles))
	conn.Send(handle.Message{Kind: handle.Sockets, UID: m.UID, Family: m.Family, Count: len(files)}, files...)
	conn.Send(handle.Message{Kind: handle.Ports, UID: m.UID, Ports: p.ephemeral(t)})
	closeAll(files)
}

// bind binds a socket to a privileged port. The test has no such privilege, but that of
// changing what takes one.
func (a *fakeAgent) bind(t testing.TB, conn *handle.Conn, m handle.Message) {
	a.making.Lock()
	defer a.making.Unlock()
	a.mu.Lock()
	p, broken := a.pods[m.UID], a.broken
	a.mu.Unlock()
	if broken {
		conn.Send(handle.Message{Kind: handle.Bound, UID: m.UID, Source: m.Source, Reason: "broken"})
		return
	}
	family := 4
	if m.Source.Addr().Is6() {
		family = 6
	}
	files := p.sockets(t, family, 1)
	p.space.do(t, func() error {
		return errors.Join(
			sh("echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start"),
			unix.Bind(files[0], socket.Address(m.Source)),
			sh("echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start"))
	})
	conn.Send(handle.Message{Kind: handle.Bound, UID: m.UID, Source: m.Source}, files...)
	closeAll(files)
}

// setPorts sets the namespace's range of ports, of which the agent takes notice.
func (p *testPod) setPorts(first, last int) {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error {
		return sh(fmt.Sprintf("echo %d %d >/proc/sys/net/ipv4/ip_local_port_range", first, last))
	})
	p.node.agent.mu.Lock()
	p.node.agent.conn.Send(handle.Message{Kind: handle.Ports, UID: p.name, Ports: p.ephemeral(p.c.t)})
	p.node.agent.mu.Unlock()
	await(p.c.t, "the proxy knows the ports", func() bool {
		return p.node.proxy.pod(p.name).ephemeral() == portRange{uint16(first), uint16(last)}
	})
}

// ephemeral is the namespace's range of ports.
func (p *testPod) ephemeral(t testing.TB) (ports [2]uint16) {
	p.space.do(t, func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
		_, scanErr := fmt.Sscan(string(b), &ports[0], &ports[1])
		return errors.Join(err, scanErr)
	})
	return ports
}

// sockets makes sockets as the agent does.
func (p *testPod) sockets(t testing.TB, family, n int) []int {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if family == 6 {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	files := p.plainSockets(t, family, n)
	for _, fd := range files {
		// The test has the privilege wherever it is.
		err := errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mesh.Mark), unix.SetsockoptInt(fd, level, option, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), limitPorts(fd, 0, mesh.DirectPortFirst-1))
		if err != nil {
			t.Error(err)
		}
	}
	return files
}

// plainSockets makes sockets as the pod's application does.
func (p *testPod) plainSockets(t testing.TB, family, n int) (files []int) {
	domain := unix.AF_INET
	if family == 6 {
		domain = unix.AF_INET6
	}
	p.space.do(t, func() error {
		for range n {
			fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			files = append(files, fd)
		}
		return nil
	})
	return files
}

// expect waits for the proxy to say k of a pod.
func (a *fakeAgent) expect(t testing.TB, k handle.Kind, uid string) handle.Message {
	t.Helper()
	for timeout := time.After(limit); ; {
		select {
		case m := <-a.told:
			if m.Kind == k && m.UID == uid {
				return m
			}
		case <-timeout:
			t.Fatalf("the proxy did not say %s of %s", k, uid)
		}
	}
}
