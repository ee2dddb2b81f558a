package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"tacit.dev/bench/table"
)

// figure is one of Tacit's, as its ratio to HAProxy's.
type figure struct {
	key, name  string
	limit, aim float64
	least      bool
}

// figures are as good as the best of what others offer, or better; the aim is what
// Tacit's design should be able to do.
var figures = [...]figure{
	{"throughput_1", "throughput, 1 connection", 1.8, 2.2, true},
	{"throughput_8", "throughput, 8 connections", 1.5, 1.8, true},
	{"cpu_per_gb_1", "CPU per GB, 1 connection", 0.60, 0.50, false},
	{"cpu_per_gb_8", "CPU per GB, 8 connections", 0.65, 0.50, false},
	{"rr64_cpu", "CPU per round trip, 64 connections", 0.85, 0.75, false},
	{"rr64_rate", "round trips/s, 64 connections", 1.05, 1.20, true},
	{"rr1_p50", "round trip p50, 1 connection", 1.00, 0.90, false},
	{"rr1_cpu", "CPU per round trip, 1 connection", 1.00, 0.90, false},
	{"new_rate", "new connections/s", 3.9, 5, true},
	{"new_cpu", "CPU per new connection", 0.18, 0.14, false},
}

// What a proxy with comparedQuiet connections may take, and should, in MB.
const (
	quietAtMost = 40
	quietAim    = 32
)

// line is one line of the table of measurements.
type line struct{ name, key string }

var lines = [...]line{
	{"throughput, 1 connection, Gbit/s", "throughput_1"},
	{"throughput, 8 connections, Gbit/s", "throughput_8"},
	{"CPU of the proxies per GB, 1 connection, s", "cpu_per_gb_1"},
	{"CPU of the proxies per GB, 8 connections, s", "cpu_per_gb_8"},
	{"round trips/s, 64 connections", "rr64_rate"},
	{"round trip p50, 64 connections, µs", "rr64_p50"},
	{"round trip p99, 64 connections, µs", "rr64_p99"},
	{"CPU per 1,000 round trips, 64 connections, ms", "rr64_cpu"},
	{"round trip p50, 1 connection, µs", "rr1_p50"},
	{"round trip p99, 1 connection, µs", "rr1_p99"},
	{"CPU per 1,000 round trips, 1 connection, ms", "rr1_cpu"},
	{"new connections/s, 16 at a time", "new_rate"},
	{"CPU per 1,000 new connections, ms", "new_cpu"},
	{"fairness: small messages alone, p99, µs", "alone_p99"},
	{"fairness: beside 64 bulk connections, p99, µs", "beside_p99"},
	{"fairness: beside/alone", "fairness"},
}

// result collects samples and tells them.
type result struct {
	modes []string
	turns map[string][]sample        // by mode, then by turn
	rss   map[string]map[int]float64 // bytes, by process, then by how many connections are held
	notes []string
}

func newResult(modes []mode, notes []string) *result {
	r := &result{turns: map[string][]sample{}, rss: map[string]map[int]float64{}, notes: notes}
	for _, m := range modes {
		r.modes = append(r.modes, m.name)
	}
	return r
}

func (r *result) add(turn int, mode string, s sample) {
	for len(r.turns[mode]) <= turn {
		r.turns[mode] = append(r.turns[mode], sample{})
	}
	maps.Copy(r.turns[mode][turn], s)
}

func (r *result) memory(process string, connections int, bytes float64) {
	if r.rss[process] == nil {
		r.rss[process] = map[int]float64{}
	}
	r.rss[process][connections] = bytes
}

// absolute is the median over the turns.
func (r *result) absolute(mode, key string) float64 {
	var vs []float64
	for _, s := range r.turns[mode] {
		if v, ok := s[key]; ok {
			vs = append(vs, v)
		}
	}
	return median(vs)
}

// ratio is the median of the turns' ratios of Tacit to HAProxy.
func (r *result) ratio(key string) float64 {
	var vs []float64
	others := r.turns["haproxy"]
	for i, tacit := range r.turns["tacit"] {
		if i >= len(others) {
			break
		}
		if v, ok := tacit[key]; ok && others[i][key] > 0 {
			vs = append(vs, v/others[i][key])
		}
	}
	return median(vs)
}

// median is NaN of nothing.
func median(vs []float64) float64 {
	if len(vs) == 0 {
		return math.NaN()
	}
	vs = slices.Sorted(slices.Values(vs))
	if n := len(vs); n%2 == 0 {
		return (vs[n/2-1] + vs[n/2]) / 2
	}
	return vs[len(vs)/2]
}

// proxies are the two whose memory is looked at, by mode.
var proxies = map[string][2]string{
	"tacit":   {"proxy n1", "proxy n2"},
	"haproxy": {"haproxy client", "haproxy server"},
}

// proxyMemory is that of the larger of a mode's two proxies, in bytes; NaN if it was not
// measured.
func (r *result) proxyMemory(mode string, connections int) float64 {
	larger := math.NaN()
	for _, name := range proxies[mode] {
		if v, ok := r.rss[name][connections]; ok && !(larger > v) {
			larger = v
		}
	}
	return larger
}

// perConnection is what each of so many connections adds, in bytes.
func (r *result) perConnection(mode string, connections int) float64 {
	return (r.proxyMemory(mode, connections) - r.proxyMemory(mode, 0)) / float64(connections)
}

// held lists how many connections were held, most last.
func (r *result) held() []int {
	all := map[int]bool{}
	for _, m := range r.rss {
		for n := range m {
			all[n] = n > 0
		}
	}
	delete(all, 0)
	return slices.Sorted(maps.Keys(all))
}

func (r *result) bounds() []table.Bound {
	var list []table.Bound
	for _, f := range figures {
		list = append(list, table.Bound{Name: f.name + ", Tacit/HAProxy", Value: r.ratio(f.key), Limit: f.limit, Least: f.least, Aim: f.aim})
	}
	return append(list, table.Bound{Name: fmt.Sprintf("RSS of a proxy with %d quiet connections, MB", comparedQuiet),
		Value: r.proxyMemory("tacit", comparedQuiet) / 1e6, Limit: quietAtMost, Aim: quietAim})
}

// print shows all, and reports whether every bound is met.
func (r *result) print(w io.Writer) bool {
	t := table.Table{To: w, Width: 54}
	r.printMeasured(t)
	r.printMemory(t)
	for _, n := range r.notes {
		fmt.Fprintln(w, "\nnote:", strings.ReplaceAll(n, "\n", "\n  "))
	}
	return t.Bounds(r.bounds())
}

func (r *result) printMeasured(t table.Table) {
	t.Row("", "HAProxy", "Tacit", "Tacit/HAProxy")
	for _, l := range lines {
		t.Row(l.name, append(r.absolutes(l.key, "haproxy", "tacit"), table.Number(r.ratio(l.key)))...)
	}
	fmt.Fprintln(t.To)
	t.Row("beside, in the first round", "no proxy", "splicing", "copying", "wireguard-go", "HAProxy resumes")
	for _, l := range lines {
		row := r.absolutes(l.key, "none", "splice", "copy", "wireguard", "haproxy_resuming")
		if slices.ContainsFunc(row, func(cell string) bool { return cell != table.Number(math.NaN()) }) {
			t.Row(l.name, row...)
		}
	}
}

func (r *result) absolutes(key string, modes ...string) (list []string) {
	for _, mode := range modes {
		list = append(list, table.Number(r.absolute(mode, key)))
	}
	return list
}

func (r *result) printMemory(t table.Table) {
	fmt.Fprintln(t.To)
	counts := append([]int{0}, r.held()...)
	heads := []string{"idle"}
	for _, n := range counts[1:] {
		heads = append(heads, fmt.Sprintf("%d open", n))
	}
	t.Row("resident memory, MB", heads...)
	for _, name := range slices.Sorted(maps.Keys(r.rss)) {
		t.Row(name, cells(counts, func(n int) float64 {
			if v, ok := r.rss[name][n]; ok {
				return v / 1e6
			}
			return math.NaN()
		})...)
	}
	for _, mode := range slices.Sorted(maps.Keys(proxies)) {
		t.Row("kB per connection, larger proxy, "+mode, cells(counts, func(n int) float64 { return r.perConnection(mode, n) / 1e3 })...)
	}
}

func cells(counts []int, value func(int) float64) (list []string) {
	for _, n := range counts {
		list = append(list, table.Number(value(n)))
	}
	return list
}

// file is what result.json holds.
type file struct {
	Ratios   map[string]float64            `json:"ratios"`
	RSS      map[string]float64            `json:"rss"`
	Absolute map[string]map[string]float64 `json:"absolute"`
}

func (r *result) file() file {
	f := file{Ratios: map[string]float64{}, RSS: map[string]float64{}, Absolute: map[string]map[string]float64{}}
	for _, one := range figures {
		putFinite(f.Ratios, one.key, r.ratio(one.key))
	}
	held := r.held()
	putFinite(f.RSS, "proxy_idle_mb", r.proxyMemory("tacit", 0)/1e6)
	putFinite(f.RSS, fmt.Sprintf("proxy_%d_mb", comparedQuiet), r.proxyMemory("tacit", comparedQuiet)/1e6)
	if len(held) > 0 {
		putFinite(f.RSS, "proxy_kb_per_connection", r.perConnection("tacit", held[len(held)-1])/1e3)
	}
	for _, mode := range r.modes {
		f.Absolute[mode] = map[string]float64{}
		for _, l := range lines {
			putFinite(f.Absolute[mode], l.key, r.absolute(mode, l.key))
		}
	}
	for name, m := range r.rss {
		f.Absolute["rss_mb "+name] = map[string]float64{}
		for n, bytes := range m {
			when := strconv.Itoa(n)
			if n == 0 {
				when = "idle"
			}
			f.Absolute["rss_mb "+name][when] = bytes / 1e6
		}
	}
	for mode := range proxies {
		each := map[string]float64{}
		for _, n := range held {
			putFinite(each, strconv.Itoa(n), r.perConnection(mode, n)/1e3)
		}
		f.Absolute["kb_per_connection "+mode] = each
	}
	return f
}

// putFinite leaves out what was not measured; JSON has no word for it.
func putFinite(m map[string]float64, name string, v float64) {
	if !math.IsNaN(v) && !math.IsInf(v, 0) {
		m[name] = v
	}
}

func (r *result) write(path string) error {
	text, err := json.MarshalIndent(r.file(), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
