package mesh

import (
	"fmt"
	"net/netip"
	"slices"
)

// Mode says what of some workloads may be in plaintext. A World has modes of the whole mesh and
// of namespaces (Policy.Mode), and of single workloads (Workload.Mode). What one of them leaves
// open is said by the one of the wider scope, and at last is Permissive. Once it is in a World
// it is never changed. Package policy decides by it.
type Mode struct {
	// Inbound says whether plaintext is let in, Ports where that differs.
	Inbound Level
	Ports   []PortLevel
	// Admit is plaintext that is let in all the same. Those of all scopes count.
	Admit []Admission
	// Outbound says whether plaintext leaves. If it is Strict, Outside says whether that holds
	// for addresses outside of the cluster, too.
	Outbound, Outside Level
	// Allowed is plaintext that leaves all the same. Those of all scopes count.
	Allowed []Exclusion
}

// Level says whether plaintext may be.
type Level string

const (
	// Inherited is what the Mode of the wider scope says.
	Inherited Level = ""
	// Permissive lets plaintext pass.
	Permissive Level = "permissive"
	// Strict refuses it.
	Strict Level = "strict"
)

// PortLevel is the Level of one port of a workload.
type PortLevel struct {
	Port  uint16
	Level Level
}

// Admission is plaintext that a strict workload lets in.
type Admission struct {
	// Port is that of the workload; 0 is all.
	Port uint16
	// From are the addresses that it comes from. None means those of nodes.
	From []netip.Prefix
}

// MaxModeEntries bounds each list of a Mode.
const MaxModeEntries = 1024

// IsZero reports whether it says nothing.
func (m *Mode) IsZero() bool { return m == nil || m.Equal(&Mode{}) }

// Equal reports whether both say the same. Either may be nil, which says nothing.
func (m *Mode) Equal(o *Mode) bool {
	if m == o {
		return true
	}
	if m == nil {
		m = &Mode{}
	}
	if o == nil {
		o = &Mode{}
	}
	return m.Inbound == o.Inbound && m.Outbound == o.Outbound && m.Outside == o.Outside && slices.Equal(m.Ports, o.Ports) &&
		slices.EqualFunc(m.Admit, o.Admit, Admission.equal) && slices.Equal(m.Allowed, o.Allowed)
}

func (a Admission) equal(b Admission) bool { return a.Port == b.Port && slices.Equal(a.From, b.From) }

// Check says what is wrong with a Mode.
func (m *Mode) Check() error {
	if max(len(m.Ports), len(m.Admit), len(m.Allowed)) > MaxModeEntries {
		return fmt.Errorf("mode with %d ports, %d admissions and %d destinations: want at most %d each", len(m.Ports), len(m.Admit), len(m.Allowed), MaxModeEntries)
	}
	for _, l := range []Level{m.Inbound, m.Outbound, m.Outside} {
		if l != Inherited && l != Permissive && l != Strict {
			return fmt.Errorf("mode %.32q: want %s or %s", l, Permissive, Strict)
		}
	}
	for _, p := range m.Ports {
		if p.Port == 0 || p.Level != Permissive && p.Level != Strict {
			return fmt.Errorf("mode %.32q of port %d: want %s or %s, and a port", p.Level, p.Port, Permissive, Strict)
		}
	}
	for _, a := range m.Admit {
		if len(a.From) > MaxModeEntries || slices.ContainsFunc(a.From, func(p netip.Prefix) bool { return !p.IsValid() || p.Addr().Is4In6() }) {
			return fmt.Errorf("mode that admits %.200v: want at most %d ranges of IPv4 or IPv6", a.From, MaxModeEntries)
		}
	}
	for _, e := range m.Allowed {
		if e.Port == 0 && !e.Prefix.IsValid() {
			return fmt.Errorf("mode that allows every destination: want %s", Permissive)
		}
	}
	return nil
}

// StrictMode is for what is not understood, and for whom nobody knows yet: it lets nothing pass.
func StrictMode() *Mode { return &Mode{Inbound: Strict, Outbound: Strict, Outside: Strict} }

// HasStrict reports whether workloads have strict modes of their own: one that the World does not
// know yet may have one, too.
func (w *World) HasStrict() bool { return w.stricts > 0 }

// isStrict reports whether anything in it is.
func (m *Mode) isStrict() bool {
	return m != nil && (m.Inbound == Strict || m.Outbound == Strict || slices.ContainsFunc(m.Ports, func(p PortLevel) bool { return p.Level == Strict }))
}

// OrNil is m, or nil if that says nothing.
func (m *Mode) OrNil() *Mode {
	if m.IsZero() {
		return nil
	}
	return m
}
