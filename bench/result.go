package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
)

// The bounds of issue 2, section 8.
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
	modes  []string
	rounds map[string][]sample           // by mode, then by round
	rss    map[string]map[string]float64 // bytes, by process, then by when
}

func newResult(modes []mode) *result {
	r := &result{rounds: map[string][]sample{}, rss: map[string]map[string]float64{}}
	for _, m := range modes {
		r.modes = append(r.modes, m.name)
	}
	return r
}

func (r *result) add(round int, mode string, s sample) {
	for len(r.rounds[mode]) <= round {
		r.rounds[mode] = append(r.rounds[mode], sample{})
	}
	into := r.rounds[mode][round]
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

// absolute is the median over the rounds.
func (r *result) absolute(mode, name string) float64 {
	var vs []float64
	for _, s := range r.rounds[mode] {
		if v, ok := s[name]; ok {
			vs = append(vs, v)
		}
	}
	return median(vs)
}

// ratio is the median of the rounds' ratios of Tacit to two splicing proxies.
func (r *result) ratio(name string) float64 {
	var vs []float64
	for i, tacit := range r.rounds["tacit"] {
		if splice := r.rounds["splice"][i]; splice[name] > 0 {
			vs = append(vs, tacit[name]/splice[name])
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

// perConnection is what each of 10,000 connections adds, in bytes.
func (r *result) perConnection() float64 {
	return (r.proxyMemory("10000") - r.proxyMemory("idle")) / 10_000
}

// bound is one line of the table of bounds.
type bound struct {
	name  string
	value float64
	limit float64
	least bool // limit is the least value, not the most
	unit  string
}

func (b bound) met() bool {
	if b.least {
		return b.value >= b.limit
	}
	return b.value <= b.limit
}

func (r *result) bounds() []bound {
	return []bound{
		{name: "round-trip p50, 1 connection: Tacit / two splicing proxies", value: r.ratio("rr_p50_1"), limit: rrP50AtMost},
		{name: "throughput, 1 connection: Tacit / two splicing proxies", value: r.ratio("throughput_1"), limit: throughputAtLeast, least: true},
		{name: "CPU per GB: Tacit / two splicing proxies", value: r.ratio("cpu_per_gb"), limit: cpuAtMost},
		{name: "new connections/s: Tacit / two splicing proxies", value: r.ratio("new_connections"), limit: newConnectionsAtLeast, least: true},
		{name: "RSS of the proxy, idle", value: r.proxyMemory("idle") / 1e6, limit: idleAtMost / 1e6, unit: " MB"},
		{name: "RSS of the proxy, 10,000 quiet connections", value: r.proxyMemory("10000") / 1e6,
			limit: (idleAtMost + 10_000*perConnectionAtMost) / 1e6, unit: " MB"},
	}
}

// line is one line of the table of measurements.
type line struct{ name, key, unit string }

var lines = [...]line{
	{"throughput, 1 connection", "throughput_1", "Gbit/s"},
	{"throughput, 8 connections", "throughput_8", "Gbit/s"},
	{"CPU of the proxies per GB", "cpu_per_gb", "s"},
	{"round trip p50, 1 connection", "rr_p50_1", "µs"},
	{"round trip p99, 1 connection", "rr_p99_1", "µs"},
	{"round trip p50, 64 connections", "rr_p50_64", "µs"},
	{"round trip p99, 64 connections", "rr_p99_64", "µs"},
	{"round trips/s, 64 connections", "rr_per_second_64", ""},
	{"new connections/s", "new_connections", ""},
	{"CPU of the proxies per connection", "cpu_milliseconds_per_connection", "ms"},
}

// print shows all, and reports whether every bound is met.
func (r *result) print(to io.Writer) bool {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
	defer w.Flush()
	fmt.Fprintln(w, "\tno proxy\ttwo splicing\tTacit\tTacit / splicing\t")
	for _, l := range lines {
		fmt.Fprintf(w, "%s %s\t%s\t%s\t%s\t%s\t\n", l.name, l.unit, number(r.absolute("none", l.key)),
			number(r.absolute("splice", l.key)), number(r.absolute("tacit", l.key)), number(r.ratio(l.key)))
	}
	fmt.Fprintln(w, "\t\t\t\t\t\nresident memory, MB\tidle\t1,000 open\t10,000 open\t\t")
	names := make([]string, 0, len(r.rss))
	for name := range r.rss {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		m := r.rss[name]
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t\t\n", name, m["idle"]/1e6, m["1000"]/1e6, m["10000"]/1e6)
	}
	fmt.Fprintln(w, "\t\t\t\t\t\nbound\tmeasured\t\tlimit\t\t")
	met := true
	for _, b := range r.bounds() {
		verdict, sign := "met", "≤"
		if b.least {
			sign = "≥"
		}
		if !b.met() {
			verdict, met = "NOT MET", false
		}
		fmt.Fprintf(w, "%s\t%s%s\t%s\t%g%s\t%s\t\n", b.name, number(b.value), b.unit, sign, b.limit, b.unit, verdict)
	}
	return met
}

// number has three digits that say something.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
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
		"proxy_idle_mb":           r.proxyMemory("idle") / 1e6,
		"proxy_kb_per_connection": r.perConnection() / 1e3,
	}
	for _, mode := range r.modes {
		f.Absolute[mode] = map[string]float64{}
		for _, l := range lines {
			putFinite(f.Absolute[mode], l.key, r.absolute(mode, l.key))
		}
	}
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
