package proxy

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

// sysctl changes a setting of the pod's network.
func (p *testPod) sysctl(name string, value int) {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(strconv.Itoa(value)), 0o644)
	})
}

// drop has the pod take no packet any more, without a word.
func (p *testPod) drop() {
	p.c.t.Helper()
	p.space.do(p.c.t, func() error {
		return sh("nft add table inet silence; nft 'add chain inet silence in { type filter hook prerouting priority -400; policy drop; }'")
	})
}

// keepAlives are those of the connections of all proxies, which are in this process. Those
// of the applications have what package net gives.
func keepAlives(t *testing.T) (all []KeepAlive) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		if _, err := unix.Getpeername(fd); err != nil {
			continue
		}
		if on, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 {
			continue
		}
		get := func(option int) int {
			n, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, option)
			if err != nil {
				t.Error(err)
			}
			return n
		}
		k := KeepAlive{
			time.Duration(get(unix.TCP_KEEPIDLE)) * time.Second, time.Duration(get(unix.TCP_KEEPINTVL)) * time.Second, get(unix.TCP_KEEPCNT),
		}
		if k != (KeepAlive{15 * time.Second, 15 * time.Second, 9}) {
			all = append(all, k)
		}
	}
	slices.SortFunc(all, func(a, b KeepAlive) int { return cmp.Compare(a.Idle, b.Idle) })
	return all
}

// A connection that is quiet lives for as long as the pod's kernel lets it, or the flags.
func TestKeepAliveIsTheKernelsOwn(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1 := c.node(nil)
	n2 := c.node(func(cfg *Config) { cfg.KeepAlive = KeepAlive{Idle: 40 * time.Second, Probes: 4} })
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	client.sysctl("tcp_keepalive_time", 1234) // a pod's settings are written when it is captured already
	client.sysctl("tcp_keepalive_intvl", 7)
	client.sysctl("tcp_keepalive_probes", 5)
	say(t, mustDial(t, client, server.at(false, 1)), "hello")
	his := KeepAlive{40 * time.Second, kernelAlive.Interval, 4}
	mine := KeepAlive{1234 * time.Second, 7 * time.Second, 5}
	want := []KeepAlive{his, his, mine, mine}
	await(t, fmt.Sprintf("the proxies' sockets have %v", want), func() bool { return slices.Equal(keepAlives(t), want) })
}

// Where nobody answers it is the kernel that gives up, by the pod's own settings. Nothing
// waits for that: a new World is acknowledged meanwhile.
func TestDialIntoSilence(t *testing.T) {
	c := newCluster(t)
	client, server, away := c.pod("client"), c.pod("server"), c.pod("away")
	n1, n2 := c.node(nil), c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
	client.sysctl("tcp_syn_retries", 1)
	var silent []*net.TCPConn
	for _, p := range []*testPod{server, away} {
		p.drop()
		silent = append(silent, mustDial(t, client, p.at(false, 1)))
		await(t, "the dial to "+p.name+" is under way", func() bool { return client.dials(p) })
	}
	select {
	case <-n1.proxy.Apply(c.told()):
	case <-time.After(500 * time.Millisecond):
		t.Errorf("dials into silence hold up a new World")
	}
	if !client.dials(server) || !client.dials(away) {
		t.Error("the dials were not under way any more: want a slower test")
	}
	for _, conn := range silent {
		if err := firstRead(conn, nil); !isRST(err) {
			t.Errorf("%v, want a reset", err)
		}
	}
	if n := n1.count("tacit_refused_connections_total", "reason=timeout"); n != 2 {
		t.Errorf("%v refused for silence, want 2", n)
	}
}

// dials reports whether a socket of p is connecting to another pod.
func (p *testPod) dials(to *testPod) bool {
	var out []byte
	p.space.do(p.c.t, func() (err error) {
		out, err = exec.Command("ss", "-Htn", "state", "syn-sent", "dst", to.v4.String()).Output()
		return err
	})
	return len(out) > 0
}

// An endpoint that is silent is left soon for another one; what answers and then takes its
// time is not.
func TestSilentEndpoint(t *testing.T) {
	c := newCluster(t)
	client, server, away := c.pod("client"), c.pod("server"), c.pod("away")
	plain, gone := c.pod("plain"), c.pod("gone")
	n1 := c.node(func(cfg *Config) { cfg.EndpointTimeout = 200 * time.Millisecond })
	n2 := c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
	n2.enroll(away)
	direct, other := c.service("direct", 8080, server, away), c.service("other", 8080, plain, gone)
	c.publish()
	server.serve(8080, echo)
	plain.serve(8080, echo)
	away.drop()
	gone.drop()
	for range 8 {
		for _, s := range []*mesh.Service{direct, other} {
			say(t, mustDial(t, client, netip.AddrPortFrom(s.Addresses[0], 80)), "hello")
		}
	}
	if n := n1.count("tacit_endpoint_retries_total"); n == 0 {
		t.Error("no endpoint was left for another one")
	}
}

// One that answers, and then says nothing of TLS, does not keep a slot for as long as a
// silent one may take.
func TestSilentHandshake(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.HandshakeTimeout = 300 * time.Millisecond })
	n.enroll(client)
	server.wl.Direct = true
	c.publish()
	server.serve(1, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	if err := firstRead(client.dial(server.at(false, 1))); !isRST(err) {
		t.Errorf("%v, want a reset", err)
	}
}
