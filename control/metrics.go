package control

import (
	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
)

// metrics are what control counts of itself; wire/xds has its own.
type metrics struct {
	pairs       *pairMetrics
	pods        *prometheus.GaugeVec
	unprotected prometheus.Gauge
	problems    prometheus.Gauge
	contested   prometheus.Gauge
	signed      *prometheus.CounterVec
	failures    prometheus.Counter
	reconcile   prometheus.Histogram
	leads       prometheus.Gauge
	nodes       *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tacit_control_pods", Help: "Pods by the state of their enrollment.",
		}, []string{"state"}),
		unprotected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_pods_unprotected", Help: "Enrolled pods whose agent says that they are not captured.",
		}),
		problems: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_problems", Help: "Things in objects that were not understood.",
		}),
		contested: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_contested_addresses", Help: "Addresses that several objects claim, so that connections to them are refused.",
		}),
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_control_signing_requests_total", Help: "Signing requests by result: signed, denied, bad_request, failed.",
		}, []string{"result"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_publish_failures_total", Help: "Times that something that must be remembered could not be written. What it is about is not announced.",
		}),
		reconcile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tacit_control_reconcile_seconds", Help: "Time from something new to its publication.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}),
		leads: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_leader", Help: "1 while this replica leads. The metrics of pods, nodes and the CA are the leader's.",
		}),
		nodes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tacit_control_nodes", Help: "Nodes of the cluster (total), and those whose agent and proxy are connected (ready).",
		}, []string{"state"}),
	}
	m.pairs = newPairMetrics(r)
	r.MustRegister(m.pods, m.unprotected, m.problems, m.contested, m.signed, m.failures, m.reconcile, m.leads, m.nodes)
	for _, result := range []string{signed, denied, badRequest, failed} {
		m.signed.WithLabelValues(result)
	}
	return m
}

// follow has this replica tell nothing that is the leader's to tell.
func (m *metrics) follow() {
	m.leads.Set(0)
	m.nodes.Reset()
	m.observe(newCounts(), facts{})
}

func (m *metrics) observeNodes(n kube.NodeCounts) {
	m.nodes.WithLabelValues("total").Set(float64(n.Total))
	m.nodes.WithLabelValues("ready").Set(float64(n.Ready))
}

// expiry collects when the certificates of the CA end, while this replica leads.
type expiry struct {
	ca   func() *ca.CA // nil while it does not
	desc *prometheus.Desc
}

func newExpiry(ca func() *ca.CA) expiry {
	return expiry{ca, prometheus.NewDesc("tacit_control_ca_expiry_timestamp_seconds", "When a certificate of the CA, root or intermediate, ends.", []string{"certificate"}, nil)}
}

func (e expiry) Describe(ch chan<- *prometheus.Desc) { ch <- e.desc }

func (e expiry) Collect(ch chan<- prometheus.Metric) {
	if c := e.ca(); c != nil {
		for name, end := range c.Ends() {
			ch <- prometheus.MustNewConstMetric(e.desc, prometheus.GaugeValue, float64(end.Unix()), name)
		}
	}
}

func (m *metrics) observe(c counts, f facts) {
	for state, n := range c.states {
		m.pods.WithLabelValues(string(state)).Set(float64(n))
	}
	m.unprotected.Set(float64(c.lost))
	problems := f.untold
	for _, p := range f.problems {
		problems += 1 + p.More
	}
	m.problems.Set(float64(problems))
	m.contested.Set(float64(f.contested))
}
