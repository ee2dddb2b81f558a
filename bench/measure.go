package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"tacit.dev/bench/process"
	"tacit.dev/pause"
)

// settle is how long connections are quiet before memory is read.
const settle = 5 * time.Second

// sample is what one measurement in one mode gave, by the names of the result.
type sample map[string]float64

// measure is one kind of load.
type measure struct {
	name string
	// turns is how often all modes have theirs within one round; their time is
	// divided. One connection's round trip is mostly the wait for a CPU to wake up,
	// which on a virtual machine takes this long now and twice as long a second later.
	turns int
	// bulk: those that are there for that only take part too.
	bulk bool
	take func(ctx context.Context, r *rig, m mode, seconds int) (sample, error)
}

func measures() []measure {
	return []measure{
		{name: "throughput_1", turns: 1, bulk: true, take: throughput(1)},
		{name: "throughput_8", turns: 1, bulk: true, take: throughput(8)},
		{name: "rr_1", turns: 4, take: roundTrips(1)},
		{name: "rr_64", turns: 1, take: roundTrips(64)},
		{name: "new_connections", turns: 1, take: newConnections},
	}
}

// measureAll goes through all modes within each measure, and through all
// measures within each round: what changes on the machine meanwhile meets all
// modes alike.
//
// The result holds what was measured, also beside an error.
func measureAll(ctx context.Context, r *rig, cfg config) (*result, error) {
	res := newResult(r.modes)
	if !pause.For(ctx, settle) {
		return res, ctx.Err()
	}
	if err := measureMemory(res, r.modes, "idle"); err != nil {
		return res, err
	}
	for round := range cfg.rounds {
		for _, what := range measures() {
			if cfg.only != "" && cfg.only != what.name {
				continue
			}
			for turn := range what.turns {
				if err := takeTurn(ctx, r, res, round*what.turns+turn, what, cfg); err != nil {
					return res, err
				}
			}
		}
	}
	return res, measureHeld(ctx, r, res)
}

// takeTurn gives every mode its turn.
func takeTurn(ctx context.Context, r *rig, res *result, turn int, what measure, cfg config) error {
	for _, m := range r.modes {
		if m.bulk && !what.bulk {
			continue
		}
		s, err := what.take(ctx, r, m, max(1, cfg.seconds/what.turns))
		if err != nil {
			return fmt.Errorf("measure %s with %s between client and server: %w", what.name, m.name, err)
		}
		res.add(turn, m.name, s)
	}
	return nil
}

// measureHeld reads the memory with few and with many quiet connections.
func measureHeld(ctx context.Context, r *rig, res *result) error {
	most, err := mostHeld()
	if err != nil {
		return err
	}
	res.few, res.many = 1_000, most
	for _, held := range []struct {
		when string
		n    int
	}{{"few", res.few}, {"many", res.many}} {
		err := r.hold(ctx, held.n, func() error {
			if !pause.For(ctx, settle) {
				return ctx.Err()
			}
			return measureMemory(res, r.modes, held.when)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// mostHeld is 10,000 connections, or as many as the descriptors suffice for where
// the limit cannot be raised: a proxy needs two for each, and some for itself.
func mostHeld() (int, error) {
	const wanted, own = 10_000, 500
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("get the limit of descriptors: %w", err)
	}
	higher := syscall.Rlimit{Cur: 1 << 20, Max: max(l.Max, 1<<20)} // as the lab does
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &higher) == nil {
		return wanted, nil
	}
	return min(wanted, int(min(l.Max, 1<<20)-own)/2), nil
}

func measureMemory(res *result, modes []mode, when string) error {
	for _, m := range modes {
		for _, p := range m.proxies {
			bytes, err := p.RSS()
			if err != nil {
				return err
			}
			res.memory(p.Name, when, bytes)
		}
	}
	return nil
}

// throughput sends one way, client to server, as iperf3 does by default.
func throughput(connections int) func(context.Context, *rig, mode, int) (sample, error) {
	return func(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
		host, port, err := net.SplitHostPort(m.address(iperfPort))
		if err != nil {
			return nil, err
		}
		before, err := process.CPU(m.proxies)
		if err != nil {
			return nil, err
		}
		out, err := r.output(ctx, "exec", m.client, "--", "iperf3", "-J", "-c", host, "-p", port,
			"-t", strconv.Itoa(seconds), "-P", strconv.Itoa(connections))
		if err != nil {
			return nil, err
		}
		after, err := process.CPU(m.proxies)
		if err != nil {
			return nil, err
		}
		gbits, gigabytes, err := parseIperf3([]byte(out))
		name := fmt.Sprintf("throughput_%d", connections)
		return sample{name: gbits, name + "_cpu_seconds": after - before, name + "_gigabytes": gigabytes}, err
	}
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
		w, err := wrk(ctx, r, m, seconds, "-c", strconv.Itoa(connections))
		suffix := fmt.Sprintf("_%d", connections)
		return sample{"rr_p50" + suffix: w.p50, "rr_p99" + suffix: w.p99, "rr_per_second" + suffix: w.rate}, err
	}
}

// newConnections is a connection for each request, 16 at a time.
func newConnections(ctx context.Context, r *rig, m mode, seconds int) (sample, error) {
	before, err := process.CPU(m.proxies)
	if err != nil {
		return nil, err
	}
	w, err := wrk(ctx, r, m, seconds, "-c", "16", "-H", "Connection: close")
	if err != nil {
		return nil, err
	}
	after, err := process.CPU(m.proxies)
	return sample{
		"new_connections":                 w.rate,
		"cpu_milliseconds_per_connection": 1000 * (after - before) / (w.rate * float64(seconds)),
	}, err
}

// wrkSays is what is read of wrk's words; times are microseconds.
type wrkSays struct{ rate, p50, p99 float64 }

func wrk(ctx context.Context, r *rig, m mode, seconds int, more ...string) (wrkSays, error) {
	words := append([]string{"exec", m.client, "--", "wrk", "--latency", "-t", "1", "-d", strconv.Itoa(seconds)}, more...)
	out, err := r.output(ctx, append(words, "http://"+m.address(httpPort)+"/")...)
	if err != nil {
		return wrkSays{}, err
	}
	return parseWrk(out)
}

var (
	wrkRate     = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkLatency  = regexp.MustCompile(`\s(50|99)%\s+([0-9.]+)(us|ms|s)\b`)
	wrkTrouble  = regexp.MustCompile(`Socket errors: .*|Non-2xx.*`)
	wrkInMicros = map[string]float64{"us": 1, "ms": 1e3, "s": 1e6}
)

func parseWrk(text string) (w wrkSays, err error) {
	if trouble := wrkTrouble.FindString(text); trouble != "" {
		return w, fmt.Errorf("wrk met trouble: %s", trouble)
	}
	rate := wrkRate.FindStringSubmatch(text)
	latencies := wrkLatency.FindAllStringSubmatch(text, -1)
	if rate == nil || len(latencies) != 2 {
		return w, fmt.Errorf("parse what wrk says: no rate or latencies in %q", text)
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
