package proxy

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tacit.dev/mesh"
)

// modeOf is a policy of the whole mesh.
func modeOf(m mesh.Mode) *mesh.Policy {
	return &mesh.Policy{Namespace: "tacit-system", Name: "_mesh-mode", Scope: mesh.WholeMesh, Action: mesh.Deny, Mode: &m}
}

var (
	strictIn  = mesh.Mode{Inbound: mesh.Strict}
	strictOut = mesh.Mode{Outbound: mesh.Strict}
)

// town is a cluster of which all kinds of places are known: the addresses of pods are in its
// range, one of them is a node's, and another one is of the network of that node.
type town struct {
	*cluster
	member, server, stranger, excluded, host, node, outside *testPod
}

func newTown(t *testing.T) *town {
	c := newCluster(t)
	w := &town{
		cluster: c, member: c.pod("member"), server: c.pod("server"), stranger: c.pod("stranger"), excluded: c.pod("excluded"),
		host: c.pod("host"), node: c.pod("node"), outside: c.pod("outside"),
	}
	n1, n2 := c.node(nil), c.node(nil)
	ours := &mesh.Place{Name: "ranges"}
	for _, p := range []*testPod{w.member, w.server, w.stranger, w.excluded} {
		ours.Ranges = append(ours.Ranges, netip.PrefixFrom(p.v4, 32), netip.PrefixFrom(p.v6, 128))
	}
	c.places = []*mesh.Place{ours, {Name: "node", Node: "n3", Addresses: []netip.Addr{w.node.v4, w.node.v6, w.host.v4, w.host.v6}}}
	w.host.wl.HostNetwork = true
	c.pods = slices.DeleteFunc(c.pods, func(p *testPod) bool { return p == w.node || p == w.outside }) // no pods to the World
	n1.enroll(w.member)
	n2.enroll(w.server)
	n2.enroll(w.excluded)
	w.excluded.wl.ExcludeInbound = []uint16{8080}
	c.publish()
	for _, p := range []*testPod{w.server, w.stranger, w.host, w.node, w.outside} {
		p.serve(8080, echo)
	}
	return w
}

// wasReset reports whether what askOnce has met is a reset: it may come before the end of the input.
func wasReset(err error) bool { return isRST(err) || errors.Is(err, syscall.ENOTCONN) }

// Who comes in under each mode.
func TestModesInbound(t *testing.T) {
	w := newTown(t)
	at := w.server.at(false, 8080)
	nodes := mesh.Mode{Inbound: mesh.Strict, Admit: []mesh.Admission{{Port: 8080}}}
	listed := mesh.Mode{Inbound: mesh.Strict, Admit: []mesh.Admission{{From: []netip.Prefix{netip.PrefixFrom(w.stranger.v4, 32)}}}}
	for _, row := range []struct {
		name string
		mode mesh.Mode
		ok   string
	}{
		{"permissive", mesh.Mode{}, "member stranger host node"},
		{"strict", strictIn, "member"},
		{"nodes are let in", nodes, "member host node"},
		{"another port for nodes", mesh.Mode{Inbound: mesh.Strict, Admit: []mesh.Admission{{Port: 9090}}}, "member"},
		{"a listed source", listed, "member stranger"},
	} {
		w.order(modeOf(row.mode))
		var ok []string
		for _, p := range []*testPod{w.member, w.stranger, w.host, w.node} {
			if err := askOnce(p, at); err == nil {
				ok = append(ok, p.name)
			} else if !wasReset(err) {
				t.Errorf("%s: %s: %v: want a reset", row.name, p.name, err)
			}
		}
		if got := strings.Join(ok, " "); got != row.ok {
			t.Errorf("%s: %s come in: want %s", row.name, got, row.ok)
		}
	}
	if n := w.nodes[1].count("tacit_refused_connections_total", "direction=inbound", "reason=strict"); n != 3+1+3+2 {
		t.Errorf("%v refusals counted: want 9", n)
	}
	if n := w.nodes[1].count("tacit_strict_exceptions_total", "direction=inbound"); n != 3 {
		t.Errorf("%v exceptions counted: want 3", n)
	}
	await(t, "the log says why", func() bool {
		return strings.Contains(w.log.text(), `reason="strict: plaintext, and the mode of the mesh is strict"`)
	})
}

// Where it may go under each mode.
func TestModesOutbound(t *testing.T) {
	w := newTown(t)
	places := []struct {
		name string
		at   netip.AddrPort
	}{
		{"server", w.server.at(false, 8080)}, {"stranger", w.stranger.at(false, 8080)}, {"host", w.host.at(false, 8080)}, {"node", w.node.at(true, 8080)}, {"outside", w.outside.at(false, 8080)},
	}
	for _, row := range []struct {
		name string
		mode mesh.Mode
		ok   string
	}{
		{"permissive", mesh.Mode{}, "server stranger host node outside"},
		{"strict", strictOut, "server outside"},
		{"listed", mesh.Mode{Outbound: mesh.Strict, Outside: mesh.Strict}, "server"},
		{"allowed", mesh.Mode{Outbound: mesh.Strict, Outside: mesh.Strict, Allowed: []mesh.Exclusion{{Prefix: netip.PrefixFrom(w.stranger.v4, 32), Port: 8080}, {Prefix: netip.PrefixFrom(w.outside.v4, 32)}}}, "server stranger outside"},
	} {
		w.order(modeOf(row.mode))
		var ok []string
		for _, to := range places {
			if err := askOnce(w.member, to.at); err == nil {
				ok = append(ok, to.name)
			} else if !wasReset(err) {
				t.Errorf("%s: %s: %v: want a reset", row.name, to.name, err)
			}
		}
		if got := strings.Join(ok, " "); got != row.ok {
			t.Errorf("%s: %s are reached: want %s", row.name, got, row.ok)
		}
	}
	w.order(modeOf(strictOut))
	if err := askOnce(w.member, w.excluded.at(false, 8080)); !wasReset(err) {
		t.Errorf("an excluded port: %v: want a reset", err)
	}
	w.server.wl.Direct = false // it has left
	w.publish()
	if err := askOnce(w.member, w.server.at(false, 8080)); !wasReset(err) {
		t.Errorf("an endpoint that left: %v: want a reset", err)
	}
	if n := w.nodes[0].count("tacit_refused_connections_total", "direction=outbound", "reason=strict"); n != 3+4+2+2 {
		t.Errorf("%v refusals counted: want 11", n)
	}
	for _, want := range []string{
		"default/stranger is not in the mesh: plaintext, and the mode of the mesh is strict", "an address of a node: plaintext",
		"an address outside of the cluster that is not listed", "default/excluded excludes this port from the mesh", "default/server is not in the mesh",
	} {
		await(t, "the log says "+want, func() bool { return strings.Contains(w.log.text(), want) })
	}
}

// Open connections in plaintext end when strict begins; nothing else does, and permissive undoes it.
func TestStrictEndsPlaintext(t *testing.T) {
	w := newTown(t)
	in, leaves := mustDial(t, w.stranger, w.server.at(false, 8080)), mustDial(t, w.member, w.stranger.at(false, 8080))
	outside, mutual := mustDial(t, w.member, w.outside.at(false, 8080)), mustDial(t, w.member, w.server.at(false, 8080))
	for _, c := range []net.Conn{in, leaves, outside, mutual} {
		say(t, c, "hello")
	}
	begin := time.Now()
	w.order(modeOf(mesh.Mode{Inbound: mesh.Strict, Outbound: mesh.Strict}))
	for name, c := range map[string]net.Conn{"inbound": in, "outbound": leaves} {
		if !isReset(c) {
			t.Errorf("%s: plaintext goes on", name)
		}
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("it took %v", took)
	}
	say(t, mutual, "still here")
	say(t, outside, "still here")
	w.order(modeOf(mesh.Mode{Inbound: mesh.Strict, Outbound: mesh.Strict, Outside: mesh.Strict}))
	if !isReset(outside) {
		t.Error("plaintext to an address that is not listed goes on")
	}
	say(t, mutual, "still here")
	w.order()
	if err := askOnce(w.stranger, w.server.at(false, 8080)); err != nil {
		t.Errorf("permissive again: %v", err)
	}
}

// The workload's own mode, and that of its namespace, count more; a pod that the World does not know
// yet may have one.
func TestModeOfWorkload(t *testing.T) {
	w := newTown(t)
	at := w.server.at(false, 8080)
	w.server.wl.Mode = &strictIn
	w.order()
	if err := askOnce(w.stranger, at); !wasReset(err) {
		t.Errorf("a strict workload: %v: want a reset", err)
	}
	w.server.wl.Mode = &mesh.Mode{Ports: []mesh.PortLevel{{Port: 8080, Level: mesh.Permissive}}}
	w.order(modeOf(strictIn))
	if err := askOnce(w.stranger, at); err != nil {
		t.Errorf("a permissive port: %v", err)
	}
	w.server.wl.Mode = &strictIn
	w.publish()
	d := w.server.node.proxy.pod(w.server.name)
	stranger := &pod{p: d.p, id: idOf("nobody")}
	stranger.facts.Store(d.facts.Load())
	if !stranger.law(d.p.know.world()).set.IsStrictOutbound() {
		t.Error("a pod that nobody knows yet, where a workload is strict: want strict")
	}
}

// A Service whose endpoints are not all in the mesh is served by those that are.
func TestStrictPrefersTheMesh(t *testing.T) {
	w := newTown(t)
	s := w.service("web", 8080, w.server, w.stranger)
	w.order(modeOf(strictOut))
	for range 8 {
		if err := askOnce(w.member, netip.AddrPortFrom(s.Addresses[0], 80)); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.nodes[0].count("tacit_refused_connections_total", "direction=outbound", "reason=strict"); n != 0 {
		t.Errorf("%v refusals counted: want none", n)
	}
	w.server.wl.Ready = false
	w.publish()
	if err := askOnce(w.member, netip.AddrPortFrom(s.Addresses[0], 80)); !wasReset(err) {
		t.Errorf("only one outside of the mesh is left: %v: want a reset", err)
	}
}
