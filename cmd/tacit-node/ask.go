package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"tacit.dev/admin"
)

// askLimit bounds a question: the kubelet's probe of a container waits no longer
// than its own timeout, and then kills us.
const askLimit = 5 * time.Second

// runAsk asks the admin address of an agent or proxy, which nobody else reaches: it is the kubelet's probe, as a process in the container.
func runAsk(ctx context.Context, args []string) error {
	s := flag.NewFlagSet("tacit-node ask", flag.ContinueOnError)
	addr := s.String("admin", "/run/tacit/admin.sock", "`address` of the agent's or the proxy's --admin")
	if err := s.Parse(args); err != nil {
		return err
	}
	if s.NArg() != 1 || s.Arg(0) != "healthz" && s.Arg(0) != "readyz" {
		return fmt.Errorf("ask: want healthz or readyz (%q)", s.Args())
	}
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return ask(ctx, *addr, s.Arg(0))
}

// ask is nil if the answer is yes. No proxy of the environment is asked.
func ask(ctx context.Context, addr, what string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://process/"+what, nil)
	if err != nil {
		return fmt.Errorf("ask %s for %s: %w", addr, what, err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return admin.Dial(ctx, addr) }
	t := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("ask %s for %s: %w", addr, what, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return fmt.Errorf("ask %s for %s: %w", addr, what, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", what, strings.TrimSpace(string(text)))
	}
	return nil
}
