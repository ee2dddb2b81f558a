package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"tacit.dev/bench/table"
)

// sample is what was measured of one size, by name. What could not be measured is not there.
type sample map[string]float64

// get is NaN of what was not measured.
func (s sample) get(name string) float64 {
	if v, ok := s[name]; ok {
		return v
	}
	return math.NaN()
}

// result is what one run has measured.
type result struct {
	cfg   config
	sizes map[int]sample
	notes []string
}

func newResult(cfg config) *result { return &result{cfg: cfg, sizes: make(map[int]sample)} }

func (r *result) sample(pods int) sample {
	if r.sizes[pods] == nil {
		r.sizes[pods] = sample{}
	}
	return r.sizes[pods]
}

// note says what was not as it should be.
func (r *result) note(pods int, format string, args ...any) {
	text := fmt.Sprintf("%d pods: ", pods) + fmt.Sprintf(format, args...)
	r.notes = append(r.notes, text)
	fmt.Fprintln(os.Stderr, "scale:", text)
}

// bounds compares the last size with the first, and what the last one took with what it may.
func (r *result) bounds() (list []table.Bound) {
	first, last := r.sample(r.cfg.sizes[0]), r.sample(r.cfg.sizes[len(r.cfg.sizes)-1])
	fastest := slices.Max(r.cfg.rates)
	for _, rate := range r.cfg.rates {
		name := fmt.Sprintf("churn_%g_cpu_ms", rate)
		list = append(list, table.Bound{Name: fmt.Sprintf("CPU of control per change at %g/s, last size / first", rate), Value: last.get(name) / first.get(name), Limit: 1.5})
	}
	list = append(list,
		table.Bound{Name: fmt.Sprintf("change to last node at %g/s, p99, ms", fastest), Value: last.get(fmt.Sprintf("churn_%g_p99_ms", fastest)), Limit: 2000},
		table.Bound{Name: "memory of control, peak, MB", Value: last.get("control_peak_mb"), Limit: 1500},
		table.Bound{Name: "memory of control per stream, kB", Value: last.get("stream_kb"), Limit: 50},
		table.Bound{Name: "first sync of a node, s", Value: last.get("first_sync_s"), Limit: 3},
		table.Bound{Name: "start of a pod waits, p99, ms", Value: last.get("start_p99_ms"), Limit: 1000},
		table.Bound{Name: fmt.Sprintf("start of a pod waits, %d nodes frozen, p99, ms", r.cfg.frozen), Value: last.get("start_frozen_p99_ms"), Limit: 1000},
		table.Bound{Name: "fail-over: every node served, s", Value: last.get("failover_s"), Limit: 20},
		table.Bound{Name: "fail-over: peak memory, new leader / old", Value: last.get("failover_memory"), Limit: 1.3},
		table.Bound{Name: "fail-over: pods withdrawn or marked away", Value: last.get("failover_harmed"), Limit: 0},
		table.Bound{Name: "fail-over: certificates refused", Value: last.get("failover_refused"), Limit: 0},
		table.Bound{Name: "nodes that held something else than there is", Value: last.get("differing"), Limit: 0},
		table.Bound{Name: "storm: every node served, s", Value: last.get("storm_s"), Limit: 20},
		table.Bound{Name: "storm: pods withdrawn or marked away", Value: last.get("storm_harmed"), Limit: 0},
	)
	if r.cfg.bin != "" {
		list = append(list,
			table.Bound{Name: "memory of the real proxy, MB", Value: last.get("proxy_rss_mb"), Limit: 70},
			table.Bound{Name: fmt.Sprintf("CPU of the real proxy per change at %g/s, ms", fastest), Value: last.get(fmt.Sprintf("churn_%g_proxy_cpu_ms", fastest)), Limit: 1})
	}
	if n := r.cfg.captured; n > 0 {
		list = append(list, table.Bound{Name: fmt.Sprintf("pods captured and known of %d, nine tenths of which are enrolled", n), Value: r.sample(n).get("captured_pods"), Limit: math.Floor(0.9 * float64(n)), Least: true})
	}
	return list
}

// line is one line of the table of measurements.
type line struct{ name, key string }

func (r *result) lines() []line {
	list := []line{
		{"all nodes served for the first time, s", "joined_s"},
		{"all pods captured and known after, s", "captured_s"},
		{"CPU of control until then, s", "captured_cpu_s"},
		{"CPU of all simulated nodes until then, s", "captured_fleet_cpu_s"},
		{"sent to a node until then, MB", "captured_mb"},
		{"pods captured and known", "captured_pods"},
		{"resources of a node", "resources"},
		{"nodes that held something else than there is", "differing"},
		{"memory of control, live, MB", "control_live_mb"},
		{"memory of control, resident, MB", "control_rss_mb"},
		{"memory of control, peak, MB", "control_peak_mb"},
		{"memory of control per stream, kB", "stream_kb"},
		{"memory of control per node, kB", "node_kb"},
		{"memory of the real proxy, resident, MB", "proxy_rss_mb"},
		{"memory of the real proxy, peak, MB", "proxy_peak_mb"},
		{"memory of the real agent, resident, MB", "agent_rss_mb"},
		{"memory of all simulated nodes, MB", "fleet_rss_mb"},
		{"CPU of control at rest, % of a core", "idle_cpu_percent"},
		{"first sync of a simulated node, s", "first_sync_s"},
		{"first sync of a node, MB", "first_sync_mb"},
		{"restart of the real proxy until ready, s", "proxy_restart_s"},
		{"CPU of the real proxy for that, s", "proxy_sync_cpu_s"},
	}
	for _, rate := range r.cfg.rates {
		list = append(list, changeLines(fmt.Sprintf("%g changes/s: ", rate), fmt.Sprintf("churn_%g_", rate))...)
	}
	list = append(list, timeLines("start of a pod waits: ", "start_")...)
	list = append(list, timeLines("the first with frozen nodes: ", "start_frozen_first_")...)
	list = append(list, timeLines("the others with frozen nodes: ", "start_frozen_")...)
	list = append(list, changeLines("enrollment of a tenth: ", "enroll_")...)
	list = append(list, line{"enrollment of a tenth: all known, s", "enroll_known_s"})
	list = append(list, changeLines("rollout of a hundredth: ", "rollout_")...)
	return append(list,
		line{"storm: every node served, s", "storm_s"},
		line{"storm: sent to nodes, MB", "storm_mb"},
		line{"storm: peak memory of control, MB", "storm_peak_mb"},
		line{"fail-over: another one leads, s", "failover_leads_s"},
		line{"fail-over: every node served, s", "failover_s"},
		line{"fail-over: every node has a certificate, s", "failover_renewed_s"},
		line{"fail-over: sent to nodes, MB", "failover_mb"},
		line{"fail-over: peak memory of the new leader, MB", "failover_peak_mb"},
	)
}

func changeLines(what, key string) []line {
	return []line{
		{what + "changes", key + "changes"},
		{what + "to the last node, p50, ms", key + "p50_ms"},
		{what + "to the last node, p99, ms", key + "p99_ms"},
		{what + "to the last node, max, ms", key + "max_ms"},
		{what + "CPU of control each, ms", key + "cpu_ms"},
		{what + "CPU of control meanwhile, % of a core", key + "cpu_percent"},
		{what + "CPU of a simulated node each, ms", key + "node_cpu_ms"},
		{what + "CPU of the real proxy each, ms", key + "proxy_cpu_ms"},
		{what + "bytes to a node each", key + "bytes"},
		{what + "responses to a node each", key + "responses"},
	}
}

func timeLines(what, key string) []line {
	return []line{
		{what + "p50, ms", key + "p50_ms"},
		{what + "p99, ms", key + "p99_ms"},
		{what + "max, ms", key + "max_ms"},
		{what + "pods not known in time", key + "late"},
	}
}

// print shows all, and reports whether every bound is met.
func (r *result) print(w io.Writer) bool {
	var names []string
	for _, pods := range r.cfg.sizes {
		names = append(names, fmt.Sprintf("%d pods", pods))
	}
	t := table.Table{To: w, Width: 66}
	t.Row(fmt.Sprintf("%d nodes", r.cfg.nodes), append(names, "last/first")...)
	first, last := r.sample(r.cfg.sizes[0]), r.sample(r.cfg.sizes[len(r.cfg.sizes)-1])
	for _, l := range r.lines() {
		var cells []string
		for _, pods := range r.cfg.sizes {
			cells = append(cells, table.Number(r.sample(pods).get(l.key)))
		}
		t.Row(l.name, append(cells, table.Number(last.get(l.key)/first.get(l.key)))...)
	}
	for _, n := range r.notes {
		fmt.Fprintln(w, "note:", strings.ReplaceAll(n, "\n", "\n  "))
	}
	return t.Bounds(r.bounds())
}

// file is what result.json holds.
type file struct {
	Seed   uint64            `json:"seed"`
	Nodes  int               `json:"nodes"`
	Sizes  map[string]sample `json:"sizes"`
	Notes  []string          `json:"notes"`
	Bounds []fileBound       `json:"bounds"`
}

type fileBound struct {
	Name  string   `json:"name"`
	Value *float64 `json:"value"` // null if it was not measured
	Limit float64  `json:"limit"`
	Least bool     `json:"least,omitempty"`
	Met   bool     `json:"met"`
}

func (r *result) file() file {
	f := file{Seed: r.cfg.seed, Nodes: r.cfg.nodes, Sizes: make(map[string]sample), Notes: r.notes}
	for pods, s := range r.sizes {
		finite := sample{}
		for name, v := range s {
			if isFinite(v) {
				finite[name] = v
			}
		}
		f.Sizes[fmt.Sprint(pods)] = finite
	}
	for _, b := range r.bounds() {
		one := fileBound{Name: b.Name, Limit: b.Limit, Least: b.Least, Met: b.Met()}
		if isFinite(b.Value) {
			one.Value = &b.Value
		}
		f.Bounds = append(f.Bounds, one)
	}
	return f
}

func isFinite(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }

// write writes all that is known by now; a path of "" is nowhere.
func (r *result) write(path string) error {
	if path == "" {
		return nil
	}
	text, err := json.MarshalIndent(r.file(), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
