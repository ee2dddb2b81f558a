package proxy

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"weak"

	"tacit.dev/wire/handle"
)

func TestDrainWaitsForTheLastConnection(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	n := c.nodes[0]
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	client.capture("drain-kept.nft")
	client.keep(conn)
	n.agent.send(handle.Drain, client.name)
	await(t, "the pod drains", func() bool { return n.proxy.pod(client.name).stateNow() == draining })
	say(t, conn, "while it drains")
	if len(n.agent.told) > 0 {
		t.Fatalf("told %v with a connection open", <-n.agent.told)
	}
	conn.Close()
	n.agent.expect(t, handle.Drained, client.name)
	n.agent.add(client) // enrolled again, with the same listeners
	n.agent.expect(t, handle.Ready, client.name)
	client.capture("capture.nft")
	say(t, mustDial(t, client, server.at(false, 1)), "again")
	if l := len(n.proxy.pod(client.name).listeners); l != 4 {
		t.Errorf("%d listeners: want the 4 there were", l)
	}
}

func TestDrainServesTheBacklog(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(nil), c.node(nil)
	n2.enroll(server)
	server.serve(1, echo)
	client.listen()
	client.capture("capture.nft")
	conn := mustDial(t, client, server.at(false, 1)) // waits in the backlog: nobody accepts yet
	c.publish()
	n1.agent.add(client)
	n1.agent.send(handle.Drain, client.name)
	say(t, conn, "served")
	conn.Close()
	n1.agent.expect(t, handle.Drained, client.name)
}

// What another proxy accepts from now on is none of ours; what we have goes on.
func TestYieldedListenersAreAnothers(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	n := c.nodes[0]
	d := n.proxy.pod(client.name)
	accepted := d.accepted.Load()
	n.agent.send(handle.Yield, client.name)
	await(t, "the listeners are let go", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.listeners) == 0
	})
	waits := mustDial(t, client, server.at(false, 1)) // in the backlog
	say(t, conn, "still here")
	if now := d.accepted.Load(); now != accepted {
		t.Errorf("accepted %d more", now-accepted)
	}
	n.agent.add(client) // in the other proxy's place
	say(t, waits, "served")
}

func TestRemovedPodIsReset(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "hello")
	c.nodes[1].agent.send(handle.Remove, server.name)
	if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
		t.Errorf("read: %v, want a reset", err)
	}
	await(t, "it is forgotten", func() bool { return len(c.nodes[1].proxy.Pods()) == 0 })
}

func TestAgentRestartDisturbsNothing(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	n := c.nodes[0]
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	n.agent.stop()
	say(t, conn, "without agent")
	say(t, mustDial(t, client, server.at(false, 1)), "new, with a socket that was left")
	n.agent = c.startAgent(n.path, client)
	n.agent.expect(t, handle.Ready, client.name)
	say(t, conn, "after")
	for range 3 * minLevel { // more than were left
		say(t, mustDial(t, client, server.at(false, 1)), "new, after")
	}
	n.agent.mu.Lock()
	held := n.agent.held
	n.agent.mu.Unlock()
	if len(held) != 1 || held[0].UID != client.name || len(held[0].Roles) != 4 {
		t.Errorf("held %v: want the pod and its 4 listeners", held)
	}
	if l := len(n.proxy.pod(client.name).listeners); l != 4 {
		t.Errorf("%d listeners: want 4", l)
	}
}

// No connection fails for want of a socket, however many there are and however long they
// stay, while nobody is there to make any.
func TestConnectionsGoOnWithoutAgents(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	for _, n := range c.nodes {
		await(t, "the pod has sockets", func() bool {
			return !slices.ContainsFunc(n.proxy.list(), func(d *pod) bool { return d.sockets4.ready() == 0 || d.sockets6.ready() == 0 })
		})
		n.agent.stop()
	}
	both(t, func(t *testing.T, v6 bool) {
		for range 5 * maxLevel { // all are open at once
			conn := mustDial(t, client, server.at(v6, 1))
			t.Cleanup(func() { conn.Close() })
			say(t, conn, "stays")
		}
		var failed, i atomic.Int64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i.Add(1) <= 600 {
					if askOnce(client, server.at(v6, 1)) != nil {
						failed.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if n := failed.Load(); n > 0 {
			t.Errorf("%d of 600 connections failed", n)
		}
	})
}

func TestAgentWithoutSocketsIsNoHang(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(nil), c.node(nil)
	n1.agent.mu.Lock()
	n1.agent.broken = true
	n1.agent.mu.Unlock()
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	if err := firstRead(client.dial(server.at(false, 1))); !isRST(err) {
		t.Errorf("%v: want a reset", err)
	}
	if n := n1.count("tacit_refused_connections_total", "reason=no_socket"); n != 1 {
		t.Errorf("%v counted: want 1", n)
	}
	n1.agent.mu.Lock()
	n1.agent.broken = false
	n1.agent.mu.Unlock()
	say(t, mustDial(t, client, server.at(false, 1)), "hello")
}

func TestStoppedProxyResetsAndTheBacklogWaits(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "hello")
	n := c.nodes[0]
	n.stop()
	if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
		t.Errorf("read: %v, want a reset", err)
	}
	waiting := mustDial(t, client, server.at(false, 1)) // the listener is the agent's too
	waiting.Write([]byte("patience"))
	n.agent.stop()
	next := c.node(nil)
	next.proxy.Apply(c.told())
	next.agent.add(client)
	b := make([]byte, 8)
	if _, err := io.ReadFull(waiting, b); err != nil || string(b) != "patience" {
		t.Errorf("read %q, %v", b, err)
	}
}

// No descriptor and no goroutine more after many connections than before.
func TestNothingLeaks(t *testing.T) {
	rounds := 2000
	if os.Getenv("TACIT_SOAK") != "" {
		rounds = 10_000
	}
	c, client, server := pair(t)
	server.serve(1, echo)
	server.serve(2, func(c *net.TCPConn) { c.SetLinger(0) })
	for i := range 200 { // what is kept, is kept now
		if err := askOnce(client, server.at(i%2 == 0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	goroutines, files := c.settle(t, client)
	var failed, i atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for n := i.Add(1); n <= int64(rounds); n = i.Add(1) {
				switch n % 10 {
				case 0: // reset by the server
					firstRead(client.dial(server.at(n%20 == 0, 2)))
				case 1: // refused
					firstRead(client.dial(server.at(n%20 == 1, 9)))
				default:
					if askOnce(client, server.at(n%4 == 2, 1)) != nil {
						failed.Add(1)
					}
				}
			}
		})
	}
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d connections failed", n, rounds)
	}
	c.nothingLeft(t, client, goroutines, files)
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir(filepath.Join("/proc", "self", "fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// The key of an identity goes with the last pod that has it: nothing of this process leads to it
// any more, neither a session nor a kept connection.
func TestKeysGoWithTheLastPod(t *testing.T) {
	c, client, server := pair(t)
	server.serve(1, echo)
	n := c.nodes[0]
	twin := c.pod("twin")
	twin.wl.ID = client.wl.ID
	n.enroll(twin)
	for _, p := range []*testPod{client, twin, client} { // sessions are resumed, connections kept
		if err := askOnce(p, server.at(false, 1)); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := n.proxy.cfg.Leaves.Leaf(client.wl.ID)
	if err != nil {
		t.Fatal(err)
	}
	key := weak.Make(leaf.Certificate)
	leaf = nil
	isThere := func() bool { runtime.GC(); return key.Value() != nil }
	n.agent.send(handle.Remove, client.name)
	await(t, "the first is gone", func() bool { return len(n.proxy.Pods()) == 1 })
	say(t, mustDial(t, twin, server.at(false, 1)), "as before")
	if !isThere() {
		t.Error("the key is gone, and one pod still has it")
	}
	n.agent.send(handle.Remove, twin.name)
	await(t, "the key is gone", func() bool { return !isThere() })
}
