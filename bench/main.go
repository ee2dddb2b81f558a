// Command bench tells what Tacit costs. It makes a lab of two nodes and measures,
// in turn and in one run: two HAProxies with mutual TLS where Tacit's proxies would
// stand; Tacit; and beside them, in the first round and without a bound, no proxy, two
// splicing proxies without TLS (bench/splice), in throughput two proxies that copy and do
// not encrypt, and wireguard-go, and in new connections an HAProxy that resumes
// sessions. It prints a table, writes result.json, and its exit code is 1 if a bound is
// not met.
//
// CPU of Tacit is that of all its processes: agents and control use some while nothing is
// done, which shows only on a machine that has other work besides.
//
// Absolute numbers are those of the machine, which also runs client and server; what
// counts are the ratios of Tacit to HAProxy in the same round.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// errBounds is a run that went well and showed that Tacit costs too much.
var errBounds = errors.New("not all bounds are met")

// config is what a run needs.
type config struct {
	// bin holds the programs of Tacit.
	bin string
	// result is the JSON file to write.
	result string
	// rounds is how often everything is measured, seconds how long at a time.
	rounds, seconds int
	// only leaves out everything but one measure.
	only string
	// logs is a folder that gets the lab's logs at the end; "" means none.
	logs string
	// limit ends a run that takes longer.
	limit time.Duration
	// policies is how many are compared with none, instead of all else; 0 for all else.
	policies int
}

func main() {
	var cfg config
	flag.StringVar(&cfg.bin, "bin", "bin", "`folder` of Tacit's programs")
	flag.StringVar(&cfg.result, "result", "bench/result.json", "`file` to write")
	flag.IntVar(&cfg.rounds, "rounds", 3, "how often everything is measured")
	flag.IntVar(&cfg.seconds, "seconds", 2, "how long each measurement takes")
	flag.StringVar(&cfg.only, "only", "", "take this `measure` only: "+strings.Join(measureNames(), ", "))
	flag.StringVar(&cfg.logs, "logs", "", "copy the logs of all processes to this `folder`")
	flag.IntVar(&cfg.policies, "policies", 0, "compare new connections and round trips with this `number` of policies and without, and nothing else")
	flag.DurationVar(&cfg.limit, "limit", 4*time.Minute, "give up after this time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, cfg); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cfg config) (err error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.limit)
	defer cancel()
	if cfg.only != "" && !slices.Contains(measureNames(), cfg.only) {
		return fmt.Errorf("there is no measure %q: want one of %s", cfg.only, strings.Join(measureNames(), ", "))
	}
	if cfg.bin, err = filepath.Abs(cfg.bin); err != nil {
		return err
	}
	r, err := newRig(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.saveLogs(cfg.logs), r.down()) }()
	if cfg.policies > 0 {
		met, err := measurePolicies(ctx, r, cfg)
		if err == nil && !met {
			err = errBounds
		}
		return err
	}
	res, err := measureAll(ctx, r, cfg)
	if err != nil {
		res.print(os.Stdout)
		return err
	}
	if err := res.write(cfg.result); err != nil {
		return err
	}
	if met := res.print(os.Stdout); !met && cfg.only == "" {
		return errBounds
	}
	return nil
}

func measureNames() []string {
	var names []string
	for _, m := range measures() {
		names = append(names, m.name)
	}
	return append(names, memory)
}
