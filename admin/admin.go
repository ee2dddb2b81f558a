// Package admin lets a person or a program look into one running process:
// liveness, readiness, metrics, profiles, and dumps of its state as JSON. It
// stands beside the way of the bytes. It refuses to change anything: every
// request only reads, and what it is given to show must hold no secret.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
)

const (
	// headerLimit bounds how long another process may take to answer.
	headerLimit = 5 * time.Second
	// farewell is what open requests get when the process ends.
	farewell = time.Second
	// metricsLimit bounds what is passed on of another process, in bytes.
	metricsLimit = 16 << 20
)

// limits bound what one connection may take.
type limits struct {
	// header bounds how long a request may take to arrive, request how long one may
	// last, idle how long a connection may wait for the next one.
	header, request, idle time.Duration
	// headerBytes bounds the size of a request's header, give or take 4 kB.
	headerBytes int
}

var (
	// fromHere: a profile of two minutes is the longest request.
	fromHere = limits{header: 5 * time.Second, request: 3 * time.Minute, idle: 3 * time.Minute, headerBytes: 16 << 10}
	// fromNetwork: whoever reads metrics is done in seconds, and sends little.
	fromNetwork = limits{header: 2 * time.Second, request: 10 * time.Second, idle: 5 * time.Second, headerBytes: 4 << 10}
)

// Config is what Run serves.
type Config struct {
	// Addr is the address to listen on: HOST:PORT of TCP, or the path of a unix
	// socket that is made for our own user alone. There is no default:
	// who gives an address without a host means to be seen from outside.
	Addr string
	// Metrics is a second address, for what comes over a network or from somebody who is not
	// trusted: only readiness, liveness and metrics are served there, no profile and no
	// dump. "" means none.
	Metrics string
	// MetricsUID is whose socket Metrics is, if it is a path; 0 or less means our own user's.
	MetricsUID int
	// Beside are other processes of the same pod, by name, with the address of their
	// Metrics: these are part of /metrics, with the label process="NAME", and are passed on
	// as they are as /metrics/NAME.
	Beside map[string]string
	// Profiles has Addr serve profiles of the process, which show what it does and cost
	// it time.
	Profiles bool
	// Registry is served at /metrics. nil means an empty one.
	Registry *prometheus.Registry
	// Ready says why the process is not ready, nil if it is. It is called per
	// request and concurrently. A nil func means always ready.
	Ready func() error
	// Dump names what /dump/NAME serves as JSON. The functions are called
	// concurrently.
	Dump map[string]func() any
	// Log gets what goes wrong while serving. nil means nowhere.
	Log *slog.Logger
}

// Validate reports what Run would refuse.
func (c Config) Validate() error {
	if _, _, err := net.SplitHostPort(c.Addr); err != nil && !isPath(c.Addr) {
		return fmt.Errorf("admin address %q: want HOST:PORT, or a path: %w", c.Addr, err)
	}
	if _, _, err := net.SplitHostPort(c.Metrics); err != nil && c.Metrics != "" && !isPath(c.Metrics) {
		return fmt.Errorf("address of metrics %q: want HOST:PORT, or a path: %w", c.Metrics, err)
	}
	return nil
}

// NewRegistry returns a registry that holds what the Go runtime and the kernel
// say of this process, and its version.
func NewRegistry(version string) *prometheus.Registry {
	r := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tacit_build_info", Help: "Always 1; the labels name what the process was built from.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Run serves until ctx ends, then gives open requests a moment to finish. It
// returns nil when ctx ended it.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return listen(ctx, place{cfg.Addr, 0}, newHandler(cfg), fromHere, cfg.Log) })
	if cfg.Metrics != "" {
		g.Go(func() error {
			return listen(ctx, place{cfg.Metrics, cfg.MetricsUID}, newMetricsHandler(cfg), fromNetwork, cfg.Log)
		})
	}
	return g.Wait()
}

func listen(ctx context.Context, at place, h http.Handler, lim limits, log *slog.Logger) error {
	l, err := at.listen(ctx)
	if err != nil {
		return fmt.Errorf("listen on admin address: %w", err)
	}
	return serve(ctx, l, h, lim, log)
}

// serve owns l.
func serve(ctx context.Context, l net.Listener, h http.Handler, lim limits, log *slog.Logger) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: lim.header,
		ReadTimeout:       lim.header,
		WriteTimeout:      lim.request,
		IdleTimeout:       lim.idle,
		MaxHeaderBytes:    lim.headerBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	ended := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { ended <- shutdown(s) })
	err := s.Serve(&bounded{Listener: l})
	if stop() || !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve admin on %s: %w", l.Addr(), err)
	}
	return <-ended
}

func shutdown(s *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		return s.Close()
	}
	return nil
}
