// Command bench tells what Tacit costs. It makes a lab of two nodes and measures,
// in turn and in one run: no proxy; two splicing proxies without TLS
// (bench/splice) where Tacit's would stand; Tacit; and, in throughput, two proxies
// that copy and do not encrypt. It prints a table, writes
// result.json, and its exit code is 1 if a bound is not met.
//
// Absolute numbers are those of the machine, which also runs client and server;
// the ratios of one run are what counts.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
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
	// only leaves out everything but one measure, and memory.
	only string
	// logs is a folder that gets the lab's logs at the end; "" means none.
	logs string
	// limit ends a run that takes longer.
	limit time.Duration
}

func main() {
	var cfg config
	flag.StringVar(&cfg.bin, "bin", "bin", "`folder` of Tacit's programs")
	flag.StringVar(&cfg.result, "result", "bench/result.json", "`file` to write")
	flag.IntVar(&cfg.rounds, "rounds", 3, "how often everything is measured")
	flag.IntVar(&cfg.seconds, "seconds", 2, "how long each measurement takes")
	flag.StringVar(&cfg.only, "only", "", "take this `measure` only")
	flag.StringVar(&cfg.logs, "logs", "", "copy the logs of all processes to this `folder`")
	flag.DurationVar(&cfg.limit, "limit", 3*time.Minute, "give up after this time")
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
	if cfg.bin, err = filepath.Abs(cfg.bin); err != nil {
		return err
	}
	r, err := newRig(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.saveLogs(cfg.logs), r.down()) }()
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
