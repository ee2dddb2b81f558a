package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tacit.dev/bench/process"
	"tacit.dev/pause"
)

// The digit before a server's port is that of the proxy before it. All are taken before
// the kernel gives some of these ports to clients.
const (
	haproxyDigit  = "1"
	spliceDigit   = "2"
	copyDigit     = "3"
	resumingDigit = "4"
)

// way leads from a pod to a server.
type way struct {
	pod string
	to  string // before the server's port: HOST: or HOST:DIGIT
}

// mode is what stands between client and server.
type mode struct {
	name string
	load way
	// small is the way of the small messages that are measured beside a bulk transfer
	// on load; without a pod that is not measured in this mode.
	small way
	// beside: it has no bound, and is measured in the first round only.
	beside bool
	// only are the measures in which it is compared; nil means all.
	only []string
	// quiet are the addresses to which quiet connections are held, quietMost how
	// many at most.
	quiet     []string
	quietMost int
	// carriers is what its processes are called, count how many there are; proxies
	// are they.
	carriers string
	count    int
	proxies  []process.Process
}

// findModes starts the proxies that are not Tacit's, and finds all processes.
func (r *rig) findModes(ctx context.Context) error {
	plain, err := r.podIP(ctx, "plain/server")
	if err != nil {
		return err
	}
	if err := errors.Join(r.startSplicing(ctx, plain), r.startHAProxy(ctx, plain)); err != nil {
		return err
	}
	tacit, err := r.tacitMode(ctx)
	if err != nil {
		return err
	}
	straight := way{"plain/client", plain + ":"}
	through := func(digit string) way { return way{"plain/client", "127.0.0.1:" + digit} }
	haproxy := through(haproxyDigit)
	r.modes = []mode{
		{name: "none", load: straight, small: straight, beside: true},
		{name: "splice", load: through(spliceDigit), beside: true, carriers: "splice", count: 2},
		{name: "haproxy", load: haproxy, small: haproxy, quiet: []string{haproxy.to + httpPort}, quietMost: comparedQuiet, carriers: "haproxy", count: 2},
		tacit,
		{name: "copy", load: through(copyDigit), beside: true, only: bulkOnly, carriers: "copy", count: 2},
		{name: "haproxy_resuming", load: through(resumingDigit), beside: true, only: []string{"new"}, carriers: "haproxy", count: 2},
	}
	if err := r.addWireGuard(ctx, plain); err != nil {
		return err
	}
	return errors.Join(r.awaitServers(ctx), r.findProcesses())
}

// tacitMode holds quiet connections to several pods: from one pod to one other there
// are only as many source ports for direct connections as mesh.DirectPortFirst leaves.
func (r *rig) tacitMode(ctx context.Context) (mode, error) {
	// Control, and an agent and a proxy on each node.
	m := mode{name: "tacit", quietMost: mostQuiet, carriers: "tacit", count: 5}
	server, err := r.podIP(ctx, "mesh/server")
	if err != nil {
		return mode{}, err
	}
	m.load = way{"mesh/client", server + ":"}
	for i := range holders {
		ip, err := r.podIP(ctx, fmt.Sprintf("mesh/held-%d", i))
		if err != nil {
			return mode{}, err
		}
		m.quiet = append(m.quiet, ip+":"+httpPort)
		m.small = way{"mesh/other", ip + ":"}
	}
	return m, nil
}

func (r *rig) startSplicing(ctx context.Context, plain string) error {
	var errs []error
	for _, kind := range []struct{ name, digit, flag string }{{"splice", spliceDigit, ""}, {"copy", copyDigit, " --copy"}} {
		near, far := "", ""
		for _, port := range []string{iperfPort, httpPort} {
			near += fmt.Sprintf(" 127.0.0.1:%s%s=%s:%s%s", kind.digit, port, plain, kind.digit, port)
			far += fmt.Sprintf(" %s:%s%s=127.0.0.1:%s", plain, kind.digit, port, port)
		}
		errs = append(errs,
			r.do(ctx, "start "+kind.name+"-client plain/client -- splice"+kind.flag+near),
			r.do(ctx, "start "+kind.name+"-server plain/server -- splice"+kind.flag+far))
	}
	return errors.Join(errs...)
}

// awaitServers waits until every way leads to an answer.
func (r *rig) awaitServers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, m := range r.modes {
		for _, w := range []way{m.load, m.small} {
			if w.pod == "" {
				continue
			}
			words := []string{"exec", w.pod, "--", "load", "hold", "1", w.to + httpPort}
			if err := r.retry(ctx, func() error { _, err := r.output(ctx, words...); return err }); err != nil {
				return fmt.Errorf("no answer with %s between client and server: %w", m.name, err)
			}
		}
	}
	return nil
}

// retry returns the last error when ctx ends.
func (r *rig) retry(ctx context.Context, do func() error) error {
	for {
		err := do()
		if err == nil || !pause.For(ctx, 100*time.Millisecond) {
			return err
		}
	}
}

// findProcesses finds the proxies of all modes by their command lines.
func (r *rig) findProcesses() error {
	all, err := process.Descendants(r.lab.Process.Pid)
	if err != nil {
		return err
	}
	found := map[string][]process.Process{}
	for pid, words := range all {
		if carriers, name := carrier(words); carriers != "" {
			found[carriers] = append(found[carriers], process.Process{PID: pid, Name: name})
		}
	}
	for i := range r.modes {
		m := &r.modes[i]
		m.proxies = found[m.carriers]
		if len(m.proxies) != m.count {
			return fmt.Errorf("found %v with %s between client and server, want %d processes", m.proxies, m.name, m.count)
		}
		slices.SortFunc(m.proxies, func(a, b process.Process) int { return strings.Compare(a.Name, b.Name) })
	}
	return nil
}

// carrier tells by its command line of which carriers a process is one, and what it is
// called in the result.
func carrier(words []string) (carriers, name string) {
	if len(words) < 2 {
		return "", ""
	}
	last := words[len(words)-1]
	switch filepath.Base(words[0]) {
	case "splice":
		carriers = "splice"
		if words[1] == "--copy" {
			carriers = "copy"
		}
		if strings.HasPrefix(last, "127.") {
			return carriers, carriers + " client"
		}
		return carriers, carriers + " server"
	case "haproxy":
		return "haproxy", "haproxy " + strings.TrimSuffix(filepath.Base(last), ".cfg")
	case "wireguard":
		return "wireguard", "wireguard " + last
	case "tacit-node":
		return "tacit", words[1] + " " + after(words, "--node")
	case "tacit-control":
		return "tacit", "control"
	}
	return "", ""
}

func after(words []string, flag string) string {
	if i := slices.Index(words, flag) + 1; i > 0 && i < len(words) {
		return words[i]
	}
	return ""
}
