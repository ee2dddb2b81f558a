package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"tacit.dev/bench/process"
	"tacit.dev/pause"
)

// settle is how long connections are quiet before memory is read.
const settle = 5 * time.Second

// memory is what -only calls the measurement of memory.
const memory = "memory"

// sample is what one measurement in one mode gave, by the names of the result.
type sample map[string]float64

// measure is one kind of load.
type measure struct {
	name string
	// turns is how often all modes have theirs within one round; their time is
	// divided. One connection's round trip is mostly the wait for a CPU to wake up,
	// which on a virtual machine takes this long now and twice as long a second later.
	turns int
	// small: only modes with a way for small messages take part, in the first round
	// only, since there is no bound.
	small bool
	take  func(ctx context.Context, r *rig, m mode, seconds int) (sample, error)
}

func measures() []measure {
	return []measure{
		{name: "throughput_1", turns: 1, take: throughput(1)},
		{name: "throughput_8", turns: 1, take: throughput(8)},
		{name: "rr1", turns: 4, take: roundTrips(1)},
		{name: "rr64", turns: 1, take: roundTrips(64)},
		{name: "new", turns: 1, take: newConnections},
		{name: "fairness", turns: 1, small: true, take: fairness},
	}
}

// bulkOnly is for modes that are compared in throughput only.
var bulkOnly = []string{"throughput_1", "throughput_8"}

// takes reports whether a mode takes part in a round: what has no bound only in the
// first.
func (w measure) takes(m mode, round int) bool {
	return (m.only == nil || slices.Contains(m.only, w.name)) && (!w.small || m.small.pod != "") && (round == 0 || !m.beside && !w.small)
}

// measureAll goes through all modes within each measure, and through all
// measures within each round: what changes on the machine meanwhile meets all
// modes alike.
//
// The result holds what was measured, also beside an error.
func measureAll(ctx context.Context, r *rig, cfg config) (*result, error) {
	res := newResult(r.modes, r.notes)
	if !pause.For(ctx, settle) {
		return res, ctx.Err()
	}
	for _, m := range r.modes {
		if err := measureMemory(res, m.proxies, 0); err != nil {
			return res, err
		}
	}
	for round := range cfg.rounds {
		for _, what := range measures() {
			if cfg.only != "" && cfg.only != what.name {
				continue
			}
			if err := takeRound(ctx, r, res, round, what, cfg); err != nil {
				return res, err
			}
		}
	}
	if cfg.only != "" && cfg.only != memory {
		return res, nil
	}
	return res, measureQuiet(ctx, r, res)
}

// takeRound gives every mode its turns.
func takeRound(ctx context.Context, r *rig, res *result, round int, what measure, cfg config) error {
	for turn := range what.turns {
		for _, m := range r.modes {
			if !what.takes(m, round) {
				continue
			}
			s, err := what.take(ctx, r, m, max(1, cfg.seconds/what.turns))
			if err != nil {
				return fmt.Errorf("measure %s with %s between client and server: %w", what.name, m.name, err)
			}
			res.add(round*what.turns+turn, m.name, s)
		}
	}
	return nil
}

// proxiesCPU returns the seconds that the proxies of a mode use for what is done meanwhile.
func proxiesCPU(m mode, do func() error) (float64, error) {
	before, err := process.CPU(m.proxies)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := process.CPU(m.proxies)
	return after - before, err
}

// throughput sends one way, client to server, as iperf3 does by default.
func throughput(connections int) func(context.Context, *rig, mode, int) (sample, error) {
	return func(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
		var out string
		cpu, err := proxiesCPU(m, func() (err error) {
			out, err = r.bulk(ctx, m.load, connections, seconds)
			return err
		})
		if err != nil {
			return nil, err
		}
		gbits, gigabytes, err := parseIperf3([]byte(out))
		return sample{fmt.Sprintf("throughput_%d", connections): gbits, fmt.Sprintf("cpu_per_gb_%d", connections): cpu / gigabytes}, err
	}
}

// bulk returns what iperf3 says.
func (r *rig) bulk(ctx context.Context, w way, connections, seconds int) (string, error) {
	host, port, err := net.SplitHostPort(w.to + iperfPort)
	if err != nil {
		return "", err
	}
	return r.output(ctx, "exec", w.pod, "--", "iperf3", "-J", "-c", host, "-p", port,
		"-t", strconv.Itoa(seconds), "-P", strconv.Itoa(connections))
}

// parseIperf3 reads what the server received: Gbit/s, and gigabytes in all.
func parseIperf3(text []byte) (gbits, gigabytes float64, err error) {
	var out struct {
		End struct {
			Received struct {
				Bytes float64 `json:"bytes"`
				Rate  float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal(text, &out); err != nil {
		return 0, 0, fmt.Errorf("parse what iperf3 says: %w", err)
	}
	if out.Error != "" || out.End.Received.Bytes == 0 {
		return 0, 0, fmt.Errorf("iperf3 moved no bytes: %s", out.Error)
	}
	return out.End.Received.Rate / 1e9, out.End.Received.Bytes / 1e9, nil
}

// roundTrips is a small request and a small answer at a time on each connection.
func roundTrips(connections int) func(context.Context, *rig, mode, int) (sample, error) {
	return func(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
		return requests(ctx, r, m, seconds, fmt.Sprintf("rr%d", connections), "-c", strconv.Itoa(connections))
	}
}

// newConnections is a connection for each request, 16 at a time.
func newConnections(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
	return requests(ctx, r, m, seconds, "new", "-c", "16", "-H", "Connection: close")
}

// requests are wrk's. CPU is in milliseconds per 1,000 of them, times are in microseconds.
func requests(ctx context.Context, r *rig, m mode, seconds int, name string, more ...string) (sample, error) {
	var w wrkSays
	cpu, err := proxiesCPU(m, func() (err error) {
		w, err = wrk(ctx, r, m.load, seconds, more...)
		return err
	})
	return sample{name + "_rate": w.rate, name + "_p50": w.p50, name + "_p99": w.p99, name + "_cpu": 1e6 * cpu / w.requests}, err
}

// fairness is how much longer one connection's small messages take beside a bulk
// transfer on many others.
func fairness(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
	// The transfer has begun when the messages begin, and outlasts them.
	const connections, before, longer = 64, time.Second, 2
	alone, err := wrk(ctx, r, m.small, seconds, "-c", "1")
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := r.bulk(ctx, m.load, connections, seconds+longer)
		return err
	})
	var beside wrkSays
	g.Go(func() (err error) {
		if !pause.For(ctx, before) {
			return ctx.Err()
		}
		beside, err = wrk(ctx, r, m.small, seconds, "-c", "1")
		return err
	})
	err = g.Wait()
	return sample{"alone_p99": alone.p99, "beside_p99": beside.p99, "fairness": beside.p99 / alone.p99}, err
}

// wrkSays is what is read of wrk's words; times are microseconds.
type wrkSays struct{ requests, rate, p50, p99 float64 }

func wrk(ctx context.Context, r *rig, w way, seconds int, more ...string) (wrkSays, error) {
	words := append([]string{"exec", w.pod, "--", "wrk", "--latency", "-t", "1", "-d", strconv.Itoa(seconds)}, more...)
	out, err := r.output(ctx, append(words, "http://"+w.to+httpPort+"/")...)
	if err != nil {
		return wrkSays{}, err
	}
	return parseWrk(out)
}

var (
	wrkRequests = regexp.MustCompile(`\b([0-9]+) requests in `)
	wrkRate     = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkLatency  = regexp.MustCompile(`\s(50|99)%\s+([0-9.]+)(us|ms|s)\b`)
	wrkTrouble  = regexp.MustCompile(`Socket errors: .*|Non-2xx.*`)
	wrkInMicros = map[string]float64{"us": 1, "ms": 1e3, "s": 1e6}
)

func parseWrk(text string) (w wrkSays, err error) {
	if trouble := wrkTrouble.FindString(text); trouble != "" {
		return w, fmt.Errorf("wrk met trouble: %s", trouble)
	}
	requests, rate := wrkRequests.FindStringSubmatch(text), wrkRate.FindStringSubmatch(text)
	latencies := wrkLatency.FindAllStringSubmatch(text, -1)
	if requests == nil || rate == nil || len(latencies) != 2 {
		return w, fmt.Errorf("parse what wrk says: no requests, rate or latencies in %q", text)
	}
	if w.requests, err = strconv.ParseFloat(requests[1], 64); err != nil {
		return w, err
	}
	if w.rate, err = strconv.ParseFloat(rate[1], 64); err != nil {
		return w, err
	}
	for _, l := range latencies {
		v, err := strconv.ParseFloat(l[2], 64)
		if err != nil {
			return w, err
		}
		if v *= wrkInMicros[l[3]]; l[1] == "50" {
			w.p50 = v
		} else {
			w.p99 = v
		}
	}
	return w, nil
}
