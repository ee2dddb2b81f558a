package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"tacit.dev/bench/scale/cluster"
	"tacit.dev/bench/scale/fleet"
	"tacit.dev/pause"
)

// running is one size of the cluster that is being measured.
type running struct {
	*rig
	pods int
	out  sample
	note func(format string, args ...any)
	// led is the replica that leads.
	led *replica
	// idle is the CPU time per second that control takes when nothing happens.
	idle float64
	// node is the real one, nil if there is none.
	node *laboratory
}

// phase is one part of a run. Each begins at rest.
type phase struct {
	name string
	do   func(ctx context.Context, m *running) error
}

func phases(cfg config) []phase {
	list := []phase{{"rest", atRest}}
	for _, rate := range cfg.rates {
		list = append(list, phase{fmt.Sprintf("churn_%g", rate), func(ctx context.Context, m *running) error { return churn(ctx, m, rate) }})
	}
	return append(list,
		phase{"fresh", fresh},
		phase{"starts", func(ctx context.Context, m *running) error { return starts(ctx, m, 0) }},
		phase{"frozen", func(ctx context.Context, m *running) error { return starts(ctx, m, m.cfg.frozen) }},
		phase{"enroll", enroll},
		phase{"rollout", rollout},
		phase{"storm", storm},
		phase{"failover", failover},
	)
}

// measureAll measures each size, and then whether very many pods can be remembered.
func measureAll(ctx context.Context, cfg config, res *result) error {
	var errs []error
	for _, pods := range cfg.sizes {
		if err := measureSize(ctx, cfg, res, pods, phases(cfg)); err != nil {
			errs = append(errs, fmt.Errorf("%d pods: %w", pods, err))
		}
		errs = append(errs, res.write(cfg.result))
	}
	if cfg.captured > 0 && ctx.Err() == nil {
		if err := measureSize(ctx, cfg, res, cfg.captured, nil); err != nil {
			res.note(cfg.captured, "%v", err)
		}
		errs = append(errs, res.write(cfg.result))
	}
	return errors.Join(errs...)
}

// measureSize: a phase that fails says so in the notes, and what it should have measured is
// missing; without a cluster at rest there is nothing to measure.
func measureSize(ctx context.Context, cfg config, res *result, pods int, list []phase) (err error) {
	m := &running{pods: pods, out: res.sample(pods), note: func(format string, args ...any) { res.note(pods, format, args...) }}
	if m.rig, err = newRig(ctx, cfg, pods); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.down()) }()
	if err := begin(ctx, m); err != nil {
		m.note("begin: %v", err)
		m.note("%v", m.tail())
		return nil
	}
	defer m.differing()
	for _, p := range list {
		if cfg.only != "" && !slices.Contains(strings.Split(cfg.only, ","), p.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "scale: %d pods: %s\n", pods, p.name)
		if err := m.findLeader(ctx); err != nil {
			return err
		}
		was := m.led
		err := p.do(ctx, m)
		if is := m.leader(); is != was && p.name != "failover" {
			m.note("%s: its figures say little: another one leads", p.name)
			err = errors.Join(err, m.findLeader(ctx))
		}
		if err == nil {
			err = m.rest(ctx)
		}
		if err != nil {
			m.note("%s: %v", p.name, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// differing counts what should never be: a node that holds something else than control says
// that there is.
func (m *running) differing() {
	if s, err := m.status(); err == nil {
		m.out["differing"] = float64(s.Differing)
	}
}

// spread is how long nodes take to join at the beginning, which is no storm: each is sent
// everything, so that it takes the longer the more there is.
func (m *running) spread() time.Duration {
	return time.Duration(m.cfg.nodes) * max(20*time.Millisecond, time.Duration(m.pods)*time.Microsecond/2)
}

// begin brings all nodes together with control, and has all pods captured.
func begin(ctx context.Context, m *running) error {
	if err := m.findLeader(ctx); err != nil {
		return err
	}
	began := time.Now()
	if _, err := call[None](m.rig, "Join", m.spread()); err != nil {
		return err
	}
	pause.For(ctx, m.spread())
	if err := m.allServed(ctx, 0); err != nil {
		return err
	}
	m.out["joined_s"] = time.Since(began).Seconds()
	err := m.allKnown(ctx)
	m.out["captured_s"] = time.Since(began).Seconds()
	if s, err := m.status(); err == nil {
		m.out["captured_pods"] = float64(s.Known)
		m.out["resources"] = float64(s.Resources)
	}
	if err != nil {
		return err
	}
	u, err := m.usage()
	if err != nil {
		return err
	}
	m.out["captured_cpu_s"], m.out["captured_fleet_cpu_s"], m.out["captured_mb"] = u.control, u.fleet, u.bytes/1e6/float64(m.cfg.nodes)
	if err := m.rest(ctx); err != nil {
		return err
	}
	if l, ok := m.place.(*laboratory); ok { // at rest: a lab does not wait for long
		if err := l.populate(ctx, m.store); err != nil {
			return err
		}
		m.node = l
	}
	return m.rest(ctx)
}

// findLeader waits until a replica serves nodes.
func (m *running) findLeader(ctx context.Context) error {
	return m.until(ctx, "somebody leads and has published", func() (bool, error) {
		if m.led = m.leader(); m.led == nil {
			return false, nil
		}
		all, err := m.metrics(ctx, m.led)
		return err == nil && all["tacit_xds_published_version"] > 0, nil
	})
}

// allServed waits until every node is served by a connection that it made after that time.
func (m *running) allServed(ctx context.Context, after int64) error {
	var s fleet.Status
	err := m.until(ctx, "every node is served", func() (_ bool, err error) {
		s, err = m.status()
		return s.Served == s.Nodes && s.First > after, err
	})
	if err != nil {
		return fmt.Errorf("%w: %d of %d are, after %d streams failed, the last by: %s", err, s.Served, s.Nodes, s.Failures, s.Failure)
	}
	return nil
}

// allKnown waits until every node knows every pod that is enrolled.
func (m *running) allKnown(ctx context.Context) error {
	var s fleet.Status
	err := m.until(ctx, "every pod is known", func() (_ bool, err error) {
		s, err = m.status()
		return s.Known == m.cluster.Enrolled(), err
	})
	if err != nil {
		return fmt.Errorf("%w: %d of %d are", err, s.Known, m.cluster.Enrolled())
	}
	return nil
}

// quiet is what control may use in a second at rest.
const quiet = 0.1

// rest waits until control has nothing to do, and lets pods be changed again.
func (m *running) rest(ctx context.Context) error {
	m.cluster.Settle()
	rested := 0
	before, err := m.controlCPU()
	for limit := time.Now().Add(m.cfg.patience); rested < m.cfg.rest; {
		if err != nil {
			return err
		}
		if time.Now().After(limit) {
			return errors.New("control does not come to rest")
		}
		if !pause.For(ctx, time.Second) {
			return ctx.Err()
		}
		var now float64
		if now, err = m.controlCPU(); now-before < quiet {
			rested++
		} else {
			rested = 0
		}
		before = now
	}
	return nil
}

func (m *running) controlCPU() (float64, error) {
	p, err := m.led.process()
	if err != nil {
		return 0, err
	}
	return p.CPU()
}

// usage is what has been used so far.
type usage struct {
	control, fleet, proxy float64 // CPU seconds
	bytes, responses      float64
	at                    time.Time
}

func (m *running) usage() (u usage, err error) {
	if u.control, err = m.controlCPU(); err != nil {
		return u, err
	}
	if u.fleet, err = m.rig.fleet.process.CPU(); err != nil {
		return u, err
	}
	if m.node != nil {
		p, err := m.node.find("tacit-node", "proxy")
		if err != nil {
			return u, err
		}
		if u.proxy, err = p.CPU(); err != nil {
			return u, err
		}
	}
	s, err := m.status()
	u.bytes, u.responses, u.at = float64(s.ProxyBytes), float64(s.Responses), time.Now()
	return u, err
}

// atRest measures memory, and what is used when nothing happens.
func atRest(ctx context.Context, m *running) error {
	p, err := m.led.process()
	if err != nil {
		return err
	}
	live, err := m.inUse(ctx, m.led)
	if err != nil {
		return err
	}
	m.out["control_live_mb"] = live / 1e6
	if err := errors.Join(m.memory("control_rss_mb", p.RSS), m.memory("fleet_rss_mb", m.rig.fleet.process.RSS)); err != nil {
		return err
	}
	if m.node != nil {
		p, err := m.node.find("tacit-node", "proxy")
		agent, err2 := m.node.find("tacit-node", "agent")
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if err := errors.Join(m.memory("proxy_rss_mb", p.RSS), m.memory("proxy_peak_mb", p.Peak), m.memory("agent_rss_mb", agent.RSS)); err != nil {
			return err
		}
	}
	before, err := m.controlCPU()
	if err != nil {
		return err
	}
	seconds := float64(max(2*m.cfg.rest, 1))
	if !pause.For(ctx, time.Duration(seconds)*time.Second) {
		return ctx.Err()
	}
	after, err := m.controlCPU()
	m.idle = (after - before) / seconds
	m.out["idle_cpu_percent"] = 100 * m.idle
	return err
}

func (m *running) memory(name string, read func() (float64, error)) error {
	v, err := read()
	m.out[name] = v / 1e6
	return err
}

// churn changes pods at a rate.
func churn(ctx context.Context, m *running, rate float64) error {
	prefix := fmt.Sprintf("churn_%g_", rate)
	return m.changes(ctx, prefix, func() []cluster.Change { return m.cluster.Churn(ctx, rate, m.cfg.during) })
}

// changes has pods changed, waits until every node has the last of it, and tells what it took.
func (m *running) changes(ctx context.Context, prefix string, change func() []cluster.Change) error {
	if _, err := call[None](m.rig, "Watch", true); err != nil {
		return err
	}
	defer func() { _, _ = call[None](m.rig, "Watch", false) }() // the next Watch forgets, too
	before, err := m.usage()
	if err != nil {
		return err
	}
	all := change()
	missed, err := m.allSeen(ctx, prefix, all)
	if err != nil {
		return err
	}
	after, err := m.usage()
	if err != nil {
		return err
	}
	n := float64(len(all))
	elapsed := after.at.Sub(before.at).Seconds()
	m.out[prefix+"changes"], m.out[prefix+"s"] = n, elapsed
	m.out[prefix+"cpu_percent"] = 100 * (after.control - before.control) / elapsed
	m.out[prefix+"cpu_ms"] = 1e3 * max(after.control-before.control-m.idle*elapsed, 0) / n
	m.out[prefix+"node_cpu_ms"] = 1e3 * (after.fleet - before.fleet) / n / float64(m.cfg.nodes)
	m.out[prefix+"bytes"] = (after.bytes - before.bytes) / n / float64(m.cfg.nodes)
	m.out[prefix+"responses"] = (after.responses - before.responses) / n / float64(m.cfg.nodes)
	if m.node != nil {
		m.out[prefix+"proxy_cpu_ms"] = 1e3 * (after.proxy - before.proxy) / n
	}
	if missed > 0 {
		return fmt.Errorf("%d of %d changes have not reached every node within %v", missed, len(all), m.cfg.patience)
	}
	return nil
}

// allSeen waits until every node was told of every change, and tells how long that took. What
// has not reached all when the patience ends is not in the times.
func (m *running) allSeen(ctx context.Context, prefix string, all []cluster.Change) (missed int, err error) {
	names := make([]string, len(all))
	for i, c := range all {
		names[i] = "Kubernetes//Pod/" + c.Pod
	}
	var seen []fleet.Seen
	limit := m.until(ctx, "every node was told", func() (bool, error) {
		if seen, err = call[[]fleet.Seen](m.rig, "Seen", names); err != nil {
			return false, err
		}
		return !slices.ContainsFunc(seen, func(s fleet.Seen) bool { return s.Nodes < m.cfg.nodes }), nil
	})
	if err != nil || ctx.Err() != nil {
		return 0, errors.Join(err, ctx.Err())
	}
	var times []float64
	for i, s := range seen {
		if s.Nodes < m.cfg.nodes {
			if missed++; missed == 1 {
				m.note("%s of %s has reached %d nodes, and not node %d for one", all[i].Kind, all[i].Pod, s.Nodes, s.Missing)
			}
			continue
		}
		times = append(times, float64(s.Last-all[i].At)/1e6)
	}
	if limit != nil && missed == 0 {
		return 0, limit
	}
	m.times(prefix, times)
	return missed, nil
}

// times puts p50, p99 and the largest of times in milliseconds.
func (m *running) times(prefix string, ms []float64) {
	if len(ms) == 0 {
		return
	}
	slices.Sort(ms)
	m.out[prefix+"p50_ms"], m.out[prefix+"p99_ms"] = ms[len(ms)/2], ms[min(len(ms)*99/100, len(ms)-1)]
	m.out[prefix+"max_ms"] = ms[len(ms)-1]
}

// fresh has nodes come that know nothing: a simulated one three times, and the real one once.
func fresh(ctx context.Context, m *running) error {
	var times []float64
	for range 3 {
		before, err := m.status()
		if err != nil {
			return err
		}
		began := time.Now().UnixNano()
		if _, err := call[None](m.rig, "Fresh", 0); err != nil {
			return err
		}
		var at int64
		if err := m.until(ctx, "the node is served", func() (bool, error) {
			at, err = call[int64](m.rig, "Served", 0)
			return at > began, err
		}); err != nil {
			return err
		}
		after, err := m.status()
		if err != nil {
			return err
		}
		times = append(times, float64(at-began)/1e9)
		m.out["first_sync_mb"] = float64(after.ProxyBytes-before.ProxyBytes) / 1e6
	}
	slices.Sort(times)
	m.out["first_sync_s"] = times[len(times)/2]
	if m.node == nil {
		return nil
	}
	began := time.Now()
	err := m.node.do(ctx, "restart "+realNode+"/proxy")
	m.out["proxy_restart_s"] = time.Since(began).Seconds()
	if err != nil {
		return err
	}
	p, err := m.node.find("tacit-node", "proxy")
	if err != nil {
		return err
	}
	m.out["proxy_sync_cpu_s"], err = p.CPU()
	return err
}

// begun is how long pods' agents wait at most until every node knows the pod: then they begin
// anyway.
const begun = 5 * time.Second

// starts begins pods one after the other, some nodes being frozen. What is measured is from
// the agent's being told of a pod to its being told that every node knows it.
func starts(ctx context.Context, m *running, frozen int) error {
	prefix := "start_"
	if frozen > 0 {
		prefix = "start_frozen_"
		if _, err := call[None](m.rig, "Freeze", frozen); err != nil {
			return err
		}
		defer func() { _, _ = call[None](m.rig, "Freeze", 0) }() // a node that stays frozen is seen in what follows
		// The first pods wait, which is the one bounded wait that frozen nodes may cost.
		if err := m.begun(ctx, prefix+"first_", 3); err != nil {
			return err
		}
	}
	return m.begun(ctx, prefix, m.cfg.starts)
}

func (m *running) begun(ctx context.Context, prefix string, n int) error {
	since := time.Now().UnixNano()
	pods := make(map[string]bool, n)
	for _, c := range m.cluster.Start(ctx, n, 100*time.Millisecond, m.cfg.nodes-m.cfg.frozen) {
		pods[c.Pod] = true
	}
	var times []float64
	late := 0
	err := m.until(ctx, "the pods have begun", func() (bool, error) {
		all, err := call[[]fleet.Start](m.rig, "Starts", since)
		times, late = times[:0], 0
		open := len(pods) // that may still become known in time
		for _, s := range all {
			if !pods[s.Pod] {
				continue
			}
			if s.Known == 0 || time.Duration(s.Known-s.Told) > begun {
				late++
				times = append(times, float64(begun.Milliseconds()))
			} else {
				times = append(times, float64(s.Known-s.Told)/1e6)
			}
			if s.Known != 0 || time.Since(time.Unix(0, s.Told)) > begun {
				open--
			}
		}
		return open == 0, err
	})
	m.times(prefix, times)
	m.out[prefix+"late"] = float64(late + len(pods) - len(times))
	return err
}

// enroll labels a namespace with a tenth of all pods.
func enroll(ctx context.Context, m *running) error {
	began := time.Now()
	if err := m.changes(ctx, "enroll_", m.cluster.Enroll); err != nil {
		return err
	}
	err := m.allKnown(ctx)
	m.out["enroll_known_s"] = time.Since(began).Seconds()
	return err
}

// rollout replaces a hundredth of all pods.
func rollout(ctx context.Context, m *running) error {
	return m.changes(ctx, "rollout_", func() []cluster.Change { return m.cluster.Roll(ctx) })
}
