package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// page is a page of a replica's admin address.
func (r *rig) page(ctx context.Context, one *replica, path string, read func(io.Reader) error) error {
	client := http.Client{Transport: &http.Transport{DialContext: r.place.dial, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+one.admin+path, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s of control %s: %s", path, one.name, answer.Status)
	}
	return read(answer.Body)
}

// metrics are those of a replica: of each name the sum.
func (r *rig) metrics(ctx context.Context, one *replica) (map[string]float64, error) {
	sums := make(map[string]float64)
	err := r.page(ctx, one, "/metrics", func(text io.Reader) error {
		lines := bufio.NewScanner(text)
		for lines.Scan() {
			name, v, ok := parseMetric(lines.Text())
			if ok {
				sums[name] += v
			}
		}
		return lines.Err()
	})
	return sums, err
}

// parseMetric reads a line of the text format.
func parseMetric(line string) (name string, v float64, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 || line[0] == '#' {
		return "", 0, false
	}
	v, err := strconv.ParseFloat(line[i+1:], 64)
	name, _, _ = strings.Cut(line[:i], "{")
	return name, v, err == nil
}

// inUse is the memory that a replica needs, in bytes: what is left after a collection.
func (r *rig) inUse(ctx context.Context, one *replica) (float64, error) {
	discard := func(text io.Reader) error { _, err := io.Copy(io.Discard, text); return err }
	for range 2 { // what pools hold goes with the second
		if err := r.page(ctx, one, "/debug/pprof/heap?gc=1", discard); err != nil {
			return 0, err
		}
	}
	m, err := r.metrics(ctx, one)
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for _, part := range []string{"heap_alloc", "stack_inuse", "mspan_inuse", "mcache_inuse", "buck_hash_sys", "gc_sys", "other_sys"} {
		sum += m["go_memstats_"+part+"_bytes"]
	}
	return sum, nil
}
