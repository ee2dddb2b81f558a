package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// site is a web server whose probes can be told to fail.
type site struct {
	health *health.Server
	// mu guards what follows.
	mu     sync.Mutex
	failed bool
	// probers are the addresses from which probes came, by the probes' paths.
	probers map[string][]string
}

// web serves HTTP, and the gRPC health protocol if there is a second address:
//
//	GET /          who this is, and who asks
//	GET /probe/X   200, or 500 after POST /fail
//	GET /probers   a line for each X: from which addresses it was asked
//	POST /fail     all probes fail from now on
func web(ctx context.Context, addresses []string) error {
	s := &site{health: health.NewServer(), probers: map[string][]string{}}
	all, ctx := errgroup.WithContext(ctx)
	all.Go(func() error { return serveHTTP(ctx, addresses[0], s.handler(), "", "") })
	if len(addresses) > 1 {
		all.Go(func() error { return s.serveGRPC(ctx, addresses[1]) })
	}
	return all.Wait()
}

func (s *site) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		name, _ := os.Hostname()
		fmt.Fprintf(w, "this is %s on %s, you are %s\n", name, os.Getenv("NODE"), r.RemoteAddr)
	})
	mux.HandleFunc("GET /probe/{what}", s.probe)
	mux.HandleFunc("GET /probers", s.tellProbers)
	mux.HandleFunc("POST /fail", func(http.ResponseWriter, *http.Request) { s.fail() })
	return mux
}

func (s *site) probe(w http.ResponseWriter, r *http.Request) {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	s.mu.Lock()
	defer s.mu.Unlock()
	if what := r.PathValue("what"); !slices.Contains(s.probers[what], host) {
		s.probers[what] = append(s.probers[what], host)
	}
	if s.failed {
		http.Error(w, "told to fail", http.StatusInternalServerError)
	}
}

func (s *site) tellProbers(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, what := range slices.Sorted(maps.Keys(s.probers)) {
		fmt.Fprintln(w, what, strings.Join(s.probers[what], " "))
	}
}

func (s *site) fail() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = true
	s.health.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
}

func (s *site) serveGRPC(ctx context.Context, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(server, s.health)
	defer context.AfterFunc(ctx, server.Stop)()
	return server.Serve(l)
}

// serveHTTP serves until ctx ends and what was asked by then is answered, with TLS if
// there is a certificate.
func serveHTTP(ctx context.Context, address string, h http.Handler, cert, key string) error {
	server := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: time.Minute}
	ended := make(chan error, 1)
	defer context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		ended <- server.Shutdown(ctx)
	})()
	fmt.Println("serving on", address)
	var err error
	if cert != "" {
		err = server.ListenAndServeTLS(cert, key)
	} else {
		err = server.ListenAndServe()
	}
	if errors.Is(err, http.ErrServerClosed) {
		return <-ended
	}
	return err
}

// request asks once and prints the answer; any status but 200 is an error.
func request(ctx context.Context, method, url string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(os.Stdout, answer.Body)
	if answer.StatusCode != http.StatusOK {
		return errors.Join(err, fmt.Errorf("%s %s: %s", method, url, answer.Status))
	}
	return err
}
