package proxy

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"tacit.dev/admin"
	"tacit.dev/mesh"
)

func telemetryFlow() *mesh.Flow {
	opened := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return &mesh.Flow{
		Reporter: mesh.BySource,
		Source: (&mesh.Workload{
			UID: "client-1", Namespace: "default", Name: "client-1", OwnerName: "client", CanonicalName: "client",
			CanonicalRevision: "latest", Cluster: "Kubernetes",
			ID: mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "client"},
		}).Peer(),
		Destination: (&mesh.Workload{
			UID: "web-1", Namespace: "shop", Name: "web-1", OwnerName: "web", CanonicalName: "web",
			CanonicalRevision: "v2", Cluster: "Kubernetes",
			ID: mesh.ID{TrustDomain: "lab", Namespace: "shop", ServiceAccount: "web"},
		}).Peer(),
		Service:         &mesh.Service{Namespace: "shop", Name: "web", Hostname: "web.shop.svc.cluster.local"},
		SourceAddr:      netip.MustParseAddrPort("10.30.1.2:40000"),
		Dialled:         netip.MustParseAddrPort("10.31.0.9:80"),
		DestinationAddr: netip.MustParseAddrPort("10.30.2.2:8080"),
		Security:        mesh.MutualTLS,
		SourceID:        mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "client"},
		DestinationID:   mesh.ID{TrustDomain: "lab", Namespace: "shop", ServiceAccount: "web"},
		Opened:          opened,
		Closed:          opened.Add(1500 * time.Millisecond),
		Sent:            3,
		Received:        7,
	}
}

// gathered is the registry as Prometheus would read it, without help lines.
func gathered(t *testing.T, reg *prometheus.Registry) string {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	var lines []string
	for line := range strings.Lines(b.String()) {
		if !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func TestTelemetryMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	tel := newTelemetry(reg, nil, nil)
	f := telemetryFlow()
	tel.Closed(f, tel.Opened(f))
	labels := `{connection_security_policy="mutual_tls",destination_app="web",` +
		`destination_canonical_revision="v2",destination_canonical_service="web",destination_cluster="Kubernetes",` +
		`destination_principal="spiffe://lab/ns/shop/sa/web",destination_service="web.shop.svc.cluster.local",` +
		`destination_service_name="web",destination_service_namespace="shop",destination_version="v2",` +
		`destination_workload="web",destination_workload_namespace="shop",reporter="source",` +
		`request_protocol="tcp",response_flags="-",source_app="client",source_canonical_revision="latest",` +
		`source_canonical_service="client",source_cluster="Kubernetes",` +
		`source_principal="spiffe://lab/ns/default/sa/client",source_version="latest",source_workload="client",` +
		`source_workload_namespace="default"}`
	want := "istio_tcp_connections_closed_total" + labels + " 1\n" +
		"istio_tcp_connections_opened_total" + labels + " 1\n" +
		"istio_tcp_received_bytes_total" + labels + " 3\n" +
		"istio_tcp_sent_bytes_total" + labels + " 7\n" +
		"tacit_metric_series_refused_total 0\n"
	if diff := cmp.Diff(want, gathered(t, reg)); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// Only what was proved on this connection is named as an identity, whatever the World says
// of who is at an address; by both reporters, in metrics and in the log.
func TestTelemetryNamesOnlyProvenIdentities(t *testing.T) {
	client := mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "client"}
	web := mesh.ID{TrustDomain: "lab", Namespace: "shop", ServiceAccount: "web"}
	other := mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "other"}
	for name, tt := range map[string]struct {
		security            mesh.Security
		source, destination mesh.ID // proved
	}{
		"plaintext":                        {mesh.Plaintext, mesh.ID{}, mesh.ID{}},
		"a handshake that failed":          {mesh.MutualTLS, mesh.ID{}, mesh.ID{}},
		"both":                             {mesh.MutualTLS, client, web},
		"another one than the World names": {mesh.MutualTLS, other, web},
	} {
		for _, reporter := range []mesh.Reporter{mesh.BySource, mesh.ByDestination} {
			t.Run(name+" by "+string(reporter), func(t *testing.T) {
				var b bytes.Buffer
				reg := prometheus.NewRegistry()
				tel := newTelemetry(reg, slog.New(slog.NewTextHandler(&b, nil)), nil)
				f := telemetryFlow()
				f.Reporter, f.Security, f.SourceID, f.DestinationID = reporter, tt.security, tt.source, tt.destination
				tel.Closed(f, tel.Opened(f))
				metrics := gathered(t, reg)
				for _, p := range []struct {
					label, key string
					id         mesh.ID
				}{{"source_principal", " src=", tt.source}, {"destination_principal", " dst=", tt.destination}} {
					principal := p.id.String()
					if p.id.IsZero() {
						principal = "unknown"
					}
					if want := p.label + `="` + principal + `"`; !strings.Contains(metrics, want) {
						t.Errorf("no %s in:\n%s", want, metrics)
					}
					if has := strings.Contains(b.String(), p.key); has == p.id.IsZero() || has && !strings.Contains(b.String(), p.key+principal+" ") {
						t.Errorf("want %s%s in:\n%s", p.key, p.id, b.String())
					}
				}
				if !strings.Contains(b.String(), "src_pod=default/client-1") || !strings.Contains(b.String(), "dst_pod=shop/web-1") {
					t.Errorf("no pods in:\n%s", b.String())
				}
			})
		}
	}
}

func TestTelemetryPlaintextHasNoPrincipal(t *testing.T) {
	reg := prometheus.NewRegistry()
	tel := newTelemetry(reg, nil, nil)
	f := telemetryFlow()
	f.Security, f.Source, f.Flags = mesh.Plaintext, nil, "UF"
	f.SourceID, f.DestinationID = mesh.ID{}, mesh.ID{}
	tel.Closed(f, tel.Opened(f))
	got := gathered(t, reg)
	for _, want := range []string{
		`connection_security_policy="unknown"`, `destination_principal="unknown"`, `source_workload="unknown"`,
		`response_flags="UF"`, `response_flags="-"`, `destination_workload="web"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "spiffe://") {
		t.Errorf("a principal in:\n%s", got)
	}
}

// shop is a World with the source of telemetryFlow and the services first to last, of one
// workload each, and a connection to each of these.
func shop(first, last int) (*mesh.World, []*mesh.Flow) {
	source := telemetryFlow().Source
	source.Addresses = []netip.Addr{netip.MustParseAddr("10.30.1.2")}
	workloads, services, flows := []*mesh.Workload{source.Workload()}, []*mesh.Service{}, []*mesh.Flow{}
	for i := first; i <= last; i++ {
		f := telemetryFlow()
		name := fmt.Sprint("s-", i)
		to := f.Destination.Workload()
		to.UID, to.OwnerName, to.Addresses = name, name, []netip.Addr{netip.AddrFrom4([4]byte{10, 40, byte(i >> 8), byte(i)})}
		f.Destination = to.Peer()
		f.Service.Name, f.Service.Hostname = name, name+".shop"
		workloads, services, flows = append(workloads, to), append(services, f.Service), append(flows, f)
	}
	return mesh.NewWorld(workloads, services), flows
}

// The bound holds where everything is there, or has a connection, and says so. What was
// opened under unknown workloads is closed under them.
func TestTelemetryIsBounded(t *testing.T) {
	there, flows := shop(0, 14)
	for name, tt := range map[string]struct {
		world  *mesh.World
		closed int // of those that come first
	}{"all is there": {there, 5}, "all is gone, and open": {&mesh.World{}, 0}} {
		t.Run(name, func(t *testing.T) {
			reg := prometheus.NewRegistry()
			tel := newTelemetry(reg, nil, func() *mesh.World { return tt.world })
			tel.most = 5
			var opened []*series
			for i, f := range flows {
				opened = append(opened, tel.Opened(f))
				if i < tt.closed {
					tel.Closed(f, opened[i])
				}
			}
			if n := len(tel.series); n != 6 {
				t.Errorf("%d label sets, want 5 and one for the rest", n)
			}
			if got := gathered(t, reg); !strings.Contains(got, "tacit_metric_series_refused_total 10\n") {
				t.Error("the refused are not counted")
			}
			for i, f := range flows[tt.closed:] {
				tel.Closed(f, opened[tt.closed+i])
			}
			for k, s := range tel.series {
				if n := s.open.Load(); n != 0 {
					t.Errorf("%d open connections of %s", n, k.serviceName)
				}
			}
		})
	}
}

// Services that come and go by the thousand leave no label set, and take no room from
// those that are there, which keep theirs.
func TestTelemetryForgetsWhatIsGone(t *testing.T) {
	const batch, all = 50, 6000
	reg := prometheus.NewRegistry()
	var world *mesh.World
	tel := newTelemetry(reg, nil, func() *mesh.World { return world })
	stays := telemetryFlow() // one long connection, to what is gone soon
	opened := tel.Opened(stays)
	quiet := telemetryFlow() // one to what is there, which ended long ago
	quiet.Destination = nil
	quiet.Service = nil
	quiet.Opened, quiet.Closed = quiet.Opened.Add(-time.Hour), quiet.Opened.Add(-time.Hour)
	tel.Closed(quiet, tel.Opened(quiet))
	for n := 0; n < all; n += batch { // all within the same second
		var flows []*mesh.Flow
		world, flows = shop(n, n+batch-1)
		for _, f := range flows {
			f.Opened = f.Opened.Add(time.Duration(n) * time.Microsecond)
			f.Closed = f.Opened
			tel.Closed(f, tel.Opened(f))
		}
	}
	if n := len(tel.series); n > maxSeries {
		t.Errorf("%d label sets, want %d at most", n, maxSeries)
	}
	got := gathered(t, reg)
	for _, want := range []string{"tacit_metric_series_refused_total 0\n", `destination_service_name="s-5999"`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s", want)
		}
	}
	if strings.Contains(got, `destination_service_name="s-0"`) {
		t.Error("the first one still has its room")
	}
	for name, f := range map[string]*mesh.Flow{"the open connection": stays, "what is there": quiet} {
		if tel.series[keyOf(f)] == nil {
			t.Errorf("the label set of %s is gone", name)
		}
	}
	tel.trim(stays.Opened.Add(seriesIdle + time.Second))
	if n := len(tel.series); n != 1 {
		t.Errorf("%d label sets are left, want that of the open connection", n)
	}
	stays.Closed = stays.Opened
	tel.Closed(stays, opened)
	if got := gathered(t, reg); strings.Count(got, "istio_tcp_connections_opened_total{") != 1 || strings.Contains(got, "s-5999") {
		t.Errorf("left:\n%.2000s", got)
	}
}

// Without a new World, too: as soon as the connections to what is gone have ended.
func TestTelemetryTakesTheRoomOfConnectionsThatEnd(t *testing.T) {
	world, flows := shop(0, 14)
	_, gone := shop(100, 104)
	tel := newTelemetry(nil, nil, func() *mesh.World { return world })
	tel.most = 5
	var opened []*series
	for _, f := range gone {
		opened = append(opened, tel.Opened(f))
	}
	for i, f := range flows[:len(gone)] {
		if s := tel.Opened(f); s.key.service != "" {
			t.Errorf("%d: a connection that is open gave its label set away", i)
		}
		tel.Closed(gone[i], opened[i])
		if s := tel.Opened(f); s.key != keyOf(f) {
			t.Errorf("%d: unknown for want of room that the dead hold", i)
		}
	}
}

// Where all is there, room is made of what had no connection for a minute.
func TestTelemetryMakesRoomOfWhatIsQuiet(t *testing.T) {
	world, flows := shop(0, 14)
	tel := newTelemetry(nil, nil, func() *mesh.World { return world })
	tel.most = 5
	for i, f := range flows {
		f.Opened = f.Opened.Add(time.Duration(i) * (seriesIdleFull/5 + time.Second))
		f.Closed = f.Opened
		tel.Closed(f, tel.Opened(f))
		if tel.series[keyOf(f)] == nil {
			t.Errorf("%d is unknown", i)
		}
	}
}

func TestTelemetryAccessLog(t *testing.T) {
	var b bytes.Buffer
	noTime := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	tel := newTelemetry(nil, slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: noTime})), nil)
	f := telemetryFlow()
	f.Flags, f.Reason = "UC", "reset by the destination"
	tel.Closed(f, tel.Opened(f))
	f = &mesh.Flow{Reporter: mesh.ByDestination, Security: mesh.Plaintext}
	tel.Closed(f, tel.Opened(f))
	want := `level=INFO msg="connection closed" reporter=source security=mutual_tls` +
		` src=spiffe://lab/ns/default/sa/client src_pod=default/client-1 src_addr=10.30.1.2:40000` +
		` dst=spiffe://lab/ns/shop/sa/web dst_pod=shop/web-1 dst_addr=10.30.2.2:8080` +
		` service=shop/web.shop.svc.cluster.local dialled=10.31.0.9:80 resumed=false kept=false sent=3 received=7` +
		` duration=1.5s flags=UC reason="reset by the destination"` + "\n" +
		`level=INFO msg="connection closed" reporter=destination security=plaintext resumed=false kept=false sent=0 received=0 duration=0s` + "\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("access log (-want +got):\n%s", diff)
	}
}

func TestTelemetryAllocatesNothingForKnownSeries(t *testing.T) {
	tel, f := newTelemetry(nil, nil, nil), telemetryFlow()
	for _, f.Flags = range []string{"", "UC"} {
		if n := testing.AllocsPerRun(100, func() { tel.Closed(f, tel.Opened(f)) }); n > 0 {
			t.Errorf("flags %q: %v allocations per connection, want none", f.Flags, n)
		}
	}
}

func BenchmarkTelemetry(b *testing.B) {
	run := func(b *testing.B, log *slog.Logger) {
		tel, f := newTelemetry(nil, log, nil), telemetryFlow()
		b.ReportAllocs()
		for b.Loop() {
			tel.Closed(f, tel.Opened(f))
		}
	}
	sink, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer sink.Close()
	b.Run("log=none", func(b *testing.B) { run(b, nil) })
	b.Run("log=at once", func(b *testing.B) { run(b, slog.New(slog.NewJSONHandler(sink, nil))) })
	b.Run("log=queue", func(b *testing.B) {
		log, err := admin.NewLog(admin.LogConfig{Format: "json", Level: "info", To: sink})
		if err != nil {
			b.Fatal(err)
		}
		log.While(func() error { run(b, log.Logger); return nil })
	})
}

// Each label set is new, and room is made for it of those of the last World.
func BenchmarkTelemetryMakesRoom(b *testing.B) {
	var worlds [2]*mesh.World
	var flows [2][]*mesh.Flow
	for i := range worlds {
		worlds[i], flows[i] = shop(i*10000, i*10000+9999)
	}
	n := 0
	tel := newTelemetry(nil, nil, func() *mesh.World { return worlds[n/maxSeries%2] })
	for b.Loop() {
		f := flows[n/maxSeries%2][n%maxSeries]
		tel.Closed(f, tel.Opened(f))
		n++
	}
}

// A log that nobody reads holds up nobody: neither who accepts and refuses, nor who ends.
func TestALogThatIsNotReadStopsNoConnection(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	w.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	for err == nil {
		_, err = w.Write(make([]byte, 4096))
	}
	w.SetWriteDeadline(time.Time{})
	log, err := admin.NewLog(admin.LogConfig{Format: "text", Level: "debug", To: w})
	if err != nil {
		t.Fatal(err)
	}
	log.While(func() error {
		c := newCluster(t)
		client, server := c.pod("client"), c.pod("server")
		n1, n2 := c.node(func(cfg *Config) { cfg.Log, cfg.MaxConnectionsPerPod = log.Logger, 1 }), c.node(nil)
		n1.enroll(client)
		n2.enroll(server)
		server.serve(1, echo)
		first := mustDial(t, client, server.at(false, 1))
		say(t, first, "first")
		second, err := client.dial(server.at(false, 1)) // it may be reset before dial has returned
		if err == nil {
			_, err = second.Read(make([]byte, 1))
			second.Close()
		}
		if !isRST(err) {
			t.Errorf("one connection too many ends with %v: want a reset", err)
		}
		first.Close()
		await(t, "there is room again", func() bool { return n1.proxy.pod(client.name).quota.open.Load() == 0 })
		say(t, mustDial(t, client, server.at(false, 1)), "second")
		return nil
	})
}

// Both nodes tell of a connection once, at its end, with the bytes of each direction.
func TestConnectionsAreToldOfOnce(t *testing.T) {
	c, client, server := pair(t)
	const many, question, answer = 3, 5, 1000
	server.serve(8080, func(c *net.TCPConn) {
		io.Copy(io.Discard, c)
		c.Write(make([]byte, answer))
	})
	for range many {
		conn := mustDial(t, client, server.at(false, 8080))
		conn.Write(make([]byte, question))
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || len(b) != answer {
			t.Errorf("%d bytes, %v: want %d", len(b), err, answer)
		}
	}
	for i, reporter := range []string{"source", "destination"} {
		n := c.nodes[i]
		await(t, "they have ended at the "+reporter, func() bool { return n.count("tacit_connections_open") == 0 })
		n.stop() // it tells of nothing any more
		for name, want := range map[string]float64{
			"istio_tcp_connections_opened_total": many,
			"istio_tcp_connections_closed_total": many,
			"istio_tcp_received_bytes_total":     many * question,
			"istio_tcp_sent_bytes_total":         many * answer,
		} {
			if got := n.count(name, "reporter="+reporter); got != want {
				t.Errorf("%s of the %s is %v: want %v", name, reporter, got, want)
			}
		}
		if lines := strings.Count(c.log.text(), `"connection closed" reporter=`+reporter); lines != many {
			t.Errorf("%d lines of the %s: want %d", lines, reporter, many)
		}
	}
}

// Each setting of the access log has the lines that it names.
func TestAccessLogSays(t *testing.T) {
	for which, want := range map[AccessLog]string{"": "fine denied ", LogAll: "fine denied ", LogRefused: "denied ", LogOff: ""} {
		var b bytes.Buffer
		tel := newTelemetry(nil, slog.New(slog.NewTextHandler(&b, nil)), nil)
		tel.which = which
		got := ""
		for _, reason := range []string{"", "denied"} {
			f := telemetryFlow()
			f.Reason, f.Flags = reason, ""
			tel.Closed(f, tel.Opened(f))
			if b.Len() > 0 {
				got += strings.TrimPrefix(reason+" ", " ")
				if reason == "" {
					got += "fine "
				}
			}
			b.Reset()
		}
		if got != want || which.Validate() != nil {
			t.Errorf("%q: lines of %q, want %q", which, got, want)
		}
	}
	if AccessLog("all").Validate() == nil {
		t.Error("all is no error, want All")
	}
}
