package policy

import (
	"net/netip"
	"slices"

	"tacit.dev/mesh"
)

// Departure is a connection that leaves a pod in plaintext.
type Departure struct {
	// Dialed is what the application dialed, To where that leads: a pod behind a Service.
	Dialed, To netip.AddrPort
	// Inside: To is an address of the cluster.
	Inside bool
}

// Where a level was said, for logs. Before somebody says something the mesh is permissive.
const (
	ofMesh      = "mesh"
	ofNamespace = "namespace"
	ofWorkload  = "workload"
)

// mode is what the modes of one workload come to.
type mode struct {
	inbound, outbound, outside level
	ports                      map[uint16]level
	admit                      []mesh.Admission
	allowed                    []mesh.Exclusion
}

type level struct {
	strict bool
	of     string
}

// newMode merges the modes of the policies, and the workload's own, which may be nil.
func newMode(policies []*mesh.Policy, own *mesh.Mode) (m mode) {
	for _, scope := range []mesh.Scope{mesh.WholeMesh, mesh.WholeNamespace} {
		for _, p := range policies {
			if p.Mode == nil || p.Scope != scope {
				continue
			}
			m.add(p.Mode, map[mesh.Scope]string{mesh.WholeMesh: ofMesh, mesh.WholeNamespace: ofNamespace}[scope])
		}
	}
	if own != nil {
		m.add(own, ofWorkload)
	}
	return m
}

// add takes in a mode of a narrower scope than those before.
func (m *mode) add(o *mesh.Mode, of string) {
	for _, x := range []struct {
		level *level
		said  mesh.Level
	}{{&m.inbound, o.Inbound}, {&m.outbound, o.Outbound}, {&m.outside, o.Outside}} {
		if x.said != mesh.Inherited {
			*x.level = level{x.said != mesh.Permissive, of}
		}
	}
	if o.Inbound != mesh.Inherited {
		m.ports = nil // what a wider scope said of single ports does not hold any more
	}
	for _, p := range o.Ports {
		if m.ports == nil {
			m.ports = make(map[uint16]level)
		}
		m.ports[p.Port] = level{p.Level != mesh.Permissive, of}
	}
	m.admit, m.allowed = append(m.admit, o.Admit...), append(m.allowed, o.Allowed...)
}

func (m *mode) at(port uint16) level {
	if l, is := m.ports[port]; is {
		return l
	}
	return m.inbound
}

// refuses tells whether c may not come in since it is plaintext.
func (m *mode) refuses(c *Connection) (v Verdict, is bool) {
	if !c.Peer.id.IsZero() {
		return v, false
	}
	l := m.at(c.Destination.Port())
	if !l.strict || m.admits(c) {
		return v, false
	}
	return Verdict{Reason: Strict, Rule: -1, Detail: l.of}, true
}

func (m *mode) admits(c *Connection) bool {
	for i := range m.admit {
		a := &m.admit[i]
		if a.Port != 0 && a.Port != c.Destination.Port() {
			continue
		}
		if len(a.From) == 0 && c.FromNode || slices.ContainsFunc(a.From, func(p netip.Prefix) bool { return p.Contains(c.Source) }) {
			return true
		}
	}
	return false
}

// IsException reports whether c is plaintext that is let in although the workload is strict.
func (s *Set) IsException(c *Connection) bool {
	return c.Peer.id.IsZero() && s.mode.at(c.Destination.Port()).strict
}

// Leave decides whether plaintext may leave. Under a strict mode it may only to an exception.
func (s *Set) Leave(d *Departure) Verdict {
	m := &s.mode
	switch {
	case !m.outbound.strict:
		return Verdict{Allowed: true, Reason: Open, Rule: -1}
	case slices.ContainsFunc(m.allowed, func(e mesh.Exclusion) bool { return e.Has(d.Dialed) || e.Has(d.To) }):
		return Verdict{Allowed: true, Reason: Excepted, Rule: -1}
	case !d.Inside && !m.outside.strict:
		return Verdict{Allowed: true, Reason: Open, Rule: -1}
	}
	return Verdict{Reason: Strict, Rule: -1, Detail: m.outbound.of}
}

// IsStrictOutbound reports whether plaintext may not leave, but for exceptions.
func (s *Set) IsStrictOutbound() bool { return s.mode.outbound.strict }
