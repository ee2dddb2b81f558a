package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// outlast has drain run when asked has ended, and returns when that has; or when life ends.
// Another signal ends drain.
func outlast(asked, life context.Context, drain func(context.Context)) {
	select {
	case <-asked.Done():
	case <-life.Done():
		return
	}
	ctx, stop := signal.NotifyContext(life, os.Interrupt, syscall.SIGTERM)
	defer stop()
	drain(ctx)
}
