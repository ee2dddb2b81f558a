package mesh

import (
	"errors"
	"fmt"
	"net/netip"
)

// Policy says who may connect to some workloads, in Istio's terms (AuthorizationPolicy).
// Once it is in a World it is never changed. Package policy decides by it.
type Policy struct {
	Namespace, Name string
	Scope           Scope
	Action          Action
	// Rules: the policy matches if one of them does. Without rules it matches nothing, so
	// that Allow without rules denies everything.
	Rules []Rule
	// DryRun policies decide nothing. What they would decide is told.
	DryRun bool
	// Mode is what else holds for them, nil for nothing. A policy with a Mode is a Deny without
	// rules, and is not of those that name it.
	Mode *Mode
}

// Scope says to whom a Policy applies.
type Scope string

const (
	// WholeMesh is every workload.
	WholeMesh Scope = "mesh"
	// WholeNamespace is every workload of the policy's namespace.
	WholeNamespace Scope = "namespace"
	// Named is every workload that names the policy (Workload.Policies).
	Named Scope = "workload"
)

// Action is what a Policy does with a connection that it matches.
type Action string

// Deny goes before Allow. If one Allow applies and none matches, that denies, too.
const (
	Allow Action = "allow"
	Deny  Action = "deny"
)

// Rule matches if each of its clauses does; without clauses it matches everything.
type Rule struct {
	Clauses []Clause
	// Unenforceable tells why the rule cannot be enforced as it was meant, "" if it can: a
	// field of HTTP, a value that does not parse. Such a rule never lets anybody in. In a
	// Deny, Clauses has to match at least what was meant: a clause that cannot be said in
	// full is left out of it.
	Unenforceable string
}

// Clause matches if one of its matches does; without matches it matches everything.
type Clause []Match

// Match is one alternative of a clause. It matches if all of its fields that are not empty
// do; without any it matches nothing. A field matches with one of its values, a Not field
// with none of them. Who has proved no identity has no namespace, principal or service
// account, and so matches each Not of them.
type Match struct {
	Namespaces, NotNamespaces []Pattern
	// Principals are compared with the identity without its scheme:
	// TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT.
	Principals, NotPrincipals           []Pattern
	ServiceAccounts, NotServiceAccounts []ServiceAccount
	SourceIPs, NotSourceIPs             []netip.Prefix
	DestinationIPs, NotDestinationIPs   []netip.Prefix
	DestinationPorts                    []uint16
	NotDestinationPorts                 []uint16
}

// Pattern is a set of texts. None of them is empty.
type Pattern struct {
	Kind PatternKind
	Text string
}

// PatternKind says what Pattern.Text is of the texts that match.
type PatternKind uint8

const (
	// Exactly is the whole.
	Exactly PatternKind = iota
	// Prefix is how they begin, Suffix how they end.
	Prefix
	Suffix
	// Present is any text but the empty one; Pattern.Text is empty.
	Present
)

// ServiceAccount is that of any trust domain.
type ServiceAccount struct{ Namespace, Name string }

// Bounds of a Policy.
const (
	// MaxPolicyRules bounds the rules of one policy.
	MaxPolicyRules = 1024
	// MaxPolicyValues bounds its clauses, matches and values, together.
	MaxPolicyValues = 16384
	// MaxPoliciesOf bounds the policies that one workload names.
	MaxPoliciesOf = 1024
)

// Key is what Workload.Policies names the policy by: NAMESPACE/NAME.
func (p *Policy) Key() string { return p.Namespace + "/" + p.Name }

// Check says what is wrong with a policy. Who is to publish one that is wrong says Refused
// of it, for without a policy everybody is let in.
func (p *Policy) Check() error {
	if !validSegment(p.Namespace) || !validSegment(p.Name) {
		return fmt.Errorf("policy %.300q: want a namespace and a name", p.Key())
	}
	if p.Scope != WholeMesh && p.Scope != WholeNamespace && p.Scope != Named || p.Action != Allow && p.Action != Deny {
		return fmt.Errorf("policy %s with scope %.32q and action %.32q: want others", p.Key(), p.Scope, p.Action)
	}
	if p.Mode != nil {
		if p.Scope == Named || p.Action != Deny || len(p.Rules) > 0 || p.DryRun {
			return fmt.Errorf("policy %s with a mode, scope %s, action %s and %d rules: want nothing but a scope", p.Key(), p.Scope, p.Action, len(p.Rules))
		}
		return p.Mode.Check()
	}
	if len(p.Rules) > MaxPolicyRules {
		return fmt.Errorf("policy %s has %d rules: want at most %d", p.Key(), len(p.Rules), MaxPolicyRules)
	}
	values := 0
	for i, r := range p.Rules {
		n, err := r.check()
		if values += n; err == nil && values > MaxPolicyValues {
			err = fmt.Errorf("more than %d values", MaxPolicyValues)
		}
		if err != nil {
			return fmt.Errorf("policy %s, rule %d: %w", p.Key(), i, err)
		}
	}
	return nil
}

// Refused is a policy of the same name that denies everybody to whom p applies, and says why.
func (p *Policy) Refused(why string) *Policy {
	return &Policy{Namespace: p.Namespace, Name: p.Name, Scope: p.Scope, Action: Deny, Rules: []Rule{{Unenforceable: why}}, DryRun: p.DryRun}
}

// check counts what is in the rule.
func (r *Rule) check() (values int, err error) {
	if len(r.Unenforceable) > maxID {
		return 0, fmt.Errorf("a reason of %d bytes: want at most %d", len(r.Unenforceable), maxID)
	}
	for _, c := range r.Clauses {
		values++
		for i := range c {
			n, err := c[i].check()
			if err != nil {
				return values, err
			}
			values += 1 + n
		}
	}
	return values, nil
}

func (m *Match) check() (values int, err error) {
	var errs []error
	for _, list := range [][]Pattern{m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals} {
		values += len(list)
		for _, p := range list {
			errs = append(errs, p.check())
		}
	}
	for _, list := range [][]ServiceAccount{m.ServiceAccounts, m.NotServiceAccounts} {
		values += len(list)
		for _, a := range list {
			if !validSegment(a.Namespace) || !validSegment(a.Name) {
				errs = append(errs, fmt.Errorf("service account %.80q of namespace %.80q", a.Name, a.Namespace))
			}
		}
	}
	for _, list := range [][]netip.Prefix{m.SourceIPs, m.NotSourceIPs, m.DestinationIPs, m.NotDestinationIPs} {
		values += len(list)
		for _, p := range list {
			if !p.IsValid() || p.Addr().Is4In6() {
				errs = append(errs, fmt.Errorf("range %s: want IPv4 or IPv6", p))
			}
		}
	}
	for _, list := range [][]uint16{m.DestinationPorts, m.NotDestinationPorts} {
		values += len(list)
		for _, p := range list {
			if p == 0 {
				errs = append(errs, errors.New("port 0"))
			}
		}
	}
	return values, errors.Join(errs...)
}

func (p Pattern) check() error {
	if p.Kind > Present || (p.Kind == Present) != (p.Text == "") || len(p.Text) > maxID {
		return fmt.Errorf("pattern %d of %.80q: want a kind, and 1 to %d bytes unless it is presence", p.Kind, p.Text, maxID)
	}
	return nil
}

// PoliciesOf returns the policies that apply to a workload, and the names of those that it
// names and that are not known. A policy that is not known may be a Deny.
func (w *World) PoliciesOf(p *Peer) (all []*Policy, unknown []string) {
	for _, key := range []string{"", p.Namespace} {
		some, _ := w.broad.get(key)
		all = append(all, some...)
	}
	for _, key := range p.Policies {
		one, ok := w.policies.get(key)
		switch {
		case !ok:
			unknown = append(unknown, key)
		case one.Scope == Named: // the others apply to whom they apply, named or not
			all = append(all, one)
		}
	}
	return all, unknown
}

// Policy returns the policy with that Key, or nil.
func (w *World) Policy(key string) *Policy {
	p, _ := w.policies.get(key)
	return p
}

// PolicyVersion is another number when a policy is another one than in a World before.
func (w *World) PolicyVersion() uint64 { return w.policyVersion }

// HasNamed reports whether there are policies that apply to who names them: they may be for
// a workload that the World does not know yet.
func (w *World) HasNamed() bool { return w.named > 0 }
