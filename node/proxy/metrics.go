package proxy

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// kind is how a connection crosses, in the eyes of who counts what is protected.
type kind uint8

const (
	// mutual: by wire/direct.
	mutual kind = iota
	// plaintext: in the clear, with another workload of the cluster.
	plaintext
	// outside: in the clear, with somebody that the World does not know.
	outside
	// within: it never leaves the pod.
	within

	kinds
)

// String is the word for metrics and dumps.
func (k kind) String() string {
	return [...]string{"mutual_tls", "plaintext", "outside", "within"}[k]
}

// podCounts are the connections of one pod.
type podCounts struct {
	of      [kinds]count
	refused atomic.Int64
}

type count struct{ now, total atomic.Int64 }

func (c *count) opened() { c.now.Add(1); c.total.Add(1) }
func (c *count) closed() { c.now.Add(-1) }

// metrics are Tacit's own; Istio's are in telemetry.go.
type metrics struct {
	total        [2][kinds]prometheus.Counter
	open         [2][kinds]prometheus.Gauge
	refusals     *prometheus.CounterVec
	otherPorts   *prometheus.CounterVec
	retries      prometheus.Counter
	acceptErrors prometheus.Counter
	policyResets prometheus.Counter
	trustResets  *prometheus.CounterVec
	dryRuns      prometheus.Counter
	exceptions   [2]prometheus.Counter
	// waited are how long handshakes waited for their turn, if they did.
	waited [2]prometheus.Observer
}

func newMetrics(reg *prometheus.Registry, p *Proxy) *metrics {
	m := &metrics{
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_refused_connections_total",
			Help: "Connections that were reset before a byte went through, by reason.",
		}, []string{"direction", "reason"}),
		otherPorts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_source_ports_changed_total",
			Help: "Connections to an application that sees another source port than its client has, by reason.",
		}, []string{"reason"}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_endpoint_retries_total",
			Help: "Endpoints of services that failed, so that another one was tried.",
		}),
		acceptErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_accept_errors_total",
			Help: "Failures to accept a connection, such as no free descriptor.",
		}),
	}
	m.policyResets = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_policy_resets_total",
		Help: "Open or kept connections that were ended because a policy, or the identity at the source address, changed.",
	})
	m.trustResets = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tacit_trust_resets_total",
		Help: "Connections that were ended because an identity was revoked, or because of maxConnectionAge, by reason.",
	}, []string{"reason"})
	m.dryRuns = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_policy_dry_runs_total",
		Help: "Inbound connections that dry-run policies would decide otherwise.",
	})
	exceptions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tacit_strict_exceptions_total",
		Help: "Connections in plaintext that passed a strict mode, because an exception is set for them.",
	}, []string{"direction"})
	for _, inbound := range []bool{false, true} {
		m.exceptions[index(inbound)] = exceptions.WithLabelValues(direction(inbound))
	}
	reg.MustRegister(exceptions, m.refusals, m.otherPorts, m.retries, m.acceptErrors, m.policyResets, m.trustResets, m.dryRuns)
	m.registerKinds(reg)
	m.registerWaits(reg)
	registerGauges(reg, p)
	return m
}

// registerKinds makes one child for each direction and kind, so that none is
// looked up per connection.
func (m *metrics) registerKinds(reg *prometheus.Registry) {
	labels := []string{"direction", "kind"}
	total := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tacit_connections_total", Help: "Connections that reached their other end, by how they crossed the network.",
	}, labels)
	open := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tacit_connections_open", Help: "Connections open now, by how they cross the network.",
	}, labels)
	reg.MustRegister(total, open)
	for _, inbound := range []bool{false, true} {
		for k := range kinds {
			m.total[index(inbound)][k] = total.WithLabelValues(direction(inbound), k.String())
			m.open[index(inbound)][k] = open.WithLabelValues(direction(inbound), k.String())
		}
	}
}

func (m *metrics) registerWaits(reg *prometheus.Registry) {
	waits := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "tacit_handshake_wait_seconds", Help: "How long TLS handshakes waited for their turn, of those that had to wait.",
		Buckets: []float64{.01, .1, 1, 5, 10, 30, 60},
	}, []string{"direction"})
	reg.MustRegister(waits)
	for _, inbound := range []bool{false, true} {
		m.waited[index(inbound)] = waits.WithLabelValues(direction(inbound))
	}
}

func registerGauges(reg *prometheus.Registry, p *Proxy) {
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	gauge("tacit_outbound_handshakes", "TLS handshakes under way as client.",
		func() float64 { used, _ := p.dialling.counts(); return float64(used) })
	gauge("tacit_inbound_handshakes", "TLS handshakes under way as server.",
		func() float64 { used, _ := p.answering.counts(); return float64(used) })
	gauge("tacit_outbound_handshakes_waiting", "Connections that wait for their turn to make a TLS handshake as client.",
		func() float64 { _, waiting := p.dialling.counts(); return float64(waiting) })
	gauge("tacit_inbound_handshakes_waiting", "Connections that wait for their turn to make a TLS handshake as server.",
		func() float64 { _, waiting := p.answering.counts(); return float64(waiting) })
	gauge("tacit_quiet_connections", "Inbound connections that have not said yet whether they are TLS.",
		func() float64 { return float64(p.looking.Load()) })
	gauge("tacit_kept_connections", "Connections to and from peers that are kept for the next connection of an application.",
		func() float64 { return float64(p.keeps.open.Load()) })
	gauge("tacit_proxy_draining", "Whether this proxy was told to end and serves what is open.",
		func() float64 { return float64(min(p.departs.Load(), 1)) })
	gauge("tacit_agent_connected", "Whether the agent's socket is connected.", func() float64 {
		if p.link.up.Load() {
			return 1
		}
		return 0
	})
	for _, s := range []podState{starting, serving, draining, drained} {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tacit_proxy_pods", Help: "Pods that the agent gave to the proxy, by state.",
			ConstLabels: prometheus.Labels{"state": string(s)},
		}, func() float64 { return float64(p.podsIn(s)) }))
	}
	reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "tacit_sockets_awaited_total", Help: "Dials that had to wait for a socket from the agent.",
	}, func() float64 { return float64(p.starved.Load()) }))
}

func index(inbound bool) int {
	if inbound {
		return 1
	}
	return 0
}

func direction(inbound bool) string {
	if inbound {
		return "inbound"
	}
	return "outbound"
}

func (m *metrics) opened(inbound bool, k kind) {
	m.total[index(inbound)][k].Inc()
	m.open[index(inbound)][k].Inc()
}

func (m *metrics) closed(inbound bool, k kind) { m.open[index(inbound)][k].Dec() }

func (m *metrics) refused(inbound bool, reason string) {
	m.refusals.WithLabelValues(direction(inbound), reason).Inc()
}

// judged counts a connection that was ended by a new World.
func (m *metrics) judged(why *refusal) {
	if why.reason == reasonRevoked {
		m.trustResets.WithLabelValues(why.reason).Inc()
		return
	}
	m.policyResets.Inc()
}

func (m *metrics) exception(inbound bool) { m.exceptions[index(inbound)].Inc() }

func (m *metrics) otherPort(reason string) { m.otherPorts.WithLabelValues(reason).Inc() }
