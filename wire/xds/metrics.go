package xds

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// serverMetrics and clientMetrics count; none of their labels grows with the mesh.
type serverMetrics struct {
	streams  *prometheus.GaugeVec   // type
	sent     *prometheus.CounterVec // type
	rejected *prometheus.CounterVec // type
	refused  prometheus.Counter
	invalid  prometheus.Counter
	version  prometheus.Gauge
}

func newServerMetrics(r prometheus.Registerer) *serverMetrics {
	return &serverMetrics{
		streams: register(r, prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tacit_xds_streams", Help: "Subscriptions of connected nodes."}, []string{"type"})),
		sent: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_xds_resources_sent_total", Help: "Resources sent to nodes, removals included."}, []string{"type"})),
		rejected: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_xds_nacks_total", Help: "Responses of which a node refused a resource."}, []string{"type"})),
		refused: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_xds_streams_refused_total", Help: "Streams refused: no valid token, that of another process, another node's name, too many."})),
		invalid: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_xds_invalid_resources_total", Help: "Resources that could not be published and were left as they were."})),
		version: register(r, prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_xds_published_version", Help: "Latest publication."})),
	}
}

type clientMetrics struct {
	connected prometheus.Gauge
	received  prometheus.Counter
	rejected  prometheus.Counter
	failures  prometheus.Counter
}

func newClientMetrics(r prometheus.Registerer) *clientMetrics {
	return &clientMetrics{
		connected: register(r, prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_xds_connected", Help: "1 while control is there and has answered."})),
		received: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_xds_resources_received_total", Help: "Resources received from control, removals included."})),
		rejected: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_xds_resources_rejected_total", Help: "Resources refused; the last good one is kept."})),
		failures: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_xds_connection_failures_total", Help: "Streams to control that failed or could not be opened."})),
	}
}

// register gives back what is registered already under the same description, so
// that two clients of one process count together.
func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	err := r.Register(c)
	var again prometheus.AlreadyRegisteredError
	if errors.As(err, &again) {
		return again.ExistingCollector.(C)
	}
	if err != nil {
		panic("xds: register metric: " + err.Error())
	}
	return c
}

// typeLabel names a type in metrics; foreign ones share one label.
func typeLabel(typeURL string) string {
	switch typeURL {
	case addressType:
		return "address"
	case policyType:
		return "policy"
	case podType:
		return "pod"
	case namespaceType:
		return "namespace"
	}
	return "other"
}
