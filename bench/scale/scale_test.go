package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain is control or the nodes if it was started as one of them.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "control" || os.Args[1] == "fleet") {
		if err := role(context.Background(), os.Args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A small cluster goes through all that needs no long wait, and every figure comes out that
// needs no real node.
func TestSmall(t *testing.T) {
	cfg := config{
		result: filepath.Join(t.TempDir(), "result.json"), sizes: []int{500}, nodes: 20, frozen: 1, rates: []float64{50}, during: time.Second,
		starts: 5, patience: time.Minute, seed: 18, only: "rest,churn_50,fresh,starts,enroll,rollout,storm",
	}
	res := newResult(cfg)
	if err := measureAll(t.Context(), cfg, res); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(cfg.result); err != nil || !strings.Contains(string(text), "churn_50_p99_ms") {
		t.Errorf("the result is %s, %v", text, err)
	}
	var table bytes.Buffer
	res.print(&table)
	t.Logf("\n%s", &table)
	for _, n := range res.notes {
		if !strings.Contains(n, "another one leads") { // a machine that is busy may lose a Lease
			t.Error(n)
		}
	}
	for _, l := range res.lines() {
		if _, ok := res.sample(500)[l.key]; !ok && !slices.ContainsFunc([]string{"real", "frozen", "fail-over", "peak, MB"}, func(s string) bool { return strings.Contains(l.name, s) }) {
			t.Errorf("not measured: %s", l.name)
		}
	}
}

// good is a result of which every bound is met.
func good(t *testing.T) *result {
	t.Helper()
	cfg, err := parse([]string{"-pods", "1000,2000", "-captured", "3000", "-seed", "1"})
	if err != nil {
		t.Fatal(err)
	}
	r := newResult(cfg)
	for _, pods := range []int{1000, 2000, 3000} {
		for _, l := range r.lines() {
			r.sample(pods)[l.key] = 0.5
		}
		for _, more := range []string{"failover_harmed", "failover_refused", "storm_harmed", "differing"} {
			r.sample(pods)[more] = 0
		}
		r.sample(pods)["failover_memory"], r.sample(pods)["captured_pods"] = 1.2, 2700
	}
	return r
}

func TestBounds(t *testing.T) {
	var table bytes.Buffer
	if !good(t).print(&table) {
		t.Errorf("the bounds are not met by:\n%s", &table)
	}
	for name, value := range map[string]float64{
		"churn_10_cpu_ms": 0.8, "churn_100_p99_ms": 2001, "stream_kb": 51, "proxy_rss_mb": 71, "failover_harmed": 1, "storm_s": 21, "differing": 1,
	} {
		r := good(t)
		r.sample(2000)[name] = value
		if r.print(&table) {
			t.Errorf("the bounds are met by %s of %g", name, value)
		}
	}
	missing := good(t)
	delete(missing.sample(2000), "first_sync_s")
	if missing.print(&table) {
		t.Error("the bounds are met by what was not measured")
	}
	few := good(t)
	few.sample(3000)["captured_pods"] = 2699
	if few.print(&table) {
		t.Error("the bounds are met though pods are missing")
	}
}

func TestParseMetric(t *testing.T) {
	for line, want := range map[string]struct {
		name string
		v    float64
		ok   bool
	}{
		`tacit_xds_streams{type="address"} 7`: {"tacit_xds_streams", 7, true},
		"go_memstats_gc_sys_bytes 1.5e+06":    {"go_memstats_gc_sys_bytes", 1.5e6, true},
		"# HELP go_x Of 3":                    {},
		"":                                    {},
	} {
		if name, v, ok := parseMetric(line); name != want.name && want.ok || v != want.v && want.ok || ok != want.ok {
			t.Errorf("parseMetric(%q) = %q, %v, %v", line, name, v, ok)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, args := range []string{"-pods 7", "-pods x", "-rates 0", "-nodes 1", "-pods 1000 -captured 0 -nodes 10 -frozen 10", "-nodes 100", "more"} {
		if _, err := parse(strings.Fields(args)); err == nil {
			t.Errorf("%s: no error", args)
		}
	}
}
