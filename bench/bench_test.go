package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseWrk(t *testing.T) {
	const said = `Running 2s test @ http://10.30.2.2:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    52.53us  510.03us   6.79ms   94.22%
    Req/Sec     5.40k     2.79k   12.57k    90.00%
  Latency Distribution
     50%   47.50us
     75%  279.00us
     90%  566.00us
     99%    2.80ms
  5384 requests in 1.00s, 541.55KB read
%sRequests/sec:   5382.39
Transfer/sec:    541.39KB
`
	got, err := parseWrk(strings.Replace(said, "%s", "", 1))
	if err != nil || got.rate != 5382.39 || got.p50 != 47.5 || got.p99 != 2800 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{
		"unable to connect to 10.30.2.2:8080",
		strings.Replace(said, "%s", "  Socket errors: connect 0, read 3, write 0, timeout 0\n", 1),
	} {
		if got, err := parseWrk(bad); err == nil {
			t.Errorf("got %+v from %q, want an error", got, bad)
		}
	}
}

func TestParseIperf3(t *testing.T) {
	gbits, gigabytes, err := parseIperf3([]byte(`{"end":{"sum_received":{"bytes":2500000000,"bits_per_second":10e9}}}`))
	if err != nil || gbits != 10 || gigabytes != 2.5 {
		t.Errorf("got %v, %v, %v", gbits, gigabytes, err)
	}
	if _, _, err := parseIperf3([]byte(`{"error":"unable to connect"}`)); err == nil {
		t.Error("no error of a run that failed")
	}
}

// measured is a result with Tacit at the given share of two splicing proxies.
func measured(share float64) *result {
	r := newResult([]mode{{name: "none"}, {name: "splice"}, {name: "tacit"}})
	for round := range 3 {
		drift := float64(round + 1)
		r.add(round, "splice", sample{
			"rr_p50_1": 40 * drift, "rr_p99_64": 900, "throughput_1": 10 / drift, "throughput_8": 12, "new_connections": 4000,
			"throughput_1_cpu_seconds": 1, "throughput_1_gigabytes": 2, "throughput_8_cpu_seconds": 1, "throughput_8_gigabytes": 2})
		r.add(round, "tacit", sample{
			"rr_p50_1": 40 * drift / share, "rr_p99_64": 900, "throughput_1": 10 / drift * share, "throughput_8": 6, "new_connections": 4000 * share,
			"throughput_1_cpu_seconds": 1 / share, "throughput_1_gigabytes": 2, "throughput_8_cpu_seconds": 1 / share, "throughput_8_gigabytes": 2})
	}
	r.few, r.many = 1_000, 10_000
	for when, mb := range map[string]float64{"idle": 15, "few": 30, "many": 15 + 200/share} {
		r.memory("proxy n1", when, mb*1e6)
		r.memory("proxy n2", when, 10e6)
	}
	return r
}

func TestRatiosAreOfTheSameRound(t *testing.T) {
	got := measured(0.9).file()
	want := map[string]float64{"rr_p50_1": 1 / 0.9, "rr_p99_64": 1, "throughput_1": 0.9, "throughput_8": 0.5,
		"cpu_per_gb": 1 / 0.9, "new_connections": 0.9}
	for name, v := range want {
		if d := got.Ratios[name] - v; d > 1e-9 || d < -1e-9 {
			t.Errorf("ratio %s is %v, want %v", name, got.Ratios[name], v)
		}
	}
	if diff := cmp.Diff(map[string]float64{"proxy_idle_mb": 15, "proxy_kb_per_connection": 200 / 0.9 / 10}, got.RSS); diff != "" {
		t.Errorf("memory (-want +got):\n%s", diff)
	}
	if n := len(got.Ratios); n != len(want) {
		t.Errorf("%d ratios, want %d", n, len(want))
	}
}

func TestBounds(t *testing.T) {
	var out bytes.Buffer
	if !measured(0.9).print(&out) {
		t.Errorf("the bounds are not met by:\n%s", out.String())
	}
	out.Reset()
	if measured(0.3).print(&out) || !strings.Contains(out.String(), "NOT MET") {
		t.Errorf("the bounds are met by:\n%s", out.String())
	}
	// What was not measured meets nothing.
	if newResult(nil).print(&out) {
		t.Error("the bounds are met by nothing")
	}
}
