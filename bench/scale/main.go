// Command scale tells what a large cluster costs. It makes up a cluster (bench/scale/cluster)
// behind an API server in memory (bench/scale/api), runs two replicas of control against it, a
// thousand simulated nodes in one process (bench/scale/fleet), and in a lab one real node, and
// measures them at two sizes of the cluster. It prints a table, writes result.json, and its exit
// code is 1 if a bound is not met.
//
// All share one machine: what counts is CPU time, memory, and the ratio of the two sizes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// errBounds is a run that went well and showed that something costs too much.
var errBounds = errors.New("not all bounds are met")

// config is what a run needs.
type config struct {
	// bin holds the programs of Tacit; "" leaves out the real node.
	bin string
	// result is the JSON file to write; "" means none.
	result string
	// sizes are the numbers of pods that are measured, in this order.
	sizes []int
	// captured is how many pods are only captured and remembered; 0 leaves that out.
	captured int
	nodes    int
	frozen   int
	// rates are changes a second, each for this time.
	rates  []float64
	during time.Duration
	// rest is for how many seconds control has to be quiet before something is measured.
	rest int
	// starts is how many pods' starts are measured at a time.
	starts int
	// patience is how long anything is waited for, limit how long a run may take.
	patience, limit time.Duration
	seed            uint64
	// only leaves out the phases that are not named; report has missed bounds be no failure.
	only   string
	report bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := role(ctx, os.Args); err != nil {
		fmt.Fprintf(os.Stderr, "scale: %v\n", err)
		os.Exit(1)
	}
}

// role runs what this process is: a replica of control, which in a lab is called as that, the
// nodes, or the one who measures.
func role(ctx context.Context, args []string) error {
	switch {
	case filepath.Base(args[0]) == "tacit-control":
		return runPlane(ctx, args[1:])
	case len(args) > 1 && args[1] == "control":
		return runPlane(ctx, args[2:])
	case len(args) > 1 && args[1] == "fleet":
		return runFleet(ctx, args[2:])
	}
	cfg, err := parse(args[1:])
	if err != nil {
		return err
	}
	return run(ctx, cfg)
}

// perNode is how many pods a node may have on average: a node has 250 addresses, and the ones
// that are there are not spread evenly.
const perNode = 220

func parse(args []string) (cfg config, err error) {
	f := flag.NewFlagSet("scale", flag.ContinueOnError)
	f.StringVar(&cfg.bin, "bin", "bin", "`folder` of Tacit's programs, for the real node; \"\" leaves it out")
	f.StringVar(&cfg.result, "result", "bench/scale/result.json", "`file` to write")
	sizes := f.String("pods", "10000,100000", "numbers of pods, separated by commas; the last is compared with the first")
	f.IntVar(&cfg.captured, "captured", 150_000, "number of pods that are only captured and remembered; 0 leaves it out")
	f.IntVar(&cfg.nodes, "nodes", 1000, "number of simulated nodes")
	f.IntVar(&cfg.frozen, "frozen", 10, "number of nodes that freeze")
	rates := f.String("rates", "10,100", "changes a second, separated by commas")
	f.DurationVar(&cfg.during, "during", time.Minute, "how long changes come at each rate")
	f.IntVar(&cfg.rest, "rest", 3, "for how many seconds control has to be quiet before something is measured")
	f.IntVar(&cfg.starts, "starts", 100, "number of pods whose starts are measured at a time")
	f.DurationVar(&cfg.patience, "patience", 10*time.Minute, "how long anything is waited for")
	f.DurationVar(&cfg.limit, "limit", time.Hour, "give up after this time")
	f.Uint64Var(&cfg.seed, "seed", 0, "seed of the cluster; 0 means a new one, which is printed")
	f.StringVar(&cfg.only, "only", "", "run these `phases` only, separated by commas")
	f.BoolVar(&cfg.report, "report", false, "report missed bounds without failing")
	if err := f.Parse(args); err != nil {
		return cfg, err
	}
	for text := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 100 {
			return cfg, fmt.Errorf("--pods %q: want numbers of at least 100", *sizes)
		}
		cfg.sizes = append(cfg.sizes, n)
	}
	for text := range strings.SplitSeq(*rates, ",") {
		r, err := strconv.ParseFloat(text, 64)
		if err != nil || r <= 0 {
			return cfg, fmt.Errorf("--rates %q: want numbers above 0", *rates)
		}
		cfg.rates = append(cfg.rates, r)
	}
	if cfg.seed == 0 {
		cfg.seed = rand.Uint64()
	}
	if most := max(slices.Max(cfg.sizes), cfg.captured); most > perNode*cfg.nodes {
		return cfg, fmt.Errorf("%d pods on %d nodes: a node has addresses for %d", most, cfg.nodes, perNode)
	}
	if f.NArg() > 0 || cfg.nodes < 2 || cfg.frozen >= cfg.nodes {
		return cfg, fmt.Errorf("%q, %d nodes of which %d freeze: want no arguments, two nodes or more, and some that do not freeze", f.Args(), cfg.nodes, cfg.frozen)
	}
	return cfg, nil
}

func run(ctx context.Context, cfg config) error {
	ctx, cancel := context.WithTimeout(ctx, cfg.limit)
	defer cancel()
	fmt.Fprintf(os.Stderr, "scale: --seed %d\n", cfg.seed)
	res := newResult(cfg)
	err := measureAll(ctx, cfg, res)
	if met := res.print(os.Stdout); err == nil && !met && !cfg.report {
		err = errBounds
	}
	return err
}
