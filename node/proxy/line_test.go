package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

var (
	here  = line{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddrPort("10.0.0.2:80")}
	other = line{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddrPort("10.0.0.2:81")}
)

func TestLineOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLines()
		first, second, elsewhere := l.join(here), l.join(here), l.join(other)
		began := time.Now()
		first.await(t.Context())
		elsewhere.await(t.Context())
		time.AfterFunc(time.Millisecond, first.leave)
		second.await(t.Context())
		if took := time.Since(began); took != time.Millisecond {
			t.Errorf("the second went after %v: want 1ms, when the first had left", took)
		}
		second.leave()
		second.leave()
		elsewhere.leave()
		if len(l.last) != 0 {
			t.Errorf("%d lines are left", len(l.last))
		}
	})
}

func TestLineLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLines()
		stuck, second, third := l.join(here), l.join(here), l.join(here)
		began := time.Now()
		second.await(t.Context())
		if took := time.Since(began); took != lineLimit {
			t.Errorf("waited %v for one who is stuck: want %v", took, lineLimit)
		}
		second.leave()
		third.await(t.Context())
		if took := time.Since(began); took != lineLimit {
			t.Errorf("the third went after %v: want %v", took, lineLimit)
		}
		stuck.leave()
		third.leave()
		if len(l.last) != 0 {
			t.Errorf("%d lines are left", len(l.last))
		}
	})
}

func TestLineContext(t *testing.T) {
	l := newLines()
	first, second := l.join(here), l.join(here)
	defer first.leave()
	defer second.leave()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	began := time.Now()
	second.await(ctx)
	if took := time.Since(began); took >= lineLimit {
		t.Errorf("waited %v though ctx had ended", took)
	}
}

// TestArrivalOrder makes two connections one after the other, many times: the
// application accepts the first one first. So it is also while the announcement of
// the pod is news, and every connection is looked at.
func TestArrivalOrder(t *testing.T) {
	for name, grace := range map[string]time.Duration{"known": 0, "news": time.Minute} {
		t.Run(name, func(t *testing.T) { testArrivalOrder(t, grace) })
	}
}

func testArrivalOrder(t *testing.T, grace time.Duration) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	c.node(nil).enroll(client)
	c.node(func(cfg *Config) { cfg.AnnounceGrace = grace }).enroll(server)
	type word struct {
		port uint16
		said byte
	}
	words := make(chan word, 2)
	app := server.serve(1, func(c *net.TCPConn) {
		b := make([]byte, 1)
		io.ReadFull(c, b)
		words <- word{uint16(c.RemoteAddr().(*net.TCPAddr).Port), b[0]}
	})
	for i := range 100 {
		first, second := mustDial(t, client, server.at(false, 1)), mustDial(t, client, server.at(false, 1))
		first.Write([]byte("1"))
		second.Write([]byte("2"))
		said := map[uint16]byte{}
		for range 2 {
			w := <-words
			said[w.port] = w.said
		}
		if got := said[(<-app.seen).Port()]; got != '1' {
			t.Fatalf("round %d: the connection that says %q was accepted first", i, got)
		}
		<-app.seen
		first.Close()
		second.Close()
	}
}
