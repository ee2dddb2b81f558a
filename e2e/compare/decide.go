package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tacit.dev/mesh"
	"tacit.dev/policy"
	"tacit.dev/wire/xds/message"
)

// comparison collects what differs.
type comparison struct {
	ours   *mesh.World
	theirs *told

	wrong                 []string
	asked, allowed, meant int
}

func (c *comparison) differ(format string, args ...any) {
	c.wrong = append(c.wrong, fmt.Sprintf(format, args...))
}

// told compares whom policies are for, what they do, and who names them.
func (c *comparison) told(t *town) {
	scopes := map[mesh.Scope]message.Scope{mesh.WholeMesh: message.Scope_GLOBAL, mesh.WholeNamespace: message.Scope_NAMESPACE, mesh.Named: message.Scope_WORKLOAD_SELECTOR}
	actions := map[mesh.Action]message.Action{mesh.Allow: message.Action_ALLOW, mesh.Deny: message.Action_DENY}
	for _, p := range t.policies {
		ours, theirs := c.ours.Policy(key(p)), c.theirs.policies[key(p)]
		if scopes[ours.Scope] != theirs.GetScope() || actions[ours.Action] != theirs.GetAction() {
			c.differ("policy %s: scope %s and action %s, istiod says %s and %s", key(p), ours.Scope, ours.Action, theirs.GetScope(), theirs.GetAction())
		}
	}
	for _, p := range t.pods {
		ours := slices.Sorted(slices.Values(c.ours.Workload(address(p)).Policies))
		theirs := slices.Sorted(slices.Values(c.theirs.workloads[address(p)].GetAuthorizationPolicies()))
		if !slices.Equal(ours, theirs) {
			c.differ("pod %s names %v, istiod says %v", p.Name, ours, theirs)
		}
	}
}

// decisions compares what becomes of connections to each pod, under each policy that is for it
// alone, and under all of them. Where Tacit denies for a rule that cannot be enforced, istiod may
// differ.
func (c *comparison) decisions(d dice, t *town) {
	for _, p := range t.pods {
		w := c.ours.Workload(address(p))
		all, unknown := c.ours.PoliciesOf(w)
		sets := [][]*mesh.Policy{all}
		for _, one := range all {
			sets = append(sets, []*mesh.Policy{one})
		}
		for _, set := range sets {
			compiled := policy.Compile(set, unknown, nil)
			for range 30 {
				c.decide(compiled, set, d.connection(address(p)), t)
			}
		}
	}
	// Those that are for no pod of the town decide as well.
	for _, p := range t.policies {
		set := []*mesh.Policy{c.ours.Policy(key(p))}
		compiled := policy.Compile(set, nil, nil)
		for range 30 {
			c.decide(compiled, set, d.connection(address(t.pods[0])), t)
		}
	}
}

func (c *comparison) decide(compiled *policy.Set, set []*mesh.Policy, x policy.Connection, t *town) {
	var theirs []*message.Authorization
	for _, p := range set {
		theirs = append(theirs, c.theirs.policies[p.Key()])
	}
	got, want := compiled.Decide(&x), ztunnel(theirs, x)
	c.asked++
	switch {
	case got.Allowed == want:
		if want {
			c.allowed++
		}
	case !got.Allowed && slices.ContainsFunc(set, hasUnenforceable):
		c.meant++
	default:
		c.differ("%+v: %s, istiod's policies say allowed %v\n\t%s", x, got, want, strings.Join(specs(set, t), "\n\t"))
	}
}

func hasUnenforceable(p *mesh.Policy) bool {
	return slices.ContainsFunc(p.Rules, func(r mesh.Rule) bool { return r.Unenforceable != "" })
}

func specs(set []*mesh.Policy, t *town) (all []string) {
	for _, p := range set {
		for _, o := range t.policies {
			if key(o) == p.Key() {
				text, _ := json.Marshal(o.Object["spec"])
				all = append(all, p.Key()+" "+string(text))
			}
		}
	}
	return all
}

func (d dice) connection(to netip.Addr) policy.Connection {
	sources := []string{"10.77.1.7", "10.77.1.3", "10.77.2.1", "192.0.2.9", "198.51.100.1", "fd77::5", "fd00::1"}
	ports := []uint16{80, 8080, 443, 15008, 9}
	x := policy.Connection{Source: netip.MustParseAddr(sources[d.IntN(len(sources))]), Destination: netip.AddrPortFrom(to, ports[d.IntN(len(ports))])}
	if d.IntN(5) > 0 {
		namespaces := []string{"compare-a", "compare-b", "elsewhere", "other"}
		x.Peer = policy.Proved(mesh.ID{TrustDomain: trustDomain, Namespace: namespaces[d.IntN(len(namespaces))], ServiceAccount: accounts[d.IntN(len(accounts))]})
	}
	return x
}

// ztunnel decides as Istio's ztunnel does by these policies (its src/rbac.rs, src/state.rs):
// slowly, and as plainly as it can be said.
func ztunnel(policies []*message.Authorization, x policy.Connection) bool {
	matches := func(p *message.Authorization) bool {
		return slices.ContainsFunc(p.GetRules(), func(r *message.Rule) bool { return allOf(r, x) })
	}
	allow := false
	for _, p := range policies {
		if p.GetAction() == message.Action_DENY && matches(p) {
			return false
		}
		allow = allow || p.GetAction() == message.Action_ALLOW
	}
	return !allow || slices.ContainsFunc(policies, func(p *message.Authorization) bool {
		return p.GetAction() == message.Action_ALLOW && matches(p)
	})
}

func allOf(r *message.Rule, x policy.Connection) bool {
	for _, clause := range r.GetClauses() {
		if len(clause.GetMatches()) > 0 && !slices.ContainsFunc(clause.GetMatches(), func(m *message.Match) bool { return fits(m, x) }) {
			return false
		}
	}
	return true
}

// fits: each kind that is there fits, and nothing fits one without any.
func fits(m *message.Match, x policy.Connection) bool {
	id := x.Peer.ID()
	principal := strings.TrimPrefix(id.String(), "spiffe://")
	empty := true
	is := func(n int, any bool) bool {
		empty = empty && n == 0
		return n == 0 || any
	}
	none := func(n int, any bool) bool {
		empty = empty && n == 0
		return !any
	}
	text := func(s string) func(*message.StringMatch) bool {
		return func(p *message.StringMatch) bool { return like(p, s) }
	}
	within := func(a netip.Addr) func(*message.IPRange) bool {
		return func(r *message.IPRange) bool {
			first, _ := netip.AddrFromSlice(r.GetAddress())
			return netip.PrefixFrom(first, int(r.GetLength())).Contains(a)
		}
	}
	account := func(a *message.ServiceAccountMatch) bool {
		return !id.IsZero() && a.GetNamespace() == id.Namespace && a.GetServiceAccount() == id.ServiceAccount
	}
	port, to := uint32(x.Destination.Port()), x.Destination.Addr()
	all := true
	for _, one := range []bool{
		is(len(m.GetNamespaces()), slices.ContainsFunc(m.GetNamespaces(), text(id.Namespace))),
		none(len(m.GetNotNamespaces()), slices.ContainsFunc(m.GetNotNamespaces(), text(id.Namespace))),
		is(len(m.GetPrincipals()), slices.ContainsFunc(m.GetPrincipals(), text(principal))),
		none(len(m.GetNotPrincipals()), slices.ContainsFunc(m.GetNotPrincipals(), text(principal))),
		is(len(m.GetServiceAccounts()), slices.ContainsFunc(m.GetServiceAccounts(), account)),
		none(len(m.GetNotServiceAccounts()), slices.ContainsFunc(m.GetNotServiceAccounts(), account)),
		is(len(m.GetSourceIps()), slices.ContainsFunc(m.GetSourceIps(), within(x.Source))),
		none(len(m.GetNotSourceIps()), slices.ContainsFunc(m.GetNotSourceIps(), within(x.Source))),
		is(len(m.GetDestinationIps()), slices.ContainsFunc(m.GetDestinationIps(), within(to))),
		none(len(m.GetNotDestinationIps()), slices.ContainsFunc(m.GetNotDestinationIps(), within(to))),
		is(len(m.GetDestinationPorts()), slices.Contains(m.GetDestinationPorts(), port)),
		none(len(m.GetNotDestinationPorts()), slices.Contains(m.GetNotDestinationPorts(), port)),
	} {
		all = all && one
	}
	return all && !empty
}

// like: nobody, who has no text, fits no pattern.
func like(p *message.StringMatch, s string) bool {
	if s == "" {
		return false
	}
	switch t := p.GetMatchType().(type) {
	case *message.StringMatch_Exact:
		return s == t.Exact
	case *message.StringMatch_Prefix:
		return strings.HasPrefix(s, t.Prefix)
	case *message.StringMatch_Suffix:
		return strings.HasSuffix(s, t.Suffix)
	case *message.StringMatch_Presence:
		return true
	}
	return false
}
