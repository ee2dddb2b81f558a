package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/policy"
	"tacit.dev/wire/direct"
)

// order makes these all policies of the mesh, and returns when every node has settled on them.
func (c *cluster) order(policies ...*mesh.Policy) {
	c.t.Helper()
	told := c.told()
	told.Policies = policies
	for _, had := range c.policies {
		if !slices.ContainsFunc(policies, func(p *mesh.Policy) bool { return p.Key() == had.Key() }) {
			told.GonePolicies = append(told.GonePolicies, had.Key())
		}
	}
	c.policies = policies
	for _, n := range c.nodes {
		select {
		case <-n.proxy.Apply(told):
		case <-time.After(limit):
			c.t.Fatal("the policies do not settle")
		}
	}
}

// deny is a policy against some service accounts of the namespace, for everybody in it.
func deny(name string, accounts ...string) *mesh.Policy {
	m := mesh.Match{}
	for _, a := range accounts {
		m.ServiceAccounts = append(m.ServiceAccounts, mesh.ServiceAccount{Namespace: "default", Name: a})
	}
	return &mesh.Policy{Namespace: "default", Name: name, Scope: mesh.WholeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{Clauses: []mesh.Clause{{m}}}}}
}

func allow(name string, accounts ...string) *mesh.Policy {
	p := deny(name, accounts...)
	p.Action = mesh.Allow
	return p
}

// isReset reports whether the connection ends with a reset, before limit.
func isReset(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(limit))
	_, err := c.Read(make([]byte, 1))
	return isRST(err)
}

// trio is a server, a client and an other one of the mesh, and a stranger outside of it.
func trio(t *testing.T) (c *cluster, client, other, stranger, server *testPod) {
	c = newCluster(t)
	client, other, stranger, server = c.pod("client"), c.pod("other"), c.pod("stranger"), c.pod("server")
	n1, n2 := c.node(nil), c.node(nil)
	n1.enroll(client)
	n1.enroll(other)
	n2.enroll(server)
	return c, client, other, stranger, server
}

// Who is denied gets a reset, the application never hears of it, and both sides tell which
// policy it was.
func TestDenied(t *testing.T) {
	c, client, other, stranger, server := trio(t)
	app := server.serve(8080, echo)
	c.order(allow("only-other", "other"))
	if err := firstRead(client.dial(server.at(false, 8080))); !isRST(err) {
		t.Errorf("who is not allowed: %v, want a reset", err)
	}
	if err := firstRead(stranger.dial(server.at(false, 8080))); !isRST(err) {
		t.Errorf("who proves nothing: %v, want a reset", err)
	}
	if len(app.seen) != 0 {
		t.Error("the application heard of it")
	}
	if err := askOnce(other, server.at(false, 8080)); err != nil {
		t.Errorf("who is allowed: %v", err)
	}
	for i, direction := range []string{"outbound", "inbound"} {
		if n := c.nodes[i].count("tacit_refused_connections_total", "direction="+direction, "reason=denied"); n != float64(i+1) {
			t.Errorf("%v refusals counted %s: want %d", n, direction, i+1)
		}
	}
	for _, want := range []string{
		`reason="denied: allowed by no rule of policy default/only-other or of another one"`, "policy=default/only-other",
		`reason="denied: the other side answered: policy default/only-other"`,
	} {
		await(t, "the log says "+want, func() bool { return strings.Contains(c.log.text(), want) })
	}
}

// A policy that is new ends what it denies, and touches nothing else.
func TestOpenConnectionsAreJudgedAgain(t *testing.T) {
	c, client, other, stranger, server := trio(t)
	server.serve(8080, echo)
	denied := []net.Conn{mustDial(t, client, server.at(false, 8080)), mustDial(t, client, server.at(true, 8080))}
	allowed := []net.Conn{mustDial(t, other, server.at(false, 8080)), mustDial(t, stranger, server.at(false, 8080))}
	for _, conn := range slices.Concat(denied, allowed) {
		say(t, conn, "hello")
	}
	begin := time.Now()
	c.order(deny("no-client", "client"))
	for _, conn := range denied {
		if !isReset(conn) {
			t.Error("who is denied by now is not reset")
		}
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("it took %v", took)
	}
	for _, conn := range allowed {
		say(t, conn, "still here")
	}
	if n := c.nodes[1].count("tacit_policy_resets_total"); n != 2 {
		t.Errorf("%v resets counted: want 2", n)
	}
	await(t, "the log says why", func() bool {
		return strings.Count(c.log.text(), `reason="denied: denied by rule 0 of policy default/no-client"`) == 2
	})
	c.order()
	if err := askOnce(client, server.at(false, 8080)); err != nil {
		t.Errorf("when the policy is gone: %v", err)
	}
}

// What is kept for the next connection is not kept for who is denied.
func TestKeptConnectionIsJudgedAgain(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	askKept(t, c, client, server.at(false, 8080))
	c.order(deny("no-client", "client"))
	await(t, "nothing is kept", func() bool { return c.keeps() == 0 })
	if err := askOnce(client, server.at(false, 8080)); err == nil {
		t.Error("who is denied is served")
	}
	c.order(allow("client", "client"))
	askKept(t, c, client, server.at(false, 8080))
	c.order(allow("client", "client", "another"))
	if n := c.keeps(); n != 2 {
		t.Errorf("%v are kept of who is allowed still: want 2", n)
	}
}

// Whoever gets a pod's address inherits nothing that was opened from it.
func TestAddressOfAnotherAccount(t *testing.T) {
	c, client, other, _, server := trio(t)
	server.serve(8080, echo)
	conn, bystander := mustDial(t, client, server.at(false, 8080)), mustDial(t, other, server.at(false, 8080))
	say(t, conn, "hello")
	say(t, bystander, "hello")
	next := *client.wl
	next.UID, next.Name, next.ID = "Kubernetes//Pod/default/next", "next", idOf("next")
	c.nodes[1].proxy.Apply(mesh.Changes{Workloads: []*mesh.Workload{&next}, Gone: []string{client.wl.UID}})
	if !isReset(conn) {
		t.Error("a connection outlives its source")
	}
	say(t, bystander, "still here")

	// Nor does who had it at accept count, if the World is another one after the handshake.
	d := server.node.proxy.pod(server.name)
	j := &journey{d: d, queued: &queued{}}
	j.flow.SourceAddr, j.flow.Dialled = client.at(false, 62000), server.at(false, 8080)
	j.flow.Source = client.wl.Peer()
	_, err := d.admitPeer(t.Context(), j, client.wl.ID, direct.Hello{})
	if r := refusalOf(err); err == nil || r.reason != identity.ReasonWrongIdentity {
		t.Errorf("%v: want %s", err, identity.ReasonWrongIdentity)
	}
	d.passages.leave(j.passage)
}

// What is kept leads nobody else anywhere: neither who gets the client's address, nor who gets
// the server's. What is open stays with who has proved to be there.
func TestKeptConnectionOfAnotherAccount(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	at := server.at(false, 8080)
	reused := func(n *node, p *testPod) {
		next := *p.wl
		next.UID, next.Name, next.ID = "Kubernetes//Pod/default/next", "next", idOf("next")
		n.proxy.Apply(mesh.Changes{Workloads: []*mesh.Workload{&next}, Gone: []string{p.wl.UID}})
	}
	askKept(t, c, client, at)
	reused(c.nodes[1], client)
	await(t, "the server keeps nothing", func() bool { return c.nodes[1].count("tacit_kept_connections") == 0 })
	if err := askOnce(client, at); err == nil {
		t.Error("a new connection is served as the one before")
	}
	c.nodes[1].proxy.Apply(mesh.Changes{Gone: []string{"Kubernetes//Pod/default/next"}})
	c.publish()
	askKept(t, c, client, at)

	open := mustDial(t, client, server.at(true, 8080))
	say(t, open, "hello")
	used := c.used(0)
	reused(c.nodes[0], server)
	if err := askOnce(client, at); err == nil || c.used(0) != used {
		t.Errorf("%v: what is kept leads to who has the address now", err)
	}
	await(t, "the client asks for the next one", func() bool {
		return c.nodes[0].count("tacit_refused_connections_total", "direction=outbound", "reason=wrong_identity") == 1
	})
	say(t, open, "still there")
}

// A policy that nobody knows, and one that may be for a pod that nobody knows, denies.
func TestUnknownPolicyDenies(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	for name, row := range map[string]struct {
		names    []string
		policies []*mesh.Policy
		ok       bool
	}{
		"none":     {nil, nil, true},
		"unknown":  {[]string{"default/gone"}, nil, false},
		"known":    {[]string{"default/all"}, []*mesh.Policy{named("all", mesh.Allow)}, true},
		"of other": {nil, []*mesh.Policy{named("all", mesh.Deny)}, true},
	} {
		server.wl.Policies = row.names
		c.order(row.policies...)
		if err := askOnce(client, server.at(false, 8080)); (err == nil) != row.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := server.node.proxy.pod(server.name)
	stranger := &pod{p: d.p, id: idOf("stranger")}
	stranger.facts.Store(d.facts.Load())
	c.order(named("all", mesh.Deny))
	at := policy.Connection{Source: client.v4, Destination: server.at(false, 8080)}
	if v := stranger.law(d.p.know.world()).set.Decide(&at); v.Allowed {
		t.Errorf("a pod that the World does not know: %s", v)
	}
	c.order()
	if v := stranger.law(d.p.know.world()).set.Decide(&at); !v.Allowed {
		t.Errorf("without policies: %s", v)
	}
}

func named(name string, action mesh.Action) *mesh.Policy {
	return &mesh.Policy{Namespace: "default", Name: name, Scope: mesh.Named, Action: action, Rules: []mesh.Rule{{}}}
}

// A dry run decides nothing, and is told.
func TestDryRunIsTold(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	p := deny("no-client", "client")
	p.DryRun = true
	c.order(p)
	if err := askOnce(client, server.at(false, 8080)); err != nil {
		t.Error(err)
	}
	await(t, "the log tells", func() bool {
		return strings.Contains(c.log.text(), `dry_run="denied by rule 0 of policy default/no-client"`)
	})
	if n := c.nodes[1].count("tacit_policy_dry_runs_total"); n != 1 {
		t.Errorf("%v counted: want 1", n)
	}
}

// Where plaintext is denied, who says nothing for the time of a look may still begin with TLS,
// and the application is not dialled for it.
func TestLateClientHelloWherePlaintextIsDenied(t *testing.T) {
	c := newCluster(t)
	member, server := c.pod("member"), c.pod("server")
	n := c.node(func(cfg *Config) { cfg.LookLimit = 10 * time.Millisecond })
	n.enroll(server)
	member.wl.Enrolled = true
	app := server.serve(8080, echo)
	c.order(allow("member", "member"))
	conn, err := member.bare(40000, server.at(false, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if b, err := io.ReadAll(conn); len(b) > 0 || !isTimeout(err) {
		t.Errorf("read %q, %v: want nothing, and no end", b, err)
	}
	conn.SetDeadline(time.Now().Add(limit))
	_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{direct.ALPN}}).Handshake()
	await(t, "it is refused as TLS without a certificate", func() bool {
		return n.count("tacit_refused_connections_total", "direction=inbound", "reason=no_certificate") == 1
	})
	if len(app.seen) != 0 {
		t.Error("the application was dialled")
	}
}

// Under load, while policies come and go: when one that denies has settled, nothing that it
// denies is open, and nothing comes through any more.
func TestNoGapInTime(t *testing.T) {
	c, client, server := pair(t)
	var open atomic.Int64
	server.serve(8080, func(conn *net.TCPConn) { open.Add(1); defer open.Add(-1); echo(conn) })
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				conn, err := client.dial(server.at(false, 8080))
				if err == nil {
					conn.Write([]byte("hello"))
					io.ReadFull(conn, make([]byte, 5))
					conn.Close()
				}
			}
		})
	}
	for range 10 {
		c.order(deny("no-client", "client"))
		await(t, "nothing is open", func() bool { return open.Load() == 0 })
		c.order()
		await(t, "something comes through", func() bool { return open.Load() > 0 })
	}
}

// Passages are found by their source, whatever the order in which they come and go.
func TestPassages(t *testing.T) {
	var s passages
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i % 3)}) }
	var all []*passage
	for i := range 9 {
		p := &passage{connection: policy.Connection{Source: at(i)}}
		s.enter(p)
		all = append(all, p)
	}
	for _, i := range []int{4, 0, 8, 7, 1, 2, 5, 3, 6} {
		for source := range 3 {
			want := 0
			for j, p := range all {
				if p != nil && j%3 == source {
					want++
				}
			}
			if got := s.list([]netip.Addr{at(source)}); len(got) != want {
				t.Fatalf("%d of source %d: want %d", len(got), source, want)
			}
		}
		s.leave(all[i])
		all[i] = nil
	}
	if len(s.from) != 0 || s.open != 0 || len(s.list(nil)) != 0 {
		t.Errorf("left over: %+v", s.from)
	}
}
