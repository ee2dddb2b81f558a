package proxy

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tacit.dev/wire/handle"
)

// drainingPair is a pair whose client's proxy may drain for that long.
// quiet is DrainQuiet, 0 for the node's own.
func drainingPair(t *testing.T, most, quiet time.Duration) (n *node, client, server *testPod) {
	c := newCluster(t)
	client, server = c.pod("client"), c.pod("server")
	n1, n2 := c.node(func(cfg *Config) { cfg.Drain, cfg.DrainQuiet = most, orDefault(quiet, cfg.DrainQuiet) }), c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	return n1, client, server
}

// drain has n drain, and closes the channel when it is not needed any more.
func (n *node) drain(ctx context.Context) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.proxy.Drain(ctx)
	}()
	await(n.c.t, "it drains", func() bool { return n.proxy.Ready() == errDraining })
	return done
}

func TestAProxyThatDrainsServesUntilNobodyNeedsIt(t *testing.T) {
	n, client, server := drainingPair(t, time.Hour, 0)
	kept := mustDial(t, client, server.at(false, 1))
	say(t, kept, "kept for the next one")
	kept.Close()
	await(t, "it is kept", func() bool { return n.count("tacit_kept_connections") == 1 })
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	done := n.drain(t.Context())
	for range 3 {
		more := mustDial(t, client, server.at(false, 1))
		say(t, more, "new")
		more.Close()
	}
	say(t, conn, "while it drains")
	await(t, "nothing is kept", func() bool { return n.count("tacit_kept_connections") == 0 })
	n.c.publish() // it acknowledges, or nothing could be withdrawn
	await(t, "the World is settled", func() bool { return isClosed(n.proxy.Apply(n.c.told())) })
	if isClosed(done) {
		t.Fatal("it ends with a connection open")
	}
	conn.Close()
	<-done
	n.stop()
}

// At last it accepts nothing, so that nothing is reset that has just begun.
func TestAProxyThatDrainsEndsWhenItsTimeIsOver(t *testing.T) {
	n, client, server := drainingPair(t, time.Second, 0)
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	done := n.drain(t.Context())
	await(t, "the listeners are left to others", func() bool { return !n.proxy.pod(client.name).listens() })
	waits := mustDial(t, client, server.at(false, 1)) // in the backlog
	waits.Write([]byte("served"))
	n.agent.add(client) // the agent does not know
	say(t, conn, "still here")
	<-done
	if n.proxy.pod(client.name).listens() {
		t.Error("it accepts again")
	}
	n.stop()
	if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
		t.Errorf("what is open ends with %v: want a reset", err)
	}
	waits.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := waits.Read(make([]byte, 1)); err.(net.Error) == nil || !err.(net.Error).Timeout() {
		t.Errorf("what waits for the next proxy ends with %v", err)
	}
}

// When another proxy serves the pods, only what is open is waited for.
func TestAProxyThatHasYieldedEndsWithItsLastConnection(t *testing.T) {
	n, client, server := drainingPair(t, time.Hour, time.Hour)
	conn := mustDial(t, client, server.at(false, 1))
	say(t, conn, "before")
	n.agent.send(handle.Yield, client.name)
	await(t, "the listeners are let go", func() bool { return !n.proxy.pod(client.name).listens() })
	done := n.drain(t.Context())
	say(t, conn, "still here")
	if isClosed(done) {
		t.Fatal("it ends with a connection open")
	}
	conn.Close()
	<-done
}

func TestASecondSignalEndsADrain(t *testing.T) {
	n, client, server := drainingPair(t, time.Hour, 0)
	say(t, mustDial(t, client, server.at(false, 1)), "before")
	ctx, cancel := context.WithCancel(t.Context())
	done := n.drain(ctx)
	cancel()
	<-done
}

// Whoever has a listener last resets nothing when it goes: what has come is served, and what
// comes then is not answered, and comes again.
func TestTheLastToHaveAListenerResetsNothing(t *testing.T) {
	n, client, server := drainingPair(t, time.Second, 0)
	closeAll(client.files) // the agent has gone
	client.files = nil
	over := make(chan struct{})
	var dialers sync.WaitGroup
	var failed, served atomic.Int64
	for range 4 {
		dialers.Go(func() {
			for !isClosed(over) {
				switch err := hasEcho(client, server.at(false, 1)); {
				case err == nil:
					served.Add(1)
				case !isTimeout(err):
					failed.Add(1)
				}
			}
		})
	}
	<-n.drain(t.Context())
	close(over)
	dialers.Wait()
	if failed.Load() > 0 || served.Load() == 0 {
		t.Errorf("%d connections were reset, %d served", failed.Load(), served.Load())
	}
}

// hasEcho has a short connection, for which nobody waits long.
func hasEcho(p *testPod, to netip.AddrPort) error {
	c, err := p.dialWithin(to, 50*time.Millisecond)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}
