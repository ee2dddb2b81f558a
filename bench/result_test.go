package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// measured is a result in which each of Tacit's figures is what the bound says, made
// worse by the given factor, while the machine becomes slower from round to round.
func measured(worse float64) *result {
	r := newResult([]mode{{name: "none"}, {name: "haproxy"}, {name: "tacit"}}, nil)
	for round := range 3 {
		drift := float64(round + 1)
		haproxy, tacit := sample{}, sample{}
		for _, f := range figures {
			haproxy[f.key] = 100 * drift
			tacit[f.key] = 100 * drift * f.limit * worse
			if f.least {
				tacit[f.key] = 100 * drift * f.limit / worse
			}
		}
		r.add(round, "haproxy", haproxy)
		r.add(round, "tacit", tacit)
	}
	r.add(0, "none", sample{"throughput_1": 15})
	for n, mb := range map[int]float64{0: 15, 1_000: 20, 4_000: quietAtMost * worse, 10_000: 75} {
		r.memory("proxy n1", n, mb*1e6)
		r.memory("proxy n2", n, 10e6)
	}
	r.memory("haproxy client", 0, 10e6)
	r.memory("haproxy client", 1_000, 30e6)
	return r
}

func TestRatiosAreOfTheSameRound(t *testing.T) {
	r := measured(1)
	for _, f := range figures {
		if got := r.ratio(f.key); math.Abs(got-f.limit) > 1e-9 {
			t.Errorf("ratio %s is %v, want %v", f.key, got, f.limit)
		}
	}
	// What only one of the two measured, or in another round, is no ratio.
	r = newResult(nil, nil)
	r.add(0, "tacit", sample{"new_rate": 1})
	r.add(1, "haproxy", sample{"new_rate": 1})
	if got := r.ratio("new_rate"); !math.IsNaN(got) {
		t.Errorf("ratio of different rounds is %v", got)
	}
}

// The names are those by which others read the file.
func TestFile(t *testing.T) {
	text, err := json.Marshal(measured(1).file())
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Ratios, RSS map[string]float64
		Absolute    map[string]map[string]float64
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields("throughput_1 throughput_8 cpu_per_gb_1 cpu_per_gb_8 rr64_cpu rr64_rate rr1_p50 rr1_cpu new_rate new_cpu") {
		if _, ok := got.Ratios[name]; !ok {
			t.Errorf("there is no ratio %s", name)
		}
	}
	if n := len(got.Ratios); n != 10 {
		t.Errorf("%d ratios, want 10: %v", n, got.Ratios)
	}
	if diff := cmp.Diff(map[string]float64{"proxy_idle_mb": 15, "proxy_4000_mb": 40, "proxy_kb_per_connection": 6}, got.RSS); diff != "" {
		t.Errorf("memory (-want +got):\n%s", diff)
	}
	for where, want := range map[string]map[string]float64{
		"none":                      {"throughput_1": 15},
		"rss_mb proxy n2":           {"idle": 10, "1000": 10, "4000": 10, "10000": 10},
		"kb_per_connection tacit":   {"1000": 5, "4000": 6.25, "10000": 6},
		"kb_per_connection haproxy": {"1000": 20},
	} {
		if diff := cmp.Diff(want, got.Absolute[where]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", where, diff)
		}
	}
}

func TestFileWithoutMeasurements(t *testing.T) {
	text, err := json.Marshal(newResult(nil, nil).file())
	if err != nil || !strings.HasPrefix(string(text), `{"ratios":{},"rss":{},`) {
		t.Errorf("got %s, %v", text, err)
	}
}

func TestBounds(t *testing.T) {
	var out bytes.Buffer
	if !measured(0.999).print(&out) || strings.Contains(out.String(), "NOT MET") {
		t.Errorf("the bounds are not met by:\n%s", out.String())
	}
	out.Reset()
	if measured(1.001).print(&out) || strings.Count(out.String(), "NOT MET") != len(figures)+1 {
		t.Errorf("some bounds are met by:\n%s", out.String())
	}
	// What was not measured meets nothing.
	if newResult(nil, nil).print(&out) {
		t.Error("the bounds are met by nothing")
	}
}

// One bound that is missed is enough.
func TestEachBoundCounts(t *testing.T) {
	for _, f := range figures {
		r := measured(0.9)
		for round := range 3 {
			r.add(round, "tacit", sample{f.key: map[bool]float64{true: 0, false: math.MaxFloat64}[f.least]})
		}
		var out bytes.Buffer
		if r.print(&out) {
			t.Errorf("the bounds are met without %s", f.key)
		}
	}
}

// Each aim is better than its bound.
func TestAims(t *testing.T) {
	for _, b := range newResult(nil, nil).bounds() {
		b.Value = b.Aim
		if !b.Met() || b.Aim == b.Limit || math.Abs(b.Near()-1) > 1e-9 {
			t.Errorf("%s: limit %v, aim %v", b.Name, b.Limit, b.Aim)
		}
	}
}

func TestNotesArePrinted(t *testing.T) {
	var out bytes.Buffer
	newResult(nil, []string{"left out\nsince"}).print(&out)
	if want := fmt.Sprintf("note: %s", "left out\n  since"); !strings.Contains(out.String(), want) {
		t.Errorf("no %q in:\n%s", want, out.String())
	}
}
