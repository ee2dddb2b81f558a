package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"tacit.dev/mesh"
)

// This file is how a translator reads a rule. Of a match it leaves out what cannot be enforced,
// so that it matches at least what was meant, and notes that: as a Deny the rule stays, and as
// an Allow it lets nobody in.

func (t *translator) rule(path string, raw json.RawMessage) (r mesh.Rule) {
	t.why = ""
	var rule policyRule
	if err := decodeStrictly(raw, &rule); err != nil {
		t.deny(path, Invalid, err.Error(), `correct it: kubectl explain authorizationpolicy.spec.rules; ports are text, as "8080"`)
	} else if n := rule.values(); n > maxRuleValues {
		t.deny(path, TooMuch, fmt.Sprintf("%d values: want at most %d", n, maxRuleValues), "split it into several rules")
	} else {
		r.Clauses = t.clauses(path, &rule)
	}
	if r.Unenforceable = t.why; r.Unenforceable != "" && t.policy.Action == mesh.Allow {
		r.Clauses = nil
	}
	return r
}

func (t *translator) deny(path, reason, text, remedy string) {
	t.note(Fault{path, reason, Denies, text, remedy})
	if t.why == "" {
		t.why = short(path + ": " + text)
	}
}

// values counts them.
func (r *policyRule) values() (n int) {
	count := func(v any) {
		s := reflect.ValueOf(v).Elem()
		for i := range s.NumField() {
			if f := s.Field(i); f.Kind() == reflect.Slice {
				n += f.Len()
			}
		}
	}
	for _, f := range r.From {
		if n++; f.Source != nil {
			count(f.Source)
		}
	}
	for _, o := range r.To {
		if n++; o.Operation != nil {
			count(o.Operation)
		}
	}
	for i := range r.When {
		n++
		count(&r.When[i])
	}
	return n
}

func (t *translator) clauses(path string, r *policyRule) (all []mesh.Clause) {
	var from, to mesh.Clause
	for i, f := range r.From {
		from = append(from, t.source(fmt.Sprintf("%s.from[%d].source", path, i), f.Source))
	}
	for i, o := range r.To {
		to = append(to, t.operation(fmt.Sprintf("%s.to[%d].operation", path, i), o.Operation))
	}
	clauses := []mesh.Clause{from, to}
	for i := range r.When {
		clauses = append(clauses, mesh.Clause{t.condition(fmt.Sprintf("%s.when[%d]", path, i), &r.When[i])})
	}
	for _, c := range clauses {
		// A match with nothing left was meant to match something: here it matches everything.
		if len(c) > 0 && !slices.ContainsFunc(c, isEmpty) {
			all = append(all, c)
		}
	}
	return all
}

func isEmpty(m mesh.Match) bool { return reflect.ValueOf(m).IsZero() }

func (t *translator) source(path string, s *policySource) (m mesh.Match) {
	if s == nil || reflect.ValueOf(*s).IsZero() {
		t.deny(path, Invalid, "it is empty", "set at least one field, or remove it")
		return m
	}
	m.Principals, m.NotPrincipals = t.principals(path+".principals", s.Principals), t.principals(path+".notPrincipals", s.NotPrincipals)
	m.Namespaces, m.NotNamespaces = t.namespaces(path+".namespaces", s.Namespaces), t.namespaces(path+".notNamespaces", s.NotNamespaces)
	m.ServiceAccounts, m.NotServiceAccounts = t.accounts(path+".serviceAccounts", s.ServiceAccounts), t.accounts(path+".notServiceAccounts", s.NotServiceAccounts)
	m.SourceIPs, m.NotSourceIPs = t.blocks(path+".ipBlocks", s.IPBlocks), t.blocks(path+".notIpBlocks", s.NotIPBlocks)
	if len(s.ServiceAccounts)+len(s.NotServiceAccounts) > 0 && len(s.Principals)+len(s.NotPrincipals)+len(s.Namespaces)+len(s.NotNamespaces) > 0 {
		t.deny(path+".serviceAccounts", Invalid, "serviceAccounts cannot be set with principals or namespaces", "use only one of them")
	}
	t.http(path+".requestPrincipals", len(s.RequestPrincipals))
	t.http(path+".notRequestPrincipals", len(s.NotRequestPrincipals))
	t.http(path+".remoteIpBlocks", len(s.RemoteIPBlocks))
	t.http(path+".notRemoteIpBlocks", len(s.NotRemoteIPBlocks))
	for _, f := range []struct {
		name string
		n    int
	}{{"trustDomains", len(s.TrustDomains)}, {"notTrustDomains", len(s.NotTrustDomains)}} {
		if f.n > 0 {
			t.deny(path+"."+f.name, Unsupported, "trust domains cannot be enforced: the mesh has one", "use principals, such as "+t.trustDomain+"/ns/*")
		}
	}
	t.contradiction(path, m)
	return m
}

func (t *translator) operation(path string, o *policyOperation) (m mesh.Match) {
	if o == nil || reflect.ValueOf(*o).IsZero() {
		t.deny(path, Invalid, "it is empty", "set at least one field, or remove it")
		return m
	}
	m.DestinationPorts, m.NotDestinationPorts = t.ports(path+".ports", o.Ports), t.ports(path+".notPorts", o.NotPorts)
	t.http(path+".methods", len(o.Methods))
	t.http(path+".notMethods", len(o.NotMethods))
	t.http(path+".paths", len(o.Paths))
	t.http(path+".notPaths", len(o.NotPaths))
	t.http(path+".hosts", len(o.Hosts))
	t.http(path+".notHosts", len(o.NotHosts))
	t.contradiction(path, m)
	return m
}

// http is for fields that somebody has to look into HTTP for.
func (t *translator) http(path string, values int) {
	if values > 0 {
		t.deny(path, NeedsHTTP, "a field of HTTP cannot be enforced without a waypoint", "remove it, or use principals, namespaces, serviceAccounts, ipBlocks and ports")
	}
}

func (t *translator) condition(path string, c *policyCondition) (m mesh.Match) {
	if len(c.Values)+len(c.NotValues) == 0 {
		t.deny(path, Invalid, "it has neither values nor notValues", "set at least one value")
		return m
	}
	values, not := path+".values", path+".notValues"
	switch c.Key {
	case "source.principal":
		m.Principals, m.NotPrincipals = t.principals(values, c.Values), t.principals(not, c.NotValues)
	case "source.namespace":
		m.Namespaces, m.NotNamespaces = t.namespaces(values, c.Values), t.namespaces(not, c.NotValues)
	case "source.ip":
		m.SourceIPs, m.NotSourceIPs = t.blocks(values, c.Values), t.blocks(not, c.NotValues)
	case "destination.ip":
		m.DestinationIPs, m.NotDestinationIPs = t.addressed(values, t.blocks(values, c.Values)), t.addressed(not, t.blocks(not, c.NotValues))
	case "destination.port":
		m.DestinationPorts, m.NotDestinationPorts = t.ports(values, c.Values), t.ports(not, c.NotValues)
	default:
		t.deny(path+".key", NeedsHTTP, fmt.Sprintf("%.80q is not an attribute of a connection", c.Key), "use source.ip, source.namespace, source.principal, destination.ip or destination.port")
	}
	t.contradiction(path, m)
	return m
}

// addressed: who dials a Service has another destination there than at the pod.
func (t *translator) addressed(path string, list []netip.Prefix) []netip.Prefix {
	if len(list) > 0 && len(t.services) > 0 {
		t.deny(path, Unsupported, "with targetRefs it would be the address of the Service, which the pod does not see", "use a selector and the addresses of the pods")
		return nil
	}
	return list
}

func (t *translator) ports(path string, values []string) (list []uint16) {
	for i, v := range values {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			t.deny(index(path, i), Invalid, fmt.Sprintf("%.80q is not a port", v), `use a port from 1 to 65535, such as "8080"`)
			return nil
		}
		list = append(list, uint16(n))
	}
	if len(list) > 0 && len(t.services) > 0 {
		t.deny(path, Unsupported, "with targetRefs it would be the port of the Service, which the pod does not see", "use a selector and the ports of the pods")
		return nil
	}
	return list
}

func index(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

func (t *translator) blocks(path string, values []string) (list []netip.Prefix) {
	for i, v := range values {
		p, err := netip.ParsePrefix(v)
		if a, aerr := netip.ParseAddr(v); aerr == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if err != nil || p.Addr().Zone() != "" || p.Addr().Is4In6() {
			t.deny(index(path, i), Invalid, fmt.Sprintf("%.80q is not an address or a range", v), "use an address or a range, such as 10.0.0.0/16")
			return nil
		}
		list = append(list, p.Masked())
	}
	return list
}

func (t *translator) accounts(path string, values []string) (list []mesh.ServiceAccount) {
	for i, v := range values {
		a := mesh.ServiceAccount{Namespace: t.object.Namespace, Name: v}
		if namespace, name, is := strings.Cut(v, "/"); is {
			a = mesh.ServiceAccount{Namespace: namespace, Name: name}
		}
		if !isSegment(a.Namespace) || !isSegment(a.Name) {
			t.deny(index(path, i), Invalid, fmt.Sprintf("%.80q is not a service account", v), "use NAMESPACE/NAME, or NAME for one in the namespace of the policy; wildcards are not supported here")
			return nil
		}
		list = append(list, a)
	}
	return list
}

func (t *translator) namespaces(path string, values []string) []mesh.Pattern {
	return t.patterns(path, values, func(p *mesh.Pattern) (remedy, never string) {
		if p.Kind != mesh.Present && !isSegment(p.Text) {
			return "use the name of a namespace; a * is possible at one end", ""
		}
		return "", ""
	})
}

// principals: cluster.local means the mesh's own trust domain, as in Istio.
func (t *translator) principals(path string, values []string) []mesh.Pattern {
	own := t.trustDomain + "/ns/"
	return t.patterns(path, values, func(p *mesh.Pattern) (remedy, never string) {
		if p.Kind == mesh.Exactly || p.Kind == mesh.Prefix {
			if rest, is := strings.CutPrefix(p.Text, "cluster.local/"); is {
				p.Text = t.trustDomain + "/" + rest
			}
		}
		switch {
		case strings.HasPrefix(p.Text, "spiffe:"):
			return "remove spiffe://", ""
		case p.Kind == mesh.Exactly && !isIdentity(p.Text):
			return "use TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT, or use serviceAccounts", ""
		case p.Kind == mesh.Exactly && !strings.HasPrefix(p.Text, own), p.Kind == mesh.Prefix && !strings.HasPrefix(p.Text, own) && !strings.HasPrefix(own, p.Text):
			return "", "the mesh admits no other trust domain than " + t.trustDomain
		}
		return "", ""
	})
}

// patterns reads values. check tells how to correct a pattern, "" if it is one, and why it
// never matches, "" if it may.
func (t *translator) patterns(path string, values []string, check func(*mesh.Pattern) (remedy, never string)) (list []mesh.Pattern) {
	for i, v := range values {
		p, ok := parsePattern(v)
		remedy, never := "use a text; a * is possible at one end, or alone", ""
		if ok {
			remedy, never = check(&p)
		}
		if remedy != "" {
			t.deny(index(path, i), Invalid, fmt.Sprintf("%.80q cannot match anything", v), remedy)
			return nil
		}
		if never != "" {
			t.note(Fault{index(path, i), "", Never, fmt.Sprintf("%.80q never matches: %s", v, never), "use the trust domain " + t.trustDomain + ", or * instead"})
		}
		list = append(list, p)
	}
	return list
}

// parsePattern reads exact text, prefix*, *suffix, or * for any but none.
func parsePattern(v string) (p mesh.Pattern, ok bool) {
	switch {
	case v == "*":
		return mesh.Pattern{Kind: mesh.Present}, true
	case strings.HasPrefix(v, "*"):
		p = mesh.Pattern{Kind: mesh.Suffix, Text: v[1:]}
	case strings.HasSuffix(v, "*"):
		p = mesh.Pattern{Kind: mesh.Prefix, Text: v[:len(v)-1]}
	default:
		p = mesh.Pattern{Kind: mesh.Exactly, Text: v}
	}
	return p, p.Text != "" && len(p.Text) <= 3*maxName && !strings.Contains(p.Text, "*")
}

// isIdentity tells whether text is an identity without its scheme.
func isIdentity(text string) bool {
	_, err := mesh.ParseID("spiffe://" + text)
	return err == nil
}

// isSegment tells whether text may be a namespace, or a service account.
func isSegment(text string) bool { return isIdentity("x/ns/" + text + "/sa/x") }

// contradiction notes a match that excludes all that it asks for.
func (t *translator) contradiction(path string, m mesh.Match) {
	if none(m.Principals, m.NotPrincipals, covers) || none(m.Namespaces, m.NotNamespaces, covers) ||
		none(m.ServiceAccounts, m.NotServiceAccounts, func(x, y mesh.ServiceAccount) bool { return x == y }) ||
		none(m.SourceIPs, m.NotSourceIPs, holds) || none(m.DestinationIPs, m.NotDestinationIPs, holds) ||
		none(m.DestinationPorts, m.NotDestinationPorts, func(x, y uint16) bool { return x == y }) {
		t.note(Fault{path, "", Never, "it never matches: its not fields exclude all of its values", "remove the exclusion, or all of it"})
	}
}

// none tells whether nothing of list is left without what is not wanted.
func none[T any](list, not []T, covers func(not, v T) bool) bool {
	return len(list) > 0 && !slices.ContainsFunc(list, func(v T) bool {
		return !slices.ContainsFunc(not, func(n T) bool { return covers(n, v) })
	})
}

func holds(not, p netip.Prefix) bool { return not.Bits() <= p.Bits() && not.Contains(p.Addr()) }

// covers tells whether all that p matches is matched by not, too, as far as that is obvious.
func covers(not, p mesh.Pattern) bool {
	switch not.Kind {
	case mesh.Present:
		return true
	case mesh.Prefix:
		return p.Kind != mesh.Suffix && strings.HasPrefix(p.Text, not.Text)
	case mesh.Suffix:
		return p.Kind != mesh.Prefix && strings.HasSuffix(p.Text, not.Text)
	}
	return p == not
}
