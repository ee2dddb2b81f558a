package proxy

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

const (
	// maxSeries bounds how many label sets the traffic metrics may have. What comes
	// above is counted under unknown workloads.
	maxSeries = 4096
	// seriesIdle is how long a label set without a connection is kept; if others need its
	// room, seriesIdleFull, which is longer than between two scrapes.
	seriesIdle, seriesIdleFull = 15 * time.Minute, time.Minute
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

// series are the counters of one label set.
type series struct {
	opened, closed, sent, received prometheus.Counter
	// open counts the connections that were opened under it and are not closed; used is when
	// one was last opened or closed, in Unix seconds.
	open, used atomic.Int64
}

// telemetry tells of connections: Istio's TCP metrics when one opens and when it
// ends, and one line of access log at its end. It is safe for concurrent use.
type telemetry struct {
	log                            *slog.Logger
	opened, closed, sent, received *prometheus.CounterVec
	refused                        prometheus.Counter

	mu     sync.RWMutex
	series map[seriesKey]*series // guarded by mu
	full   time.Time             // guarded by mu: when no room was found last
	most   int                   // maxSeries, but in tests
}

// newTelemetry registers the metrics at reg. A nil log means no access log, a
// nil reg metrics that nobody sees.
func newTelemetry(reg *prometheus.Registry, log *slog.Logger) *telemetry {
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
// are known by now. Closed must follow with the same Flow.
func (t *telemetry) Opened(f *mesh.Flow) {
	s := t.of(keyOf(f).opened(), f.Opened)
	s.open.Add(1)
	s.opened.Inc()
}

// Closed counts the end of a connection and logs it. Flow's Sent is Istio's
// received: Istio speaks of the destination.
func (t *telemetry) Closed(f *mesh.Flow) {
	k := keyOf(f)
	t.of(k.opened(), f.Closed).open.Add(-1)
	s := t.of(k, f.Closed)
	s.closed.Inc()
	s.sent.Add(float64(f.Received))
	s.received.Add(float64(f.Sent))
	t.logClosed(f)
}

// of returns the counters of a label set, which is used now.
func (t *telemetry) of(k seriesKey, now time.Time) *series {
	t.mu.RLock()
	s, ok := t.series[k]
	t.mu.RUnlock()
	if !ok {
		t.mu.Lock()
		s = t.addLocked(k, now)
		t.mu.Unlock()
	}
	s.used.Store(now.Unix())
	return s
}

// addLocked makes a label set known; above the bound it is made one of the few
// that say nothing of workloads, and those are always let in.
func (t *telemetry) addLocked(k seriesKey, now time.Time) *series {
	if _, known := t.series[k]; !known && len(t.series) >= t.most && !t.makeRoomLocked(now) {
		t.refused.Inc()
		k = seriesKey{reporter: k.reporter, security: k.security, flags: k.flags}
	}
	s, ok := t.series[k]
	if !ok {
		v := k.values()
		s = &series{opened: t.opened.WithLabelValues(v...), closed: t.closed.WithLabelValues(v...),
			sent: t.sent.WithLabelValues(v...), received: t.received.WithLabelValues(v...)}
		t.series[k] = s
	}
	s.used.Store(now.Unix())
	return s
}

// makeRoomLocked drops an eighth of the label sets, of those without a connection the ones
// that were used longest ago, and reports whether there is room now. In vain it looks once a second.
func (t *telemetry) makeRoomLocked(now time.Time) bool {
	if now.Sub(t.full) < time.Second {
		return false
	}
	idle := t.idleLocked(now.Add(-seriesIdleFull))
	slices.SortFunc(idle, func(a, b seriesKey) int { return cmp.Compare(t.series[a].used.Load(), t.series[b].used.Load()) })
	idle = idle[:min(len(idle), max(1, t.most/8))]
	t.dropLocked(idle)
	if len(idle) == 0 {
		t.full = now
	}
	return len(idle) > 0
}

// trim drops the label sets of what seems to be gone. It is called at intervals.
func (t *telemetry) trim(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropLocked(t.idleLocked(now.Add(-seriesIdle)))
}

// idleLocked are the label sets without a connection that were not used since.
func (t *telemetry) idleLocked(since time.Time) (idle []seriesKey) {
	for k, s := range t.series {
		if s.open.Load() <= 0 && s.used.Load() <= since.Unix() {
			idle = append(idle, k)
		}
	}
	return idle
}

func (t *telemetry) dropLocked(keys []seriesKey) {
	for _, k := range keys {
		v := k.values()
		for _, c := range []*prometheus.CounterVec{t.opened, t.closed, t.sent, t.received} {
			c.DeleteLabelValues(v...)
		}
		delete(t.series, k)
	}
}

// opened is the label set under which the connection was opened.
func (k seriesKey) opened() seriesKey {
	k.flags = ""
	return k
}

func keyOf(f *mesh.Flow) seriesKey {
	k := seriesKey{
		reporter:    f.Reporter,
		security:    f.Security,
		flags:       f.Flags,
		source:      partyOf(f.Source, f.SourceID),
		destination: partyOf(f.Destination, f.DestinationID),
	}
	if s := f.Service; s != nil {
		k.service, k.serviceName, k.serviceNamespace = s.Hostname, s.Name, s.Namespace
	}
	return k
}

// partyOf is w with the identity that was proved.
func partyOf(w *mesh.Workload, proved mesh.ID) party {
	p := party{principal: proved}
	if w == nil {
		return p
	}
	p.workload = w.OwnerName
	if p.workload == "" {
		p.workload = w.Name
	}
	p.namespace, p.cluster = w.Namespace, w.Cluster
	p.canonicalName, p.canonicalRevision = w.CanonicalName, w.CanonicalRevision
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

// logClosed writes the access log's one line for a connection.
func (t *telemetry) logClosed(f *mesh.Flow) {
	ctx := context.Background()
	if !t.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	attrs := make([]slog.Attr, 0, 22)
	attrs = append(attrs, slog.String("reporter", string(f.Reporter)), slog.String("security", string(f.Security)))
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
func appendParty(attrs []slog.Attr, keys [3]string, proved mesh.ID, w *mesh.Workload, addr netip.AddrPort) []slog.Attr {
	if !proved.IsZero() {
		attrs = append(attrs, slog.String(keys[0], proved.String()))
	}
	if w != nil && w.Name != "" {
		attrs = append(attrs, slog.String(keys[1], w.Namespace+"/"+w.Name))
	}
	if addr.IsValid() {
		attrs = append(attrs, slog.String(keys[2], addr.String()))
	}
	return attrs
}
