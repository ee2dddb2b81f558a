// Command load is the load of the tests, made by fortio: a module of its own, because
// fortio would weigh on the versions that Kubernetes is built from.
//
//	load run URL QPS [REPORT]   asks URL at that rate until SIGTERM, on connections that
//	                            are kept and, as often, on a new one for each request
//	load collect ADDRESS        prints what is posted to it, a line each
//
// At its end run prints what became of all requests as a line of JSON, and posts it to
// REPORT, if given: a pod that is deleted takes its log along.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"fortio.org/fortio/fhttp"
	"fortio.org/fortio/periodic"
	"fortio.org/log"
)

// threads ask at the same time, for each kind of connections.
const threads = 4

// Result is what became of the requests of one kind.
type Result struct {
	Pod string `json:"pod"`
	// Kind is kept or new.
	Kind string `json:"kind"`
	// Codes counts answers by HTTP status; -1 is a connection that failed.
	Codes map[int]int64 `json:"codes"`
	// Sockets are the connections that it took.
	Sockets int64 `json:"sockets"`
	// Slowest is the longest request, in seconds.
	Slowest float64 `json:"slowest"`
	// Seconds is how long it asked.
	Seconds float64 `json:"seconds"`
}

// patience is that of whoever asks.
const patience = 30 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log.SetLogLevelQuiet(log.Warning) // failed requests are told, at standard error
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case (len(args) == 3 || len(args) == 4) && args[0] == "run":
		qps, err := strconv.ParseFloat(args[2], 64)
		if err != nil {
			return fmt.Errorf("rate %q: %w", args[2], err)
		}
		return ask(ctx, args[1], qps, append(args, "")[3])
	case len(args) == 2 && args[0] == "collect":
		return collect(ctx, args[1])
	}
	return errors.New("usage: load run URL QPS [REPORT] | collect ADDRESS")
}

// ask asks in both kinds at once until ctx ends.
func ask(ctx context.Context, url string, qps float64, report string) error {
	var all sync.WaitGroup
	errs := make([]error, 2)
	for i, kind := range []string{"kept", "new"} {
		all.Go(func() {
			r, err := askKind(ctx, kind, url, qps)
			errs[i] = errors.Join(err, tell(r, report))
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func askKind(ctx context.Context, kind, url string, qps float64) (Result, error) {
	name, _ := os.Hostname()
	r := Result{Pod: name, Kind: kind, Codes: map[int]int64{}}
	stop := periodic.NewAborter()
	o := fhttp.HTTPRunnerOptions{AllowInitialErrors: true}
	o.QPS, o.NumThreads, o.Duration, o.Stop, o.Out = qps, threads, -1, stop, io.Discard
	o.Uniform, o.NoCatchUp = true, true
	o.HTTPOptions = fhttp.HTTPOptions{DisableKeepAlive: kind == "new", LogErrors: true, HTTPReqTimeOut: patience}
	o.HTTPOptions.InitHeaders()
	o.HTTPOptions.Init(url)
	defer context.AfterFunc(ctx, func() { stop.Abort(true) })()
	done, err := fhttp.RunHTTPTest(&o)
	if err != nil {
		return r, fmt.Errorf("ask %s: %w", url, err)
	}
	maps.Copy(r.Codes, done.RetCodes)
	r.Sockets, r.Slowest, r.Seconds = done.SocketCount, done.DurationHistogram.Max, done.ActualDuration.Seconds()
	return r, nil
}

// tell prints r, and posts it.
func tell(r Result, report string) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	if report == "" {
		return nil
	}
	c := http.Client{Timeout: patience}
	answer, err := c.Post(report, "application/json", bytes.NewReader(line))
	if err != nil {
		return err
	}
	return answer.Body.Close()
}

func collect(ctx context.Context, address string) error {
	s := &http.Server{Addr: address, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if line, err := io.ReadAll(io.LimitReader(r.Body, 1<<16)); err == nil && r.Method == http.MethodPost {
			fmt.Println(string(line))
		}
	})}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
