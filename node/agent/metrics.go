package agent

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/pod/netns"
	"tacit.dev/wire/xds"
)

// metrics are what Prometheus is told. Counters may be used by anybody, gauges
// are set by the loop.
type metrics struct {
	pods        *prometheus.GaugeVec
	unprotected prometheus.Gauge
	connected   prometheus.Gauge
	captures    *prometheus.CounterVec
	repairs     prometheus.Counter
	requests    *prometheus.CounterVec
	sockets     prometheus.Counter
	dropped     *prometheus.CounterVec
	binds       *prometheus.CounterVec
	// Of the chain of CNI plugins.
	chained      prometheus.Gauge
	chainChanges prometheus.Counter
}

func newMetrics(r *prometheus.Registry) *metrics {
	m := &metrics{
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tacit_pods", Help: "Pods of this node by state: idle, enrolling, captured, draining."}, []string{"state"}),
		unprotected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_pods_unprotected", Help: "Enrolled pods of this node that are not captured."}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_agent_proxy_connected", Help: "1 while a proxy is connected to the agent."}),
		captures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_agent_captures_total", Help: "Rulesets applied to capture a pod, by result."}, []string{"result"}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_agent_rules_repaired_total", Help: "Times that rules of a pod were found changed, and put right."}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_agent_cni_requests_total", Help: "Requests of the CNI plugin, by command and result."}, []string{"command", "result"}),
		sockets: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_agent_sockets_total", Help: "Sockets handed to the proxy."}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_agent_guard_dropped_packets_total", Help: "Packets that the guards of the node's pods have dropped, by kind."}, []string{"kind"}),
		binds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tacit_agent_ports_bound_total", Help: "Sockets that the proxy wanted to be bound to a privileged port of a client, by result."}, []string{"result"}),
		chained: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_agent_chain_complete", Help: "1 while the plugin is in the node's chain of CNI plugins."}),
		chainChanges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_agent_chain_changes_total", Help: "Times that the node's chain of CNI plugins was written."}),
	}
	if r != nil {
		r.MustRegister(m.pods, m.unprotected, m.connected, m.captures, m.repairs, m.requests, m.sockets, m.dropped, m.binds, m.chained, m.chainChanges)
	}
	return m
}

// count sets the gauges.
func (m *metrics) count(a *Agent) {
	n := map[string]int{"idle": 0, "enrolling": 0, "captured": 0, "draining": 0}
	unprotected := 0
	for _, p := range a.pods {
		n[p.state()]++
		if p.enrolled() && (p.rules != capturing || p.isRestless()) {
			unprotected++
		}
	}
	for _, since := range a.missing {
		if since.IsZero() {
			unprotected++
		}
	}
	for state, count := range n {
		m.pods.WithLabelValues(state).Set(float64(count))
	}
	m.unprotected.Set(float64(unprotected))
	m.connected.Set(0)
	if a.proxy != nil {
		m.connected.Set(1)
	}
}

// result is the label of an outcome.
func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

// state is the word for p in metrics and dumps.
func (p *pod) state() string {
	switch {
	case p.rules == capturing:
		return string(xds.Captured)
	case p.rules == draining:
		return "draining"
	case p.enrolled():
		return "enrolling"
	}
	return "idle"
}

// uid is the pod's, as control knows it.
func (p *pod) uid() string {
	if p.rec.UID == "" && p.rec.Word != nil {
		return p.rec.Word.UID
	}
	return cmp.Or(p.rec.UID, p.key)
}

// attrs name p in the log.
func (p *pod) attrs() []any {
	return []any{"uid", p.uid(), "namespace", p.rec.Namespace, "pod", p.rec.Name}
}

func levelOf(s xds.PodState) slog.Level {
	if s == xds.Unprotected {
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// PodStatus is one pod in a dump.
type PodStatus struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Identity  string `json:"identity,omitempty"`
	Enrolled  bool   `json:"enrolled"`
	State     string `json:"state"`
	Rules     string `json:"rules"`
	Proxy     string `json:"proxy"`
	Reason    string `json:"reason,omitempty"`
	// Dropped are the packets that the pod's guard has dropped, by kind.
	Dropped map[string]uint64 `json:"dropped,omitempty"`
	Netns   string            `json:"netns"`
	Inode   uint64            `json:"inode"`
}

// Dump tells of every pod of the node, ordered by UID. It may be called by
// anybody while Run runs.
func (a *Agent) Dump() []PodStatus {
	all := []PodStatus{}
	a.ask(func() string {
		for _, p := range a.pods {
			all = append(all, a.status(p))
		}
		return ""
	})
	slices.SortFunc(all, func(x, y PodStatus) int { return cmp.Compare(x.UID, y.UID) })
	return all
}

func (a *Agent) status(p *pod) PodStatus {
	s := PodStatus{
		UID: p.uid(), Namespace: p.rec.Namespace, Name: p.rec.Name, Enrolled: p.enrolled(),
		State: p.state(), Rules: p.rules.String(), Proxy: p.proxy.String(), Netns: p.rec.Netns, Inode: p.rec.Key.Inode,
	}
	if p.rec.Word != nil {
		s.Identity = p.rec.Word.ID.String()
	}
	if !p.isSettled() {
		s.Reason = p.waitsFor(a.proxy != nil)
	}
	if p.isRestless() {
		s.Reason = p.restlessReason()
	}
	s.Dropped = maps.Clone(p.guard.dropped)
	return s
}

// keyAt identifies the namespace at path.
func keyAt(path string) (netns.Key, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return netns.Key{}, err
	}
	defer ns.Close()
	return ns.Key(), nil
}
