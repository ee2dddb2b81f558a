package xds

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

func testPair(port uint16) mesh.Pair {
	return mesh.Pair{
		Way: mesh.Way{
			Source:      mesh.Party{Where: mesh.Outside, Block: netip.MustParsePrefix("203.0.113.0/24")},
			Destination: mesh.Party{Where: mesh.AtWorkload, Namespace: "shop", Workload: "web", Account: "web"},
			Port:        port, Crossing: mesh.PlaintextIn, Reporter: mesh.ByDestination,
		},
		Connections: 3, Bytes: 1 << 40, First: time.UnixMilli(1_000), Last: time.UnixMilli(2_000),
	}
}

// testObserver has a list, of which it forgets what was kept.
type testObserver struct {
	mu    sync.Mutex
	list  []mesh.Pair
	taken int
	other uint64
}

func (o *testObserver) Take(most int) (mesh.Pairs, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.taken = min(most, len(o.list))
	return mesh.Pairs{List: o.list[:o.taken], Other: o.other}, o.taken < len(o.list)
}

func (o *testObserver) Kept() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list, o.other = o.list[o.taken:], 0
}

func (o *testObserver) add(p mesh.Pair) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = append(o.list, p)
}

// awaitKept waits until control has everything.
func (o *testObserver) awaitKept(t *testing.T) {
	t.Helper()
	left := func() int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.list)
	}
	for limit := time.Now().Add(20 * time.Second); left() > 0; runtime.Gosched() {
		if time.Now().After(limit) {
			t.Fatal("control does not take it")
		}
	}
}

// What a proxy saw reaches control once, in reports of bounded length, also if control is away
// for a while.
func TestPairsAreTold(t *testing.T) {
	heard := make(chan mesh.Pairs, 100)
	cfg := ServerConfig{OnPairs: func(node string, seen mesh.Pairs) {
		if node == "n1" {
			heard <- seen
		}
	}}
	c := startControl(t, cfg)
	o := &testObserver{other: 7}
	for i := range mesh.MaxPairsTold + 2 {
		o.add(testPair(uint16(i + 1)))
	}
	want := append([]mesh.Pair{}, o.list...)
	client := NewPairClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1", Log: testLog(t)}, o)
	client.every = time.Millisecond
	run(t, client)
	first, second := receiveWithin(t, "a report", heard), receiveWithin(t, "a report", heard)
	if len(first.List) != mesh.MaxPairsTold || first.Other != 7 || second.Other != 0 {
		t.Errorf("reports of %d pairs and %d others, and of %d others", len(first.List), first.Other, second.Other)
	}
	if d := gocmp.Diff(want, append(first.List, second.List...), cmpPrefix); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	o.awaitKept(t)
	c.stop()
	o.add(testPair(999))
	c.start(t, cfg)
	if got := receiveWithin(t, "what was seen meanwhile", heard); len(got.List) != 1 || got.List[0].Port != 999 {
		t.Errorf("told %v when control was back", got)
	}
	o.awaitKept(t)
}

// Only a proxy tells of connections, of each node one, and nothing that is no pair.
func TestWhoMayTellOfPairs(t *testing.T) {
	c := startControl(t, ServerConfig{})
	for _, row := range []struct {
		what string
		conn *Conn
		seen *message.PairReport
		ok   bool
	}{
		{"a proxy", c.dial(t, "n1"), encodePairs(mesh.Pairs{List: []mesh.Pair{testPair(80)}}, 1), true},
		{"another one of its node", c.dial(t, "n1"), encodePairs(mesh.Pairs{Other: 1}, 1), false},
		{"an agent", c.dialAgent(t, "n2"), encodePairs(mesh.Pairs{Other: 1}, 1), false},
		{"a port that is none", c.dial(t, "n3"), &message.PairReport{Pairs: []*message.Pair{{Port: 1 << 16}}}, false},
		{"too many", c.dial(t, "n4"), &message.PairReport{Pairs: make([]*message.Pair, mesh.MaxPairsTold+1)}, false},
	} {
		g, err := message.NewObservationsClient(row.conn).Observe(t.Context())
		if err == nil {
			_ = g.Send(row.seen)
			_, err = g.Recv()
		}
		if (err == nil) != row.ok {
			t.Errorf("%s: %v", row.what, err)
		}
	}
}

// FuzzPairs: no report makes control panic, and what it takes means the same when it is told
// again.
func FuzzPairs(f *testing.F) {
	for _, seen := range []mesh.Pairs{{}, {Other: 1}, {List: []mesh.Pair{testPair(1), testPair(2)}}} {
		b, err := proto.Marshal(encodePairs(seen, 1))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message.PairReport
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		seen, err := decodePairs(&m)
		if err != nil {
			return
		}
		again, err := decodePairs(encodePairs(seen, 1))
		if d := gocmp.Diff(seen, again, cmpPrefix); err != nil || d != "" {
			t.Fatal(fmt.Errorf("error %w (-want +got):\n%s", err, d))
		}
	})
}
