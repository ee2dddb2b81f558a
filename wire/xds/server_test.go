package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// No word from control is not the word that there is nothing.
func TestFirstWord(t *testing.T) {
	c := startControl(t, ServerConfig{})
	worlds, pods := make(chan mesh.Changes, 9), make(chan []mesh.Pod, 9)
	wc := NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(c mesh.Changes) <-chan struct{} { worlds <- c; return nil })
	pc := NewPodClient(ClientConfig{Conn: c.dialAgent(t, "n1"), Node: "n1"}, func(p []mesh.Pod) { pods <- p })
	run(t, wc)
	run(t, pc)
	c.connected(t, "n1")
	if len(worlds)+len(pods) > 0 {
		t.Error("applied before control has said anything")
	}
	select {
	case <-wc.Synced():
		t.Error("synced before control has said anything")
	case <-pc.Synced():
		t.Error("synced before control has said anything")
	default:
	}
	c.Publish(Snapshot{})
	receiveWithin(t, "the World's first word", wc.Synced())
	receiveWithin(t, "the pods' first word", pc.Synced())
	if c, p := <-worlds, <-pods; !reflect.DeepEqual(c, mesh.Changes{}) || len(p) != 0 {
		t.Errorf("changes %v and pods %v: want both, and empty", c, p)
	}
}

// A node learns of its own pods, and of no other's.
func TestPodsOfOwnNodeOnly(t *testing.T) {
	c := startControl(t, ServerConfig{})
	r := newRandomMesh(1)
	snap := Snapshot{Pods: map[string][]mesh.Pod{"n1": {r.pod(1), r.pod(2)}, "n2": {r.pod(3)}}}
	c.Publish(snap)
	for _, node := range []string{"n1", "n2", "n3"} {
		got := make(chan []mesh.Pod, 9)
		run(t, NewPodClient(ClientConfig{Conn: c.dialAgent(t, node), Node: node}, func(p []mesh.Pod) { got <- p }))
		want := append([]mesh.Pod{}, snap.Pods[node]...)
		if d := gocmp.Diff(want, receiveWithin(t, "pods", got), cmpAddr, cmpPrefix); d != "" {
			t.Errorf("%s (-want +got):\n%s", node, d)
		}
	}
}

// open opens a stream by hand and says hello as the node claimed. Recv tells if it
// was refused.
func open(t *testing.T, conn *Conn, claimed, typeURL string) message.AggregatedDiscoveryService_DeltaAggregatedResourcesClient {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	g, err := message.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Send(&message.DeltaDiscoveryRequest{Node: &message.Node{Id: claimed}, TypeUrl: typeURL}); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return g
}

func TestWhoIsRefused(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := startControl(t, ServerConfig{Registry: reg})
	c.Publish(Snapshot{Pods: map[string][]mesh.Pod{"n1": {newRandomMesh(1).pod(1)}}})
	for _, row := range []struct {
		name, token, claims, typeURL string
		want                         codes.Code
	}{
		{"itself", "agent-n1", "n1", podType, codes.OK},
		{"claims nothing", "agent-n1", "", podType, codes.OK},
		{"foreign proxy", "proxy-n1", "ztunnel~10.0.0.1~z.istio-system~istio-system.svc.cluster.local", addressType, codes.OK},
		{"claims another node", "agent-n2", "n1", podType, codes.PermissionDenied},
		{"a proxy for pods", "proxy-n1", "n1", podType, codes.PermissionDenied},
		{"a proxy for namespaces", "proxy-n1", "n1", namespaceType, codes.PermissionDenied},
		{"an agent for the World", "agent-n1", "n1", addressType, codes.PermissionDenied},
	} {
		_, err := open(t, c.dialWith(t, row.token), row.claims, row.typeURL).Recv()
		if status.Code(err) != row.want {
			t.Errorf("%s: %v: want %v", row.name, err, row.want)
		}
	}
	if _, err := open(t, c.dialWith(t, "stolen"), "n1", podType).Recv(); status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), "unknown token") {
		t.Errorf("unknown token: %v: want Unauthenticated, and no reason", err)
	}
	if n := count(t, reg, "tacit_xds_streams_refused_total"); n != 5 {
		t.Errorf("%v refusals counted: want 5", n)
	}
}

func TestOddRequests(t *testing.T) {
	c := startControl(t, ServerConfig{})
	c.Publish(workloads(1))
	conn := c.dial(t, "n1")
	// A type that nobody knows is answered, since foreign clients wait for it.
	g := open(t, conn, "n1", "type.googleapis.com/istio.security.Authorization")
	if r, err := g.Recv(); err != nil || len(r.GetResources()) != 0 {
		t.Errorf("unknown type: %v, %v: want an empty answer", r, err)
	}
	// An ack of nothing that was ever sent changes nothing.
	if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/istio.security.Authorization", ResponseNonce: "77"}); err != nil {
		t.Fatal(err)
	}
	many := make([]string, maxInterest+1)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: addressType, ResourceNamesSubscribe: many}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("subscription to %d names: %v: want InvalidArgument", len(many), err)
	}
	if _, err := open(t, conn, "n1", "").Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no type: %v: want InvalidArgument", err)
	}
	var last error
	for range maxStreams + 1 {
		g := open(t, conn, "n1", addressType)
		if _, last = g.Recv(); last != nil {
			break
		}
	}
	if status.Code(last) != codes.ResourceExhausted {
		t.Errorf("stream %d: %v: want ResourceExhausted", maxStreams+1, last)
	}
	if _, err := open(t, c.dialAgent(t, "n1"), "n1", podType).Recv(); err != nil {
		t.Errorf("an agent whose proxy has all its streams: %v", err)
	}
}

// A client that does not read is later told the latest, not everything between.
func TestSlowClientGetsTheLatest(t *testing.T) {
	c := startControl(t, ServerConfig{})
	g := open(t, c.dial(t, "n1"), "n1", addressType)
	c.connected(t, "n1")
	var version uint64
	for i := range 100 {
		snap := workloads(300)
		for _, w := range snap.Workloads {
			w.CanonicalRevision = fmt.Sprintf("v%d", i)
		}
		version = c.Publish(snap)
	}
	responses, resources := 0, 0
	for {
		r, err := g.Recv()
		if err != nil {
			t.Fatal(err)
		}
		responses, resources = responses+1, resources+len(r.GetResources())
		if r.GetSystemVersionInfo() == fmt.Sprint(version) {
			break
		}
		if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: addressType, ResponseNonce: r.GetNonce()}); err != nil {
			t.Fatal(err)
		}
	}
	if responses > maxUnapplied+10 {
		t.Errorf("%d responses, %d resources: want at most what fits the buffers", responses, resources)
	}
}

// Who never answers is not written to without end.
func TestClientThatNeverAcks(t *testing.T) {
	c := startControl(t, ServerConfig{})
	g := open(t, c.dial(t, "n1"), "n1", addressType)
	for i := range maxUnapplied {
		c.Publish(workloads(i + 1))
		if _, err := g.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	v := c.Publish(workloads(100))
	// Its own look comes before the answer to what it asks for meanwhile.
	if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/istio.security.Authorization"}); err != nil {
		t.Fatal(err)
	}
	if r, err := g.Recv(); err != nil || r.GetTypeUrl() == addressType {
		t.Errorf("a response although %d are not answered: %v, %v", maxUnapplied, r.GetTypeUrl(), err)
	}
	if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: addressType, ResponseNonce: fmt.Sprint(maxUnapplied)}); err != nil {
		t.Fatal(err)
	}
	r, err := g.Recv()
	if err != nil || r.GetSystemVersionInfo() != fmt.Sprint(v) {
		t.Errorf("after the answer: version %q, error %v: want %d", r.GetSystemVersionInfo(), err, v)
	}
}

// Who has not answered yet is behind.
func TestBehind(t *testing.T) {
	c := startControl(t, ServerConfig{})
	g := open(t, c.dial(t, "n1"), "n1", addressType)
	c.Publish(workloads(1))
	r, err := g.Recv()
	if err != nil || !c.Nodes()[0].Behind {
		t.Fatalf("%v; %+v: want behind", err, c.Nodes())
	}
	if err := g.Send(&message.DeltaDiscoveryRequest{TypeUrl: addressType, ResponseNonce: r.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	c.until(t, "it has answered", func() bool { return !c.Nodes()[0].Behind })
}

// A proxy that left is waited for, for as long as it may act on what it knows.
func TestGoneAfter(t *testing.T) {
	c := startControl(t, ServerConfig{GoneAfter: 3 * time.Second, Expect: []string{"n0"}})
	if got := c.Acked(1); !slices.Equal(got, []string{"n0"}) {
		t.Errorf("waiting for %v: want the node of an earlier control", got)
	}
	stop := run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, func(mesh.Changes) <-chan struct{} { return nil }))
	c.connected(t, "n1")
	v := c.Publish(Snapshot{})
	c.settle(t, v)
	stop()
	c.until(t, "n1 is missed", func() bool { return slices.Equal(c.Acked(v), []string{"n1"}) })
	c.until(t, "n1 is gone", func() bool { return len(c.Acked(v)) == 0 })
	if nodes := c.Nodes(); len(nodes) != 0 {
		t.Errorf("remembered for ever: %+v", nodes)
	}
}

// A resource that cannot be published is left as it was, and counted once.
func TestInvalidResource(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := startControl(t, ServerConfig{Registry: reg})
	known := &seen{}
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, known.change))
	c.connected(t, "n1")
	v := c.Publish(workloads(1))
	for range 3 {
		bad := Snapshot{Workloads: []*mesh.Workload{
			workload(0, func(w *mesh.Workload) { w.ID = mesh.ID{} }),
			workload(1, func(w *mesh.Workload) { w.ID.TrustDomain = "a/b" }),
			workload(2, func(w *mesh.Workload) { w.Name = "\xff" }),
			workload(3, func(w *mesh.Workload) { w.UID = strings.Repeat("x", maxName+1) }),
			workload(0, nil),
		}}
		if got := c.Publish(bad); got != v {
			t.Errorf("version %d: want %d, nothing changed", got, v)
		}
	}
	c.settle(t, v)
	if w := known.load().Workload(workload(0, nil).Addresses[0]); w == nil || w.ID.IsZero() {
		t.Errorf("the last good one is not kept: %+v", w)
	}
	if n := count(t, reg, "tacit_xds_invalid_resources_total"); n < 4 || n > 5 {
		t.Errorf("%v counted: want each once", n)
	}
}

// A table holds each name once, however often it changes, and bounds what it remembers of
// what is gone.
func TestTableForgets(t *testing.T) {
	tab := newTable(addressType, 0)
	version := uint64(0)
	put := func(name string, gone bool) {
		version++
		tab.put(version, &entry{name: name, gone: gone})
	}
	everything := func(slot) bool { return false }
	for i := range 5000 {
		put("a", false)
		put(fmt.Sprint("b", i), false)
		put(fmt.Sprint("b", i), true)
	}
	if len(tab.log) > 4*minGone || len(tab.entries) > 4*minGone || tab.live != 1 {
		t.Errorf("%d slots, %d entries, %d of them live", len(tab.log), len(tab.entries), tab.live)
	}
	for _, at := range []uint64{tab.since, version - 3, version - 1} {
		found, upTo, all := tab.read(at, portion{chunkBytes, maxScan}, everything)
		if !all || upTo != version || len(found) == 0 || found[len(found)-1].name != "b4999" {
			t.Errorf("since %d: %d found, up to %d, all: %v", at, len(found), upTo, all)
		}
	}
	if found, _, _ := tab.read(version, portion{chunkBytes, maxScan}, everything); len(found) != 0 {
		t.Errorf("since the last: %v", found)
	}
}

// Whatever is wrong with the files is named, and mended without a restart.
func TestFilesAreReadAgain(t *testing.T) {
	c := startControl(t, ServerConfig{})
	c.Publish(Snapshot{})
	dir := t.TempDir()
	token, bundle := dir+"/token", dir+"/bundle"
	conn, err := Dial(DialConfig{Addr: c.addr, TokenFile: token, BundleFile: bundle})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	logged := make(chan string, 100)
	client := NewWorldClient(ClientConfig{Conn: conn, Node: "n1", Log: recordLog(logged)}, func(mesh.Changes) <-chan struct{} { return nil })
	run(t, client)
	expect := func(want string) {
		t.Helper()
		for got := ""; !strings.Contains(got, want); {
			got = receiveWithin(t, want, logged)
		}
	}
	expect("read bundle: open " + bundle)
	write(t, bundle, "no certificate")
	expect("holds no PEM certificate")
	write(t, bundle, pemOf(t, newPKI(t)))
	expect("certificate signed by unknown authority")
	write(t, bundle, pemOf(t, c.pki))
	expect("read token: open " + token)
	write(t, token, "  \n")
	expect("is empty")
	write(t, token, "wrong")
	expect("the token proves no node")
	write(t, token, "proxy-n1")
	receiveWithin(t, "the first word", client.Synced())
}

func recordLog(errors chan<- string) *slog.Logger { return slog.New(record(errors)) }

// record is a slog.Handler that hands on each record's error.
type record chan<- string

func (record) Enabled(context.Context, slog.Level) bool { return true }
func (h record) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h record) WithGroup(string) slog.Handler          { return h }
func (h record) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" {
			h <- a.Value.String()
		}
		return true
	})
	return nil
}

func TestDialRefuses(t *testing.T) {
	for _, cfg := range []DialConfig{
		{Addr: "nowhere", TokenFile: "t", BundleFile: "b"},
		{Addr: "host:1", BundleFile: "b"},
		{Addr: "host:1", TokenFile: "t"},
	} {
		if c, err := Dial(cfg); err == nil {
			c.Close()
			t.Errorf("%+v: want an error", cfg)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := NewWorldClient(ClientConfig{}, nil).Run(ctx); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run without a connection: %v", err)
	}
}
