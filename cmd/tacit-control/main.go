// Command tacit-control is the control plane of a mesh: it reads the objects of a
// cluster, tells the nodes what they have to know, and signs their certificates.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sync/errgroup"

	"tacit.dev/control"
	"tacit.dev/memory"
)

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do, args := run, os.Args[1:]
	if len(args) > 0 && args[0] == "predelete" {
		do, args = predelete, args[1:]
	}
	if err := do(ctx, args); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "tacit-control: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	cfg, log, err := parse(args)
	if err != nil {
		return err
	}
	if limit, told := memory.Limit(); told {
		memory.Bound(limit / 10 * 9) // the rest is for the program itself, and what the kernel charges
	}
	return log.While(func() error {
		c, err := control.New(cfg)
		if err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return c.Run(ctx) })
		g.Go(func() error { return memory.Run(ctx, memory.Config{Registry: cfg.Registry, Log: cfg.Log}) })
		return g.Wait()
	})
}
