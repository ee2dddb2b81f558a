package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"

	"tacit.dev/bench/table"
)

// What Tacit may cost.
const (
	rrP50AtMost           = 1.15
	throughputAtLeast     = 0.55
	cpuAtMost             = 2.1
	newConnectionsAtLeast = 0.40
	idleAtMost            = 20e6 // bytes
	perConnectionAtMost   = 25e3 // bytes
)

// result collects samples and tells them.
type result struct {
	modes []string
	turns map[string][]sample           // by mode, then by turn
	rss   map[string]map[string]float64 // bytes, by process, then idle, few or many
	// few and many are how many connections were held.
	few, many int
}

func newResult(modes []mode) *result {
	r := &result{turns: map[string][]sample{}, rss: map[string]map[string]float64{}}
	for _, m := range modes {
		r.modes = append(r.modes, m.name)
	}
	return r
}

func (r *result) add(turn int, mode string, s sample) {
	for len(r.turns[mode]) <= turn {
		r.turns[mode] = append(r.turns[mode], sample{})
	}
	into := r.turns[mode][turn]
	for name, v := range s {
		into[name] = v
	}
	if gigabytes := into["throughput_1_gigabytes"] + into["throughput_8_gigabytes"]; gigabytes > 0 {
		into["cpu_per_gb"] = (into["throughput_1_cpu_seconds"] + into["throughput_8_cpu_seconds"]) / gigabytes
	}
}

func (r *result) memory(process, when string, bytes float64) {
	if r.rss[process] == nil {
		r.rss[process] = map[string]float64{}
	}
	r.rss[process][when] = bytes
}

// absolute is the median over the turns.
func (r *result) absolute(mode, name string) float64 {
	var vs []float64
	for _, s := range r.turns[mode] {
		if v, ok := s[name]; ok {
			vs = append(vs, v)
		}
	}
	return median(vs)
}

// ratio is the median of the turns' ratios of Tacit to two splicing proxies.
func (r *result) ratio(name string) float64 { return r.ratioTo("splice", name) }

func (r *result) ratioTo(mode, name string) float64 {
	var vs []float64
	for i, tacit := range r.turns["tacit"] {
		if i >= len(r.turns[mode]) {
			break
		}
		if other := r.turns[mode][i]; other[name] > 0 {
			vs = append(vs, tacit[name]/other[name])
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

// proxyMemory is the larger of the two proxies.
func (r *result) proxyMemory(when string) float64 {
	return max(r.rss["proxy n1"][when], r.rss["proxy n2"][when])
}

// perConnection is what each of many connections adds, in bytes.
func (r *result) perConnection() float64 {
	return (r.proxyMemory("many") - r.proxyMemory("idle")) / float64(r.many)
}

func (r *result) bounds() []table.Bound {
	return []table.Bound{
		{Name: "round trip p50, 1 connection, Tacit/splicing", Value: r.ratio("rr_p50_1"), Limit: rrP50AtMost},
		{Name: "throughput, 1 connection, Tacit/splicing", Value: r.ratio("throughput_1"), Limit: throughputAtLeast, Least: true},
		{Name: "CPU per GB, Tacit/splicing", Value: r.ratio("cpu_per_gb"), Limit: cpuAtMost},
		{Name: "new connections/s, Tacit/splicing", Value: r.ratio("new_connections"), Limit: newConnectionsAtLeast, Least: true},
		{Name: "RSS of the proxy, idle, MB", Value: r.proxyMemory("idle") / 1e6, Limit: idleAtMost / 1e6},
		{Name: fmt.Sprintf("RSS of the proxy, %d quiet connections, MB", r.many), Value: r.proxyMemory("many") / 1e6,
			Limit: (idleAtMost + float64(r.many)*perConnectionAtMost) / 1e6},
	}
}

// line is one line of the table of measurements.
type line struct{ name, key string }

var lines = [...]line{
	{"throughput, 1 connection, Gbit/s", "throughput_1"},
	{"throughput, 8 connections, Gbit/s", "throughput_8"},
	{"CPU of the proxies per GB, s", "cpu_per_gb"},
	{"round trip p50, 1 connection, µs", "rr_p50_1"},
	{"round trip p99, 1 connection, µs", "rr_p99_1"},
	{"round trip p50, 64 connections, µs", "rr_p50_64"},
	{"round trip p99, 64 connections, µs", "rr_p99_64"},
	{"round trips/s, 64 connections", "rr_per_second_64"},
	{"new connections/s", "new_connections"},
	{"CPU of the proxies per connection, ms", "cpu_milliseconds_per_connection"},
}

// print shows all, and reports whether every bound is met.
func (r *result) print(w io.Writer) bool {
	t := table.Table{To: w, Width: 54}
	r.printMeasured(t)
	r.printMemory(t)
	return t.Bounds(r.bounds())
}

func (r *result) printMeasured(t table.Table) {
	t.Row("", "no proxy", "two splicing", "two copying", "Tacit", "Tacit/splicing", "Tacit/copying")
	for _, l := range lines {
		t.Row(l.name, table.Number(r.absolute("none", l.key)), table.Number(r.absolute("splice", l.key)), table.Number(r.absolute("copy", l.key)),
			table.Number(r.absolute("tacit", l.key)), table.Number(r.ratio(l.key)), table.Number(r.ratioTo("copy", l.key)))
	}
}

func (r *result) printMemory(t table.Table) {
	fmt.Fprintln(t.To)
	t.Row("resident memory, MB", "idle", fmt.Sprintf("%d open", r.few), fmt.Sprintf("%d open", r.many))
	for _, name := range slices.Sorted(maps.Keys(r.rss)) {
		m := r.rss[name]
		t.Row(name, table.Number(m["idle"]/1e6), table.Number(m["few"]/1e6), table.Number(m["many"]/1e6))
	}
}

// file is what result.json holds.
type file struct {
	Ratios   map[string]float64            `json:"ratios"`
	RSS      map[string]float64            `json:"rss"`
	Absolute map[string]map[string]float64 `json:"absolute"`
}

func (r *result) file() file {
	f := file{Ratios: map[string]float64{}, Absolute: map[string]map[string]float64{}}
	for _, name := range []string{"rr_p50_1", "rr_p99_64", "throughput_1", "throughput_8", "cpu_per_gb", "new_connections"} {
		putFinite(f.Ratios, name, r.ratio(name))
	}
	f.RSS = map[string]float64{
		"proxy_idle_mb": r.proxyMemory("idle") / 1e6,
	}
	putFinite(f.RSS, "proxy_kb_per_connection", r.perConnection()/1e3)
	for _, mode := range r.modes {
		f.Absolute[mode] = map[string]float64{}
		for _, l := range lines {
			putFinite(f.Absolute[mode], l.key, r.absolute(mode, l.key))
		}
	}
	f.Absolute["connections held"] = map[string]float64{"few": float64(r.few), "many": float64(r.many)}
	for name, m := range r.rss {
		f.Absolute["rss_mb "+name] = map[string]float64{}
		for when, bytes := range m {
			f.Absolute["rss_mb "+name][when] = bytes / 1e6
		}
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
