package admin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func TestRequests(t *testing.T) {
	r := prometheus.NewRegistry()
	r.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "tacit_test_total", Help: "A count."}))
	notReady := errors.New("no certificate for default/web yet")
	h := newHandler(Config{
		Registry: r,
		Profiles: true,
		Ready:    func() error { return notReady },
		Dump: map[string]func() any{
			"pods":   func() any { return []string{"default/web"} },
			"broken": func() any { return func() {} },
		},
	})
	for _, tt := range []struct {
		method, path string
		code         int
		body         string
	}{
		{"GET", "/", 200, "/dump/pods\n"},
		{"GET", "/healthz", 200, "ok\n"},
		{"GET", "/readyz", 503, notReady.Error()},
		{"GET", "/metrics", 200, "tacit_test_total 0"},
		{"GET", "/dump/pods", 200, `"default/web"`},
		{"GET", "/dump/broken", 500, "unsupported type"},
		{"GET", "/dump/nothing", 404, ""},
		{"GET", "/debug/pprof/goroutine?debug=1", 200, "goroutine profile"},
		{"GET", "/elsewhere", 404, ""},
		{"POST", "/dump/pods", 405, ""},
		{"POST", "/healthz", 405, ""},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
			if w.Code != tt.code || !strings.Contains(w.Body.String(), tt.body) {
				t.Errorf("got %d %q, want %d with %q", w.Code, w.Body, tt.code, tt.body)
			}
		})
	}
}

// Profiles are there if they are asked for.
func TestProfilesAreOffByDefault(t *testing.T) {
	w := httptest.NewRecorder()
	newHandler(Config{}).ServeHTTP(w, httptest.NewRequest("GET", "/debug/pprof/heap", nil))
	if w.Code != 404 {
		t.Errorf("got %d, want 404", w.Code)
	}
}

// A socket is its owner's alone, and a process takes the place of the one before.
func TestSocketsHaveAnOwner(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		cfg := Config{Addr: filepath.Join(dir, "admin.sock"), Metrics: filepath.Join(dir, "metrics.sock"), Registry: NewRegistry("v1")}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- Run(ctx, cfg) }()
		for path, code := range map[string]int{cfg.Addr: 200, cfg.Metrics: 404} {
			c := &http.Client{Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return Dial(ctx, path) },
			}}
			var resp *http.Response
			var err error
			for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
				if resp, err = c.Get("http://it/"); err == nil {
					break
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != code {
				t.Errorf("%s: got %d, want %d", path, resp.StatusCode, code)
			}
			if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v: want mode 600", path, st.Mode(), err)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// What may be seen from a network shows no memory of the process.
func TestMetricsHandlerServesNothingElse(t *testing.T) {
	h := newMetricsHandler(Config{Registry: NewRegistry("v1"), Dump: map[string]func() any{"pods": func() any { return nil }}})
	for path, code := range map[string]int{
		"/healthz": 200, "/readyz": 200, "/metrics": 200,
		"/": 404, "/dump/pods": 404, "/debug/pprof/": 404, "/debug/pprof/heap": 404, "/debug/pprof/profile": 404,
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != code {
			t.Errorf("%s: got %d, want %d", path, w.Code, code)
		}
	}
}

func TestMetricsOfAProcessBesideArePassedOn(t *testing.T) {
	r := prometheus.NewRegistry()
	r.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "tacit_test_total", Help: "A count."}))
	agent := httptest.NewServer(newHandler(Config{Registry: r}))
	defer agent.Close()
	h := newMetricsHandler(Config{Beside: map[string]string{"agent": agent.Listener.Addr().String(), "gone": "127.0.0.1:1"}})
	for path, want := range map[string]struct {
		code int
		body string
	}{"/metrics/agent": {200, "tacit_test_total 0"}, "/metrics": {200, `tacit_test_total{process="agent"} 0`}, "/metrics/gone": {502, "refused"}, "/metrics/other": {404, ""}} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != want.code || !strings.Contains(w.Body.String(), want.body) {
			t.Errorf("%s: got %d %.100q, want %d with %q", path, w.Code, w.Body, want.code, want.body)
		}
	}
}

func TestReady(t *testing.T) {
	for name, ready := range map[string]func() error{"no func": nil, "no error": func() error { return nil }} {
		w := httptest.NewRecorder()
		newHandler(Config{Ready: ready}).ServeHTTP(w, httptest.NewRequest("GET", "/readyz", nil))
		if w.Code != 200 {
			t.Errorf("%s: got %d, want 200", name, w.Code)
		}
	}
}

func TestServeUntilTheContextEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, l, newHandler(Config{Registry: NewRegistry("v1")}), fromHere, slog.New(slog.DiscardHandler))
	}()
	resp, err := http.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(body), "process_resident_memory_bytes") {
		t.Errorf("metrics without the process's own: %v", err)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}

// Whoever floods the port for metrics holds few connections, and keeps nobody else out.
func TestMetricsConnectionsAreBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, l, newMetricsHandler(Config{Registry: NewRegistry("v1")}), fromNetwork, slog.New(slog.DiscardHandler))
	}()
	const many = 3 * mostConnections
	closed := make(chan struct{}, many)
	for range many {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			c.Read(make([]byte, 1))
			closed <- struct{}{}
		}()
	}
	for range many - mostConnections {
		select {
		case <-closed:
		case <-time.After(fromNetwork.header / 2):
			t.Fatalf("more than %d silent connections are open", mostConnections)
		}
	}
	resp, err := http.Get("http://" + l.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("got %d during a flood, want 200", resp.StatusCode)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func TestMetricsRequestsAreSmall(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, l, newMetricsHandler(Config{}), fromNetwork, slog.New(slog.DiscardHandler))
	}()
	req, err := http.NewRequest("GET", "http://"+l.Addr().String()+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Long", strings.Repeat("x", 12<<10))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %d for a header of 12 kB, want %d", resp.StatusCode, http.StatusRequestHeaderFieldsTooLarge)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func TestRunRefuses(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, addr := range []string{"", "127.0.0.1", taken.Addr().String()} {
		if err := Run(t.Context(), Config{Addr: addr}); err == nil {
			t.Errorf("Run on %q succeeded", addr)
		}
	}
}

// Whoever scrapes by the usual annotations sees both processes, also what both call the same.
func TestMetricsOfBothProcessesAreOnOnePath(t *testing.T) {
	agent := httptest.NewServer(newHandler(Config{Registry: NewRegistry("v1")}))
	defer agent.Close()
	h := newMetricsHandler(Config{Registry: NewRegistry("v2"), Beside: map[string]string{"agent": agent.Listener.Addr().String(), "gone": "127.0.0.1:1"}})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{"\ngo_goroutines ", `go_goroutines{process="agent"} `, `process="agent",version="v1"} 1`, `version="v2"} 1`} {
		if w.Code != 200 || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%d, no %q", w.Code, want)
		}
	}
}
