package proxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

func testPairs(most int) *Pairs {
	world := &mesh.World{}
	s := newPairs(prometheus.NewRegistry(), func() *mesh.World { return world })
	s.most = most
	return s
}

// pairFlow is one that came in by mutual TLS, to that port.
func pairFlow(port uint16) *mesh.Flow {
	f := telemetryFlow()
	f.Reporter = mesh.ByDestination
	f.DestinationAddr = netip.AddrPortFrom(f.DestinationAddr.Addr(), port)
	return f
}

func TestHowConnectionsCount(t *testing.T) {
	for _, row := range []struct {
		reporter mesh.Reporter
		security mesh.Security
		flags    string
		want     mesh.Crossing
	}{
		{mesh.ByDestination, mesh.MutualTLS, "", mesh.CrossedByTLS},
		{mesh.BySource, mesh.MutualTLS, "", ""}, // the destination's node tells of it
		{mesh.ByDestination, mesh.Plaintext, "", mesh.PlaintextIn},
		{mesh.BySource, mesh.Plaintext, "", mesh.PlaintextOut},
		{mesh.ByDestination, mesh.MutualTLS, flagDenied, mesh.Denied},
		{mesh.BySource, mesh.MutualTLS, flagDenied, ""},
		{mesh.BySource, mesh.Plaintext, flagDenied, mesh.Denied},
		{mesh.BySource, mesh.Plaintext, flagUpstreamFailure, ""}, // never was there
	} {
		f := pairFlow(80)
		f.Reporter, f.Security, f.Flags = row.reporter, row.security, row.flags
		s := testPairs(10)
		s.end(s.begin(f), f)
		seen, _ := s.Take(10)
		got := mesh.Crossing("")
		if len(seen.List) == 1 {
			got = seen.List[0].Crossing
		}
		if got != row.want || seen.Other != 0 {
			t.Errorf("%+v: told %v", row, seen)
		}
	}
}

// What was told once is told again only if control did not get it; and what is told is what
// differs.
func TestPairsAreToldOnce(t *testing.T) {
	s, f := testPairs(10), pairFlow(80)
	open := s.begin(f)
	s.end(s.begin(f), f)
	want := func(what string, connections, bytes uint64) {
		t.Helper()
		seen, more := s.Take(10)
		if more || len(seen.List) != 1 || seen.List[0].Connections != connections || seen.List[0].Bytes != bytes || seen.List[0].Check() != nil {
			t.Errorf("%s: told %+v, want %d connections, %d bytes", what, seen, connections, bytes)
		}
	}
	want("first", 2, 10)
	want("control did not take it", 2, 10)
	s.Kept()
	if seen, more := s.Take(10); len(seen.List) > 0 || more {
		t.Errorf("told %v again", seen)
	}
	f.Closed = f.Closed.Add(time.Second)
	s.end(open, f)
	want("the other one ended", 0, 10)
	s.end(s.begin(f), f) // after Take, before Kept
	s.Kept()
	want("what came meanwhile", 1, 10)
}

// There is room for so many pairs. Others are counted, and those make room that control has
// and nobody uses.
func TestPairsAreBounded(t *testing.T) {
	s := testPairs(2)
	open := pairFlow(1)
	s.begin(open)
	quiet := pairFlow(2)
	s.end(s.begin(quiet), quiet)
	late := pairFlow(3)
	if p := s.begin(late); p != nil {
		t.Error("there was room for a third")
	} else {
		s.end(p, late)
	}
	seen, more := s.Take(1)
	if len(seen.List) != 1 || !more || seen.Other != 1 {
		t.Errorf("told %v, more %v", seen, more)
	}
	seen, _ = s.Take(2)
	if s.Kept(); len(seen.List) != 2 || seen.Other != 1 {
		t.Errorf("told %v", seen)
	}
	late.Opened = quiet.Closed.Add(pairIdle + sweepPairsEvery)
	late.Closed = late.Opened
	if s.end(s.begin(late), late); len(s.of) != 2 {
		t.Errorf("%d pairs", len(s.of))
	}
	seen, _ = s.Take(2)
	if len(seen.List) != 1 || seen.List[0].Port != 3 || seen.Other != 0 {
		t.Errorf("told %v", seen)
	}
}

func TestPairsAllocateNothing(t *testing.T) {
	s, f := testPairs(10), pairFlow(80)
	s.end(s.begin(f), f)
	if n := testing.AllocsPerRun(100, func() { s.end(s.begin(f), f) }); n > 0 {
		t.Errorf("%v allocations for a connection: want none", n)
	}
}

func BenchmarkPairs(b *testing.B) {
	s, f := testPairs(10), pairFlow(80)
	for b.Loop() {
		s.end(s.begin(f), f)
	}
}

// told is what the node would tell control, as text.
func (n *node) told() string {
	seen, _ := n.proxy.pairs.Take(100)
	var all []string
	for _, p := range seen.List {
		all = append(all, fmt.Sprintf("%s %s->%s %d", p.Crossing, p.Source, p.Destination, p.Connections))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// Each connection is told once, by the node that it is for, as what it was.
func TestPairsOfANode(t *testing.T) {
	c, client, other, stranger, server := trio(t)
	server.serve(8080, echo)
	stranger.serve(8080, echo)
	c.order(deny("no-other", "other"))
	for range 2 {
		for _, from := range []*testPod{client, stranger} {
			if err := askOnce(from, server.at(false, 8080)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := askOnce(client, stranger.at(false, 8080)); err != nil {
		t.Fatal(err)
	}
	if err := firstRead(other.dial(server.at(false, 8080))); !isRST(err) {
		t.Errorf("who is denied: %v, want a reset", err)
	}
	for i, want := range []string{
		"plaintext out default/client->default/stranger 1",
		"denied default/other->default/server 1, mtls default/client->default/server 2, plaintext in default/stranger->default/server 2",
	} {
		await(t, "node "+strconv.Itoa(i)+" tells "+want, func() bool { return c.nodes[i].told() == want })
	}
}
