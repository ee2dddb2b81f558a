package proxy

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
)

// trust makes this the trust of a node, and returns when that has settled.
func (n *node) trust(trust mesh.Trust) {
	n.c.t.Helper()
	told := mesh.Changes{Places: []*mesh.Place{{Name: "trust", Trust: trust}}}
	select {
	case <-n.proxy.Apply(told):
	case <-time.After(limit):
		n.c.t.Fatal("the trust does not settle")
	}
}

// Each side ends what it has with an identity that is revoked, whichever side that is on, and
// however far the other node is behind. Others are not touched.
func TestRevoked(t *testing.T) {
	for name, row := range map[string]struct {
		node   int // that has heard
		who    string
		reason string
	}{
		"a client, at the server":  {1, "client", "revoked"},
		"a server, at the client":  {0, "server", "revoked"},
		"a client, at its own end": {0, "client", "own_revoked"},
		"a server, at its own end": {1, "server", "own_revoked"},
	} {
		t.Run(name, func(t *testing.T) {
			c, client, other, stranger, server := trio(t)
			server.serve(8080, echo)
			at := server.at(false, 8080)
			var open, untouched []net.Conn
			for _, to := range []bool{false, true} {
				open = append(open, mustDial(t, client, server.at(to, 8080)))
				if row.who == "client" {
					untouched = append(untouched, mustDial(t, other, server.at(to, 8080)))
				}
			}
			untouched = append(untouched, mustDial(t, stranger, at)) // it proves nothing
			for _, conn := range append(open, untouched...) {
				say(t, conn, "hello")
			}
			if err := askOnce(client, at); err != nil {
				t.Fatal(err)
			}
			await(t, "both sides keep a connection", func() bool { return c.keeps() == 2 })
			n := c.nodes[row.node]
			begin := time.Now()
			n.trust(mesh.Trust{Revoked: []mesh.ID{idOf("somebody"), idOf(row.who)}})
			for _, conn := range open {
				if !isReset(conn) {
					t.Error("an open connection is not reset")
				}
			}
			await(t, "it keeps nothing", func() bool { return n.count("tacit_kept_connections") == 0 })
			if took := time.Since(begin); took > time.Second {
				t.Errorf("it took %v", took)
			}
			await(t, "nor does the other node", func() bool { return c.keeps() == 0 })
			for _, conn := range untouched {
				say(t, conn, "still here")
			}
			if n := n.count("tacit_trust_resets_total", "reason=revoked"); n < 2 {
				t.Errorf("%v ends counted: want 2 of open ones", n)
			}
			if err := askOnce(client, at); err == nil {
				t.Error("a new connection is served")
			}
			await(t, "the log says why", func() bool {
				return strings.Contains(c.log.text(), `reason="`+row.reason+": "+idOf(row.who).String()+" is revoked")
			})
			n.trust(mesh.Trust{})
			if err := askOnce(client, at); err != nil {
				t.Errorf("when it is taken back: %v", err)
			}
		})
	}
}

// Who is revoked while the handshake or the reply is under way is refused after it.
func TestRevokedDuringTheHandshake(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	conn := mustDial(t, client, server.at(false, 8080))
	say(t, conn, "hello")
	d := client.node.proxy.pod(client.name)
	var pc *peerConn
	for _, q := range d.p.queues.list(nil) {
		pc = q.peer.Load()
	}
	c.nodes[0].trust(mesh.Trust{Revoked: []mesh.ID{server.wl.ID}})
	err := (&journey{d: d, queued: &queued{}}).prove(pc)
	if r := refusalOf(err); err == nil || r.reason != reasonRevoked || !errors.As(err, new(*finalError)) {
		t.Errorf("%v: want %s, and no other endpoint", err, reasonRevoked)
	}
	target := target{addr: server.at(false, 8080), workload: server.wl.Peer(), direct: true}
	if d.isThere(target, d.p.know.world()) {
		t.Error("it would be dialed after the wait")
	}
}

// Connections between members of the mesh end at their age. Those from outside prove nothing
// that could be too old.
func TestMaxConnectionAge(t *testing.T) {
	c, client, _, stranger, server := trio(t)
	server.serve(8080, echo)
	c.nodes[1].trust(mesh.Trust{MaxAge: time.Second})
	begin := time.Now()
	old, outside := mustDial(t, client, server.at(false, 8080)), mustDial(t, stranger, server.at(false, 8080))
	say(t, old, "hello")
	say(t, outside, "hello")
	if !isReset(old) {
		t.Error("an old connection is not reset")
	}
	if age := time.Since(begin); age < 900*time.Millisecond {
		t.Errorf("it is reset at the age of %v", age)
	}
	say(t, outside, "still here")
	await(t, "the log says why", func() bool { return strings.Contains(c.log.text(), `reason="max_age: it is older than`) })
	if n := c.nodes[1].count("tacit_trust_resets_total", "reason=max_age"); n != 1 {
		t.Errorf("%v ends counted: want 1", n)
	}
}

// With a bound of age a connection ends no later than the certificates that were shown for it.
func TestOverdue(t *testing.T) {
	_, client, server := pair(t)
	server.serve(8080, echo)
	say(t, mustDial(t, client, server.at(false, 8080)), "hello")
	d := client.node.proxy.pod(client.name)
	all := d.p.queues.list(nil)
	if len(all) != 1 {
		t.Fatalf("%d connections: want 1", len(all))
	}
	pc, q := *all[0].peer.Load(), &queued{}
	q.proves(&pc)
	early, late := pc.Peer().NotAfter.Add(-time.Second), pc.Peer().NotAfter.Add(time.Second)
	pc.leaf = &identity.Leaf{ID: client.wl.ID, NotAfter: late.Add(time.Hour)}
	for _, row := range []struct {
		now    time.Time
		most   time.Duration
		reason string
	}{
		{early, 0, ""},
		{late, 0, ""},
		{early, 1000 * time.Hour, ""},
		{late, 1000 * time.Hour, identity.ReasonExpired},
		{pc.born.Add(time.Minute), 2 * time.Minute, ""},
		{pc.born.Add(2 * time.Minute), 2 * time.Minute, reasonMaxAge},
	} {
		why := q.overdue(row.now, row.most)
		if got := ""; why != nil {
			if got = why.reason; got != row.reason {
				t.Errorf("at %s with %s: %s, want %q", row.now, row.most, got, row.reason)
			}
		} else if row.reason != "" {
			t.Errorf("at %s with %s: it goes on, want %s", row.now, row.most, row.reason)
		}
	}
	pc.leaf = &identity.Leaf{ID: client.wl.ID, NotAfter: early}
	if why := q.overdue(early.Add(time.Millisecond), 1000*time.Hour); why == nil || why.reason != "own_expired" {
		t.Errorf("%v after the end of the own certificate", why)
	}
}
