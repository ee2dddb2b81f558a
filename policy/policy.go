// Package policy decides who may connect to a pod. It stands at the destination, between the
// proof of who the peer is and the dial to the application, and it stands there again when
// the World changes, for what is open.
//
// Compile makes a Set of the policies of one workload, Decide judges one connection by it.
// A Book compiles each policy once, however many workloads it is for.
//
// The package refuses to read a clock, to do I/O, and to let anybody in whom it is not sure
// of: what cannot be enforced, and what is not known, denies.
package policy

import (
	"fmt"
	"net/netip"

	"tacit.dev/mesh"
)

// Connection is what is judged.
type Connection struct {
	// Peer is who proved to be at the other end.
	Peer Peer
	// Source is its address, Destination what it dialled, at the pod. Neither is an IPv4 address
	// in IPv6, nor has a zone.
	Source      netip.Addr
	Destination netip.AddrPort
	// FromNode: Source is an address of a node.
	FromNode bool
}

// Peer is an identity that was proved. The zero Peer is nobody: plaintext.
type Peer struct {
	id   mesh.ID
	text string
}

// Proved returns the Peer with that identity.
func Proved(id mesh.ID) Peer {
	if id.IsZero() {
		return Peer{}
	}
	return Peer{id, id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount}
}

// ID is the identity, zero for nobody.
func (p Peer) ID() mesh.ID { return p.id }

// Reason says why a Verdict is what it is.
type Reason uint8

// Only Open, Excepted, and Matched by an Allow let somebody pass.
const (
	// Open: no Allow applies, and no Deny matches.
	Open Reason = iota
	// Matched: the rule matches.
	Matched
	// Unmatched: there is an Allow, and none matches. Policy is the first one.
	Unmatched
	// Unenforceable: the rule of a Deny matches as far as it can be enforced.
	Unenforceable
	// Unknown: the workload names a policy that is not known.
	Unknown
	// Strict: it is plaintext, and the mode is strict. Detail is whose mode.
	Strict
	// Excepted: the mode is strict, and it may leave in plaintext all the same.
	Excepted
)

// Verdict is what was decided. The zero Verdict denies.
type Verdict struct {
	Allowed bool
	Reason  Reason
	// Policy is the Key of the policy that decided, "" for none. Rule is the index of its
	// rule, -1 for none.
	Policy string
	Rule   int
	// Detail is why a rule cannot be enforced.
	Detail string
}

// String is for logs.
func (v Verdict) String() string {
	switch {
	case v.Reason == Open && v.Allowed:
		return "no policy applies"
	case v.Reason == Excepted && v.Allowed:
		return "an exception of the strict mode"
	case v.Reason == Strict:
		return "plaintext, and the mode of the " + v.Detail + " is strict"
	case v.Allowed:
		return fmt.Sprintf("allowed by rule %d of policy %s", v.Rule, v.Policy)
	case v.Reason == Matched:
		return fmt.Sprintf("denied by rule %d of policy %s", v.Rule, v.Policy)
	case v.Reason == Unmatched:
		return fmt.Sprintf("allowed by no rule of policy %s or of another one", v.Policy)
	case v.Reason == Unenforceable:
		return fmt.Sprintf("denied by policy %s, whose rule %d cannot be enforced: %s", v.Policy, v.Rule, v.Detail)
	case v.Reason == Unknown:
		return fmt.Sprintf("policy %s is not known", v.Policy)
	}
	return "denied"
}

// Set is what applies to one workload. It is never changed.
type Set struct {
	// unknown are policies that the workload names and nobody knows.
	unknown []string
	mode    mode
	// enforced decide. tried are these and those of a dry run, nil if there are none of those.
	enforced decision
	tried    *decision
}

// Compile makes the Set of policies, of which some have names that are not known. What
// policies point to must not be changed afterwards.
func Compile(policies []*mesh.Policy, unknown []string, own *mesh.Mode) *Set {
	return new(Book).Compile(policies, unknown, own)
}

// Decide judges a connection. It allocates nothing.
func (s *Set) Decide(c *Connection) Verdict {
	if v, is := s.mode.refuses(c); is {
		return v
	}
	if len(s.unknown) > 0 {
		return Verdict{Reason: Unknown, Policy: s.unknown[0], Rule: -1}
	}
	return s.enforced.decide(c)
}

// Try tells what would be decided if the policies of a dry run were enforced, too, and
// whether there are any.
func (s *Set) Try(c *Connection) (v Verdict, is bool) {
	if s.tried == nil {
		return v, false
	}
	if v := s.Decide(c); v.Reason == Unknown || v.Reason == Strict {
		return v, true
	}
	return s.tried.decide(c), true
}

// decision has the rules of one or several policies.
type decision struct {
	deny, allow index
	// first is the first Allow, nil if there is none.
	first *compiled
}

func newDecision(policies []*compiled) (d decision) {
	for _, p := range policies {
		switch {
		case p.action == mesh.Deny:
			d.deny.add(p)
		case d.first == nil:
			d.first = p
			fallthrough
		default:
			d.allow.add(p)
		}
	}
	return d
}

func (d *decision) decide(c *Connection) Verdict {
	if r := d.deny.find(c); r != nil {
		v := Verdict{Reason: Matched, Policy: r.policy, Rule: r.number, Detail: r.unenforceable}
		if r.unenforceable != "" {
			v.Reason = Unenforceable
		}
		return v
	}
	if d.first == nil {
		return Verdict{Allowed: true, Reason: Open, Rule: -1}
	}
	if r := d.allow.find(c); r != nil {
		return Verdict{Allowed: true, Reason: Matched, Policy: r.policy, Rule: r.number}
	}
	return Verdict{Reason: Unmatched, Policy: d.first.key, Rule: -1}
}
