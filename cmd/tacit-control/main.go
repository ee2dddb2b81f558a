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

	"tacit.dev/control"
)

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "tacit-control: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	cfg, log, err := parse(args)
	if err != nil {
		return err
	}
	return log.While(func() error {
		c, err := control.New(cfg)
		if err != nil {
			return err
		}
		return c.Run(ctx)
	})
}
