package admin

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/pprof"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// newHandler serves everything, and lists it at the root.
func newHandler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", serveIndex(cfg))
	handleMetrics(mux, cfg)
	mux.HandleFunc("GET /dump/{name}", serveDump(cfg))
	if cfg.Profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// newMetricsHandler serves what may be seen from outside.
func newMetricsHandler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	handleMetrics(mux, cfg)
	return mux
}

func handleMetrics(mux *http.ServeMux, cfg Config) {
	mux.HandleFunc("GET /healthz", serveAlive)
	mux.HandleFunc("GET /readyz", serveReady(cfg.Ready))
	mux.Handle("GET /metrics", metrics(cfg))
	for name, addr := range cfg.Beside {
		mux.HandleFunc("GET /metrics/"+name, passOn(addr))
	}
}

// passOn serves the metrics of another process. It asks for nothing else, whatever it
// is asked.
func passOn(addr string) http.HandlerFunc {
	p := newNeighbor(addr)
	return func(w http.ResponseWriter, req *http.Request) {
		resp, err := p.ask(req.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, io.LimitReader(resp.Body, metricsLimit))
	}
}

func serveIndex(cfg Config) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "/healthz\n/readyz\n/metrics\n")
		if cfg.Profiles {
			fmt.Fprint(w, "/debug/pprof/\n")
		}
		for _, name := range slices.Sorted(maps.Keys(cfg.Dump)) {
			fmt.Fprintf(w, "/dump/%s\n", name)
		}
	}
}

// serveAlive: whoever answers is alive.
func serveAlive(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") }

func serveReady(ready func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if ready != nil {
			if err := ready(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		io.WriteString(w, "ok\n")
	}
}

func metrics(cfg Config) http.Handler {
	var all prometheus.Gatherers
	if cfg.Registry != nil {
		all = append(all, cfg.Registry)
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Beside)) {
		all = append(all, gatherFrom(name, cfg.Beside[name]))
	}
	return promhttp.HandlerFor(all, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

func serveDump(cfg Config) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		dump, ok := cfg.Dump[req.PathValue("name")]
		if !ok {
			http.NotFound(w, req)
			return
		}
		text, err := json.MarshalIndent(dump(), "", "  ")
		if err != nil {
			http.Error(w, fmt.Sprintf("dump %s: %v", req.PathValue("name"), err), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(append(text, '\n'))
	}
}
