package main

import (
	"context"
	"errors"
	"time"

	"tacit.dev/bench/scale/fleet"
)

// streams of a simulated node, on two connections: a proxy's one, and an agent's three.
const streams = 4

// storm cuts all nodes off, and has them come back at once. What is freed meanwhile is what
// their streams took.
func storm(ctx context.Context, m *running) error {
	with, err := m.inUse(ctx, m.led)
	if err != nil {
		return err
	}
	released, err := m.status()
	if err != nil {
		return err
	}
	if _, err := call[None](m.rig, "Cut", None{}); err != nil {
		return err
	}
	if err := m.until(ctx, "all streams have ended", func() (bool, error) {
		all, err := m.metrics(ctx, m.led)
		return err == nil && all["tacit_xds_streams"] < streams, err
	}); err != nil {
		return err
	}
	without, err := m.inUse(ctx, m.led)
	if err != nil {
		return err
	}
	m.out["stream_kb"] = (with - without) / 1e3 / float64(streams*m.cfg.nodes)
	m.out["node_kb"] = (with - without) / 1e3 / float64(m.cfg.nodes)
	before, err := m.usage()
	if err != nil {
		return err
	}
	harmed := m.harmed()
	if _, err := call[None](m.rig, "Join", time.Duration(0)); err != nil {
		return err
	}
	if err := m.allServed(ctx, before.at.UnixNano()); err != nil {
		return err
	}
	return m.recovered("storm_", before, released.Released, harmed)
}

// recovered tells how long it took until every node was served, and who came to harm by it.
func (m *running) recovered(prefix string, before usage, released int64, harmed int) error {
	s, err := m.status()
	if err != nil {
		return err
	}
	m.out[prefix+"s"] = float64(s.Last-before.at.UnixNano()) / 1e9
	m.out[prefix+"mb"] = (float64(s.ProxyBytes) - before.bytes) / 1e6
	m.out[prefix+"harmed"] = float64(s.Released-released) + float64(m.harmed()-harmed)
	p, err := m.led.process()
	if err != nil {
		return err
	}
	return m.memory(prefix+"peak_mb", p.Peak)
}

// failover kills the leader. Another one leads when the Lease has run out.
func failover(ctx context.Context, m *running) error {
	old, err := m.led.process()
	if err != nil {
		return err
	}
	if err := errors.Join(m.memory("failover_old_mb", old.RSS), m.memory("control_peak_mb", old.Peak)); err != nil {
		return err
	}
	before, err := m.usage()
	if err != nil {
		return err
	}
	s, err := m.status()
	if err != nil {
		return err
	}
	harmed, was := m.harmed(), m.led
	if err := was.kill(ctx); err != nil {
		return err
	}
	if err := m.until(ctx, "another one leads", func() (bool, error) {
		m.led = m.leader()
		return m.led != nil && m.led != was, nil
	}); err != nil {
		return err
	}
	m.out["failover_leads_s"] = time.Since(before.at).Seconds()
	if was.revive != nil { // as a follower: earlier it would take up its own Lease
		if err := was.revive(ctx); err != nil {
			return err
		}
	}
	if err := m.allServed(ctx, before.at.UnixNano()); err != nil {
		return err
	}
	renewed, err := call[fleet.Renewals](m.rig, "Renew", None{})
	if err != nil {
		return err
	}
	m.out["failover_renewed_s"], m.out["failover_refused"] = time.Since(before.at).Seconds(), float64(renewed.Failed)
	if renewed.Failed > 0 {
		m.note("failover: renewal refused: %s", renewed.Error)
	}
	err = m.recovered("failover_", before, s.Released, harmed)
	m.out["failover_memory"] = m.out["failover_peak_mb"] / m.out["control_peak_mb"]
	return err
}
