package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

// unknown is Istio's word for a label of which nothing is known.
const unknown = "unknown"

// seriesLabels are those of Istio's TCP metrics, in the order of seriesKey.values.
var seriesLabels = []string{
	"reporter", "request_protocol", "response_flags", "connection_security_policy",
	"source_workload", "source_workload_namespace", "source_principal", "source_app", "source_version",
	"source_canonical_service", "source_canonical_revision", "source_cluster",
	"destination_workload", "destination_workload_namespace", "destination_principal", "destination_app",
	"destination_version", "destination_canonical_service", "destination_canonical_revision", "destination_cluster",
	"destination_service", "destination_service_name", "destination_service_namespace",
}

// party is what the metrics name one side of a connection by. None of it is as
// numerous as pods or addresses.
type party struct {
	workload, namespace, canonicalName, canonicalRevision, cluster string
	principal                                                      mesh.ID
}

// seriesKey is one label set. The zero party and service are unknown.
type seriesKey struct {
	reporter                               mesh.Reporter
	security                               mesh.Security
	flags                                  string
	source, destination                    party
	service, serviceName, serviceNamespace string
}

// telemetry tells of connections: Istio's TCP metrics when one opens and when it
// ends, and one line of access log at its end. It is safe for concurrent use.
type telemetry struct {
	log                            *slog.Logger
	which                          AccessLog
	opened, closed, sent, received *prometheus.CounterVec
	refused                        prometheus.Counter

	// world tells what is there now.
	world func() *mesh.World

	// mu guards what follows.
	mu     sync.RWMutex
	series map[seriesKey]*series
	most   int // maxSeries, but in tests
	// spare are those that may go if there is no room, in that order, as they were looked
	// for last: in which World, and when.
	spare     []*series
	spareIn   weak.Pointer[mesh.World]
	spareFrom time.Time
}

// newTelemetry registers the metrics at reg. A nil log means no access log, a
// nil reg metrics that nobody sees, a nil world that nothing is there.
func newTelemetry(reg *prometheus.Registry, log *slog.Logger, world func() *mesh.World) *telemetry {
	if world == nil {
		nothing := &mesh.World{}
		world = func() *mesh.World { return nothing }
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &telemetry{
		log:    log,
		opened: trafficCounter("istio_tcp_connections_opened_total", "TCP connections opened."),
		closed: trafficCounter("istio_tcp_connections_closed_total", "TCP connections closed."),
		sent:   trafficCounter("istio_tcp_sent_bytes_total", "Bytes that the destination sent to the source (the response)."),
		received: trafficCounter("istio_tcp_received_bytes_total",
			"Bytes that the destination received from the source (the request)."),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_metric_series_refused_total",
			Help: "Connections counted under unknown workloads, because the traffic metrics have as many label sets as they may.",
		}),
		world:  world,
		series: make(map[seriesKey]*series),
		most:   maxSeries,
	}
	if reg != nil {
		reg.MustRegister(t.opened, t.closed, t.sent, t.received, t.refused)
	}
	return t
}

func trafficCounter(name, help string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, seriesLabels)
}

// Opened counts a connection whose source, destination, service and security
// are known by now. Closed must follow with the same Flow and what is returned.
func (t *telemetry) Opened(f *mesh.Flow) *series {
	var k seriesKey
	k.of(f)
	k.flags = ""
	s := t.take(&k, f.Opened)
	s.opened.Inc()
	return s
}

// Closed counts the end of a connection, which was opened under s, and logs it. Flow's
// Sent is Istio's received: Istio speaks of the destination.
func (t *telemetry) Closed(f *mesh.Flow, s *series) {
	if f.Flags != "" {
		s = t.flagged(f, s)
	}
	s.closed.Inc()
	s.sent.Add(float64(f.Received))
	s.received.Add(float64(f.Sent))
	s.leave(f.Closed)
	t.logClosed(f)
}

// flagged leaves s for the label set that says how the connection has ended.
func (t *telemetry) flagged(f *mesh.Flow, s *series) *series {
	var k seriesKey
	k.of(f)
	defer s.leave(f.Closed)
	return t.take(&k, f.Closed)
}

// of makes k the label set of f. Keys are large, and each connection begins with a small
// stack: so it is filled where it is.
func (k *seriesKey) of(f *mesh.Flow) {
	k.reporter, k.security, k.flags = f.Reporter, f.Security, f.Flags
	k.source.of(f.Source, f.SourceID)
	k.destination.of(f.Destination, f.DestinationID)
	if s := f.Service; s != nil {
		k.service, k.serviceName, k.serviceNamespace = s.Hostname, s.Name, s.Namespace
	}
}

func keyOf(f *mesh.Flow) (k seriesKey) {
	k.of(f)
	return k
}

// of makes p w with the identity that was proved.
func (p *party) of(w *mesh.Peer, proved mesh.ID) {
	p.principal = proved
	if w == nil {
		return
	}
	p.workload = w.OwnerName
	if p.workload == "" {
		p.workload = w.Name()
	}
	p.namespace, p.cluster = w.Namespace, w.Cluster
	p.canonicalName, p.canonicalRevision = w.CanonicalName, w.CanonicalRevision
}

func partyOf(w *mesh.Peer, proved mesh.ID) (p party) {
	p.of(w, proved)
	return p
}

// values are the label values, in the order of seriesLabels.
func (k seriesKey) values() []string {
	policy, flags := unknown, "-"
	if k.security == mesh.MutualTLS {
		policy = string(k.security)
	}
	if k.flags != "" {
		flags = k.flags
	}
	v := []string{string(k.reporter), "tcp", flags, policy}
	for _, p := range []party{k.source, k.destination} {
		v = append(v, p.workload, p.namespace, p.principal.String(), p.canonicalName, p.canonicalRevision,
			p.canonicalName, p.canonicalRevision, p.cluster)
	}
	v = append(v, k.service, k.serviceName, k.serviceNamespace)
	for i := range v {
		if v[i] == "" {
			v[i] = unknown
		}
	}
	return v
}

// maxAttrs is how many fields a line has at most. They are lent, since the stack of a connection is small.
const maxAttrs = 22

var attrsOfALine = sync.Pool{New: func() any { return new([maxAttrs]slog.Attr) }}

// AccessLog says which connections have a line in the log.
type AccessLog string

// What an AccessLog may be.
const (
	LogAll AccessLog = "All"
	// LogRefused is those that were refused, or ended otherwise than both ends wanted.
	LogRefused AccessLog = "Refused"
	LogOff     AccessLog = "Off"
)

// Validate reports what is no AccessLog.
func (a AccessLog) Validate() error {
	switch a {
	case "", LogAll, LogRefused, LogOff:
		return nil
	}
	return fmt.Errorf("access log %q: want %s, %s or %s", string(a), LogAll, LogRefused, LogOff)
}

func (a AccessLog) has(f *mesh.Flow) bool {
	return a != LogOff && (a != LogRefused || f.Reason != "" || f.Flags != "")
}

// logClosed writes the access log's one line for a connection.
func (t *telemetry) logClosed(f *mesh.Flow) {
	ctx := context.Background()
	if !t.which.has(f) || !t.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	lent := attrsOfALine.Get().(*[maxAttrs]slog.Attr)
	defer attrsOfALine.Put(lent)
	attrs := append(lent[:0], slog.String("reporter", string(f.Reporter)), slog.String("security", string(f.Security)))
	attrs = appendParty(attrs, [3]string{"src", "src_pod", "src_addr"}, f.SourceID, f.Source, f.SourceAddr)
	attrs = appendParty(attrs, [3]string{"dst", "dst_pod", "dst_addr"}, f.DestinationID, f.Destination, f.DestinationAddr)
	if f.Service != nil {
		attrs = append(attrs, slog.String("service", f.Service.Key()))
	}
	if f.Dialled != f.DestinationAddr && f.Dialled.IsValid() {
		attrs = append(attrs, slog.String("dialled", f.Dialled.String()))
	}
	attrs = appendPorts(attrs, f)
	attrs = append(attrs,
		slog.Bool("resumed", f.Resumed),
		slog.Bool("kept", f.Kept),
		slog.Int64("sent", f.Sent),
		slog.Int64("received", f.Received),
		slog.Duration("duration", f.Closed.Sub(f.Opened)))
	if f.Policy != "" {
		attrs = append(attrs, slog.String("policy", f.Policy))
	}
	if f.DryRun != "" {
		attrs = append(attrs, slog.String("dry_run", f.DryRun))
	}
	if f.Flags != "" {
		attrs = append(attrs, slog.String("flags", f.Flags))
	}
	if f.Reason != "" {
		attrs = append(attrs, slog.String("reason", f.Reason))
	}
	t.log.LogAttrs(ctx, slog.LevelInfo, "connection closed", attrs...)
}

// appendPorts says which port the source's application has where src_addr does not, and
// which one the destination's sees if it is another.
func appendPorts(attrs []slog.Attr, f *mesh.Flow) []slog.Attr {
	if f.SourcePort != 0 && f.SourcePort != f.SourceAddr.Port() {
		attrs = append(attrs, slog.Int("src_port", int(f.SourcePort)))
	}
	if f.SeenPort != f.SourcePort {
		attrs = append(attrs, slog.Int("seen_port", int(f.SeenPort)), slog.String("seen_port_reason", f.SeenReason))
	}
	return attrs
}

// appendParty says who was proved, which pod the World has at the address, and where; keys
// name the three.
func appendParty(attrs []slog.Attr, keys [3]string, proved mesh.ID, w *mesh.Peer, addr netip.AddrPort) []slog.Attr {
	if !proved.IsZero() {
		attrs = append(attrs, slog.String(keys[0], proved.String()))
	}
	if w != nil && w.Name() != "" {
		attrs = append(attrs, slog.String(keys[1], w.Namespace+"/"+w.Name()))
	}
	if addr.IsValid() {
		attrs = append(attrs, slog.String(keys[2], addr.String()))
	}
	return attrs
}
