package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tacit.dev/bench/table"
	"tacit.dev/pause"
)

// With -policies the run compares Tacit with itself: with so many policies of ten rules each, a
// hundred of a namespace and those of the server's own among them, and without any.
const (
	policiesOfSpace = 100
	rulesOfPolicy   = 10
	// policiesCost is what is left of the rate with policies, at least.
	policiesCost = 0.97
	// policyWait bounds how long it takes until they have come, or have gone.
	policyWait = time.Minute
)

// measurePolicies takes turns: without, with, with, without, and so on. Each with is
// compared with the without beside it.
func measurePolicies(ctx context.Context, r *rig, cfg config) (met bool, err error) {
	i := 0
	for m := range r.modes {
		if r.modes[m].name == "tacit" {
			i = m
		}
	}
	plain, loaded := newResult(r.modes, nil), newResult(r.modes, nil)
	at := plain
	for round := range cfg.rounds {
		for turn := range 2 {
			if now := []*result{plain, loaded}[(round+turn)%2]; now != at {
				if at = now; at == loaded {
					err = r.loadPolicies(ctx, cfg.policies)
				} else {
					err = r.dropPolicies(ctx, cfg.policies)
				}
				if err != nil {
					return false, err
				}
				if !pause.For(ctx, settle) { // to take them in is not what is measured
					return false, ctx.Err()
				}
			}
			for _, what := range measures() {
				if what.name != "new" && what.name != "rr64" {
					continue
				}
				s, err := what.take(ctx, r, r.modes[i], cfg.seconds)
				if err != nil {
					return false, fmt.Errorf("measure %s: %w", what.name, err)
				}
				at.add(round, "tacit", s)
			}
		}
	}
	return tellPolicies(plain, loaded, cfg.policies), nil
}

func tellPolicies(plain, loaded *result, n int) bool {
	t := table.Table{To: os.Stdout, Width: 54}
	t.Row("", "no policy", fmt.Sprintf("%d policies", n), "ratio")
	var bounds []table.Bound
	for _, l := range lines {
		was, is := plain.absolute("tacit", l.key), loaded.absolute("tacit", l.key)
		var ratios []float64
		for i, s := range loaded.turns["tacit"] {
			if v := plain.turns["tacit"][i][l.key]; v > 0 {
				ratios = append(ratios, s[l.key]/v)
			}
		}
		if len(ratios) == 0 {
			continue
		}
		t.Row(l.name, table.Number(was), table.Number(is), table.Number(median(ratios)))
		if strings.HasSuffix(l.key, "_rate") {
			bounds = append(bounds, table.Bound{Name: l.name + ", with/without", Value: median(ratios), Limit: policiesCost, Least: true})
		}
	}
	return t.Bounds(bounds)
}

// loadPolicies writes one file for each namespace, and returns when every node has all of them.
func (r *rig) loadPolicies(ctx context.Context, n int) error {
	client, err := r.podIP(ctx, "mesh/client")
	if err != nil {
		return err
	}
	var errs []error
	for space := range (n + policiesOfSpace - 1) / policiesOfSpace {
		var b strings.Builder
		for i := range min(policiesOfSpace, n-space*policiesOfSpace) {
			writePolicy(&b, space, i, client)
		}
		path := r.policyFile(space)
		errs = append(errs, os.WriteFile(path+".new", []byte(b.String()), 0o644), os.Rename(path+".new", path))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return r.awaitPolicies(ctx, true)
}

func (r *rig) dropPolicies(ctx context.Context, n int) error {
	var errs []error
	for space := range (n + policiesOfSpace - 1) / policiesOfSpace {
		errs = append(errs, os.Remove(r.policyFile(space)))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return r.awaitPolicies(ctx, false)
}

func (r *rig) policyFile(space int) string {
	return filepath.Join(r.dir, "run", "objects", fmt.Sprintf("policies-%d.yaml", space))
}

// writePolicy is policy i of a namespace. Those of the first one are for the server; the last of
// them, by its last rule, lets the client in, and nobody else.
func writePolicy(b *strings.Builder, space, i int, client string) {
	namespace := "mesh"
	if space > 0 {
		namespace = fmt.Sprintf("team-%d", space)
	}
	fmt.Fprintf(b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: %s, name: p%02d}\nspec:\n  rules:\n", namespace, i)
	for j := range rulesOfPolicy {
		switch last := i == policiesOfSpace-1 && j == rulesOfPolicy-1; {
		case last:
			fmt.Fprintf(b, "  - from: [{source: {ipBlocks: [%s]}}]\n", client)
		case j%2 == 0:
			fmt.Fprintf(b, "  - from: [{source: {principals: [lab/ns/team-%d/sa/app-%d-%d]}}]\n", space, i, j)
		default:
			fmt.Fprintf(b, "  - from: [{source: {namespaces: [app-%d-%d]}}]\n    to: [{operation: {ports: [\"%s\"]}}]\n", i, j, httpPort)
		}
	}
}

// awaitPolicies waits until the policies let in the client alone, or everybody, and every node has
// acknowledged that.
func (r *rig) awaitPolicies(ctx context.Context, loaded bool) error {
	ctx, cancel := context.WithTimeout(ctx, policyWait)
	defer cancel()
	var server string
	for _, m := range r.modes {
		if m.name == "tacit" {
			server = m.load.to + httpPort
		}
	}
	hold := func(pod string) error {
		_, err := r.output(ctx, "exec", pod, "--", "load", "hold", "1", server)
		return err
	}
	err := r.retry(ctx, func() error {
		if err := hold("mesh/other"); (err != nil) != loaded {
			return fmt.Errorf("policies loaded %v, and the other client: %w", loaded, err)
		}
		return hold("mesh/client")
	})
	if err != nil {
		return err
	}
	return r.do(ctx, "wait protected mesh/client mesh/server mesh/other")
}
