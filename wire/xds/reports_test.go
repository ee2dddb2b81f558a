package xds

import (
	"cmp"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// told is what a control hears: full lists and changes.
type told struct {
	node string
	all  []Report // nil for a change
	one  Report
}

func listen(heard chan told) ServerConfig {
	return ServerConfig{
		OnReports: func(node string, all []Report) {
			slices.SortFunc(all, func(a, b Report) int { return cmp.Compare(a.UID, b.UID) })
			heard <- told{node: node, all: all}
		},
		OnReport: func(node string, r Report) { heard <- told{node: node, one: r} },
	}
}

func report(uid string, state PodState) Report {
	return Report{UID: uid, Namespace: "ns", Name: uid, State: state}
}

func expectTold(t *testing.T, heard chan told, want told) {
	t.Helper()
	got := receiveWithin(t, "a report", heard)
	if d := gocmp.Diff(want, got, gocmp.AllowUnexported(told{})); d != "" {
		t.Fatalf("(-want +got):\n%s", d)
	}
}

// Each connection opens with everything, then changes follow.
func TestReports(t *testing.T) {
	heard := make(chan told, 100)
	c := startControl(t, listen(heard))
	cut := newCutter(t, c, "n1")
	client := NewPodClient(ClientConfig{Conn: cut.agent, Node: "n1"}, func([]mesh.Pod) {})
	a, b := report("a", Captured), report("b", Unprotected)
	b.Reason = "the table is gone"
	client.Report(report("a", Unprotected))
	client.Report(a)
	client.Report(b)
	client.Report(report("z", Released)) // nothing to say of it
	run(t, client)
	expectTold(t, heard, told{node: "n1", all: []Report{a, b}})

	b = report("b", Captured)
	client.Report(b)
	expectTold(t, heard, told{node: "n1", one: b})
	client.Report(report("a", Released))
	expectTold(t, heard, told{node: "n1", one: report("a", Released)})
	cut.cut()
	expectTold(t, heard, told{node: "n1", all: []Report{b}})

	c.stop()
	client.Report(report("b", Released))
	d := report("d", Captured)
	client.Report(d)
	c.start(t, listen(heard))
	for got := receiveWithin(t, "a report", heard); ; got = receiveWithin(t, "a report", heard) {
		if got.all != nil && gocmp.Equal(got.all, []Report{d}) {
			break
		}
		if got.all != nil {
			t.Fatalf("after a new control: %+v: want d alone", got.all)
		}
	}
}

// An agent without pods says so.
func TestReportsOfNothing(t *testing.T) {
	heard := make(chan told, 100)
	c := startControl(t, listen(heard))
	run(t, NewPodClient(ClientConfig{Conn: c.dialAgent(t, "n1"), Node: "n1"}, func([]mesh.Pod) {}))
	expectTold(t, heard, told{node: "n1", all: []Report{}})
	c.until(t, "the agent is known", func() bool { n := c.Nodes(); return len(n) == 1 && n[0].Agent })
}

// A new agent's word counts, and the older stream ends.
func TestNewAgentReplacesOld(t *testing.T) {
	heard := make(chan told, 100)
	c := startControl(t, listen(heard))
	conn := c.dialAgent(t, "n1")
	old, err := message.NewEnrollmentClient(conn).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Send(&message.PodReport{Synced: true, Sequence: 1}); err != nil {
		t.Fatal(err)
	}
	expectTold(t, heard, told{node: "n1", all: []Report{}})
	run(t, NewPodClient(ClientConfig{Conn: c.dialAgent(t, "n1"), Node: "n1"}, func([]mesh.Pod) {}))
	expectTold(t, heard, told{node: "n1", all: []Report{}})
	for err = nil; err == nil; {
		_, err = old.Recv()
	}
	if !strings.Contains(err.Error(), "another agent") {
		t.Errorf("the older stream: %v", err)
	}
}

// A compromised proxy has its own token, and cannot say for the agent what is captured.
func TestProxyReportsNothing(t *testing.T) {
	heard := make(chan told, 100)
	reg := prometheus.NewRegistry()
	cfg := listen(heard)
	cfg.Registry = reg
	c := startControl(t, cfg)
	g, err := message.NewEnrollmentClient(c.dial(t, "n1")).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// The server may end the stream before it is written to.
	if err := g.Send(&message.PodReport{Synced: true, Sequence: 1}); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if _, err := g.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v: want PermissionDenied", err)
	}
	if len(heard) != 0 {
		t.Errorf("control heard %d reports", len(heard))
	}
	if n := count(t, reg, "tacit_xds_streams_refused_total"); n != 1 {
		t.Errorf("%v refusals counted: want 1", n)
	}
}

func TestReportRefuses(t *testing.T) {
	for name, m := range map[string]*message.PodReport{
		"no state":      {Uid: "a"},
		"unknown state": {Uid: "a", State: 9},
		"no uid":        {State: message.PodState_POD_STATE_CAPTURED},
		"long reason":   {Uid: "a", State: message.PodState_POD_STATE_CAPTURED, Reason: strings.Repeat("x", 5*maxName)},
		"no address":    {Uid: "a", State: message.PodState_POD_STATE_CAPTURED, Addresses: [][]byte{{10, 1, 2}}},
		"too many":      {Uid: "a", State: message.PodState_POD_STATE_CAPTURED, Addresses: make([][]byte, maxAddresses+1)},
	} {
		if r, err := decodeReport(m); err == nil {
			t.Errorf("%s: taken as %+v", name, r)
		}
	}
	for _, s := range []PodState{Captured, Released, Unprotected} {
		want := report("a", s)
		want.MarkedPorts = s == Captured
		want.Addresses = []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::3")}
		got, err := decodeReport(encodeReport(want, 1))
		if d := gocmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" || err != nil {
			t.Errorf("%v, (-want +got):\n%s", err, d)
		}
	}
}
