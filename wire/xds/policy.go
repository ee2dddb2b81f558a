package xds

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

const (
	// policyType is told to our own proxies together with the World, so that a workload and
	// the policies that it names decide from the same moment on. A foreign client asks for it.
	policyType = "type.googleapis.com/istio.security.Authorization"
	// policyPrefix tells the names of policies in the World's table from those of services,
	// which may be the same. A foreign client is told them without it.
	policyPrefix = "policy:"
)

// Read only.
var (
	scopes = map[mesh.Scope]message.Scope{
		mesh.WholeMesh: message.Scope_GLOBAL, mesh.WholeNamespace: message.Scope_NAMESPACE, mesh.Named: message.Scope_WORKLOAD_SELECTOR,
	}
	actions = map[mesh.Action]message.Action{mesh.Allow: message.Action_ALLOW, mesh.Deny: message.Action_DENY}
)

// encodePolicy never leaves a policy out for what is in it: in place of one that is wrong it
// tells one that denies.
func encodePolicy(p *mesh.Policy) (proto.Message, error) {
	if err := p.Check(); err != nil {
		p = p.Refused(cut(err.Error()))
		if err := p.Check(); err != nil {
			return nil, err
		}
	}
	m := &message.Authorization{Name: p.Name, Namespace: p.Namespace, Scope: scopes[p.Scope], Action: actions[p.Action], DryRun: p.DryRun}
	if p.Mode != nil {
		m.Mode = encodeMode(p.Mode)
	}
	for _, r := range p.Rules {
		m.Rules = append(m.Rules, encodeRule(p.Action, r))
	}
	return m, nil
}

// encodeRule has a rule that lets nobody in match nothing, for clients that do not know why.
func encodeRule(action mesh.Action, r mesh.Rule) *message.Rule {
	m := &message.Rule{Unenforceable: r.Unenforceable}
	if r.Unenforceable != "" && action == mesh.Allow {
		m.Clauses = []*message.Clause{{Matches: []*message.Match{{}}}}
		return m
	}
	for _, c := range r.Clauses {
		mc := &message.Clause{}
		for i := range c {
			mc.Matches = append(mc.Matches, encodeMatch(&c[i]))
		}
		m.Clauses = append(m.Clauses, mc)
	}
	return m
}

func encodeMatch(m *mesh.Match) *message.Match {
	return &message.Match{
		Namespaces: encodePatterns(m.Namespaces), NotNamespaces: encodePatterns(m.NotNamespaces),
		Principals: encodePatterns(m.Principals), NotPrincipals: encodePatterns(m.NotPrincipals),
		SourceIps: encodePrefixes(m.SourceIPs), NotSourceIps: encodePrefixes(m.NotSourceIPs),
		DestinationIps: encodePrefixes(m.DestinationIPs), NotDestinationIps: encodePrefixes(m.NotDestinationIPs),
		DestinationPorts: encodeNumbers(m.DestinationPorts), NotDestinationPorts: encodeNumbers(m.NotDestinationPorts),
		ServiceAccounts: encodeAccounts(m.ServiceAccounts), NotServiceAccounts: encodeAccounts(m.NotServiceAccounts),
	}
}

func encodePatterns(list []mesh.Pattern) (all []*message.StringMatch) {
	for _, p := range list {
		m := &message.StringMatch{}
		switch p.Kind {
		case mesh.Exactly:
			m.MatchType = &message.StringMatch_Exact{Exact: p.Text}
		case mesh.Prefix:
			m.MatchType = &message.StringMatch_Prefix{Prefix: p.Text}
		case mesh.Suffix:
			m.MatchType = &message.StringMatch_Suffix{Suffix: p.Text}
		case mesh.Present:
			m.MatchType = &message.StringMatch_Presence{Presence: &emptypb.Empty{}}
		}
		all = append(all, m)
	}
	return all
}

func encodePrefixes(list []netip.Prefix) (all []*message.IPRange) {
	for _, p := range list {
		all = append(all, &message.IPRange{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
	}
	return all
}

func encodeAccounts(list []mesh.ServiceAccount) (all []*message.ServiceAccountMatch) {
	for _, a := range list {
		all = append(all, &message.ServiceAccountMatch{Namespace: a.Namespace, ServiceAccount: a.Name})
	}
	return all
}

// decodePolicy refuses what does not say for whom it is. What it does not understand of the
// rest makes the rules unenforceable: a policy that is not taken would let everybody in.
func decodePolicy(m *message.Authorization) (*mesh.Policy, error) {
	p := &mesh.Policy{Namespace: m.GetNamespace(), Name: m.GetName(), Scope: keyOf(scopes, m.GetScope()), Action: keyOf(actions, m.GetAction()), DryRun: m.GetDryRun()}
	if err := p.Refused("").Check(); err != nil {
		return nil, err
	}
	if len(m.GetRules()) > mesh.MaxPolicyRules || isForeign(m) || p.Action == "" {
		return p.Refused(fmt.Sprintf("%d rules and action %s: want at most %d, and nothing that is newer than this proxy",
			len(m.GetRules()), m.GetAction(), mesh.MaxPolicyRules)), nil
	}
	if m.Mode != nil {
		p.Mode = decodeMode(m.GetMode())
	}
	for _, x := range m.GetRules() {
		r, err := decodeRule(x)
		if err != nil {
			r = mesh.Rule{Unenforceable: cut(err.Error())}
		}
		p.Rules = append(p.Rules, r)
	}
	if err := p.Check(); err != nil {
		p = p.Refused(cut(err.Error()))
	}
	return p, nil
}

// keyOf is zero for what is not known.
func keyOf[K, V comparable](all map[K]V, v V) (key K) {
	for k, is := range all {
		if is == v {
			return k
		}
	}
	return key
}

// isForeign reports whether there are fields that nobody here knows.
func isForeign(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }

var errForeign = errors.New("a field that this proxy does not know")

func decodeRule(m *message.Rule) (r mesh.Rule, err error) {
	if isForeign(m) {
		return r, errForeign
	}
	r.Unenforceable = cut(m.GetUnenforceable())
	for _, x := range m.GetClauses() {
		if isForeign(x) {
			return r, errForeign
		}
		c := mesh.Clause{}
		for _, one := range x.GetMatches() {
			match, err := decodeMatch(one)
			if err != nil {
				return r, err
			}
			c = append(c, match)
		}
		r.Clauses = append(r.Clauses, c)
	}
	return r, nil
}

func decodeMatch(m *message.Match) (mesh.Match, error) {
	if isForeign(m) {
		return mesh.Match{}, errForeign
	}
	var errs [12]error
	match := mesh.Match{}
	match.Namespaces, errs[0] = decodePatterns(m.GetNamespaces())
	match.NotNamespaces, errs[1] = decodePatterns(m.GetNotNamespaces())
	match.Principals, errs[2] = decodePatterns(m.GetPrincipals())
	match.NotPrincipals, errs[3] = decodePatterns(m.GetNotPrincipals())
	match.SourceIPs, errs[4] = decodePrefixes(m.GetSourceIps())
	match.NotSourceIPs, errs[5] = decodePrefixes(m.GetNotSourceIps())
	match.DestinationIPs, errs[6] = decodePrefixes(m.GetDestinationIps())
	match.NotDestinationIPs, errs[7] = decodePrefixes(m.GetNotDestinationIps())
	match.DestinationPorts, errs[8] = decodeNumbers(m.GetDestinationPorts())
	match.NotDestinationPorts, errs[9] = decodeNumbers(m.GetNotDestinationPorts())
	match.ServiceAccounts, errs[10] = decodeAccounts(m.GetServiceAccounts())
	match.NotServiceAccounts, errs[11] = decodeAccounts(m.GetNotServiceAccounts())
	return match, errors.Join(errs[:]...)
}

func decodePatterns(list []*message.StringMatch) (all []mesh.Pattern, err error) {
	for _, m := range list {
		p := mesh.Pattern{}
		switch t := m.GetMatchType().(type) {
		case *message.StringMatch_Exact:
			p.Text = t.Exact
		case *message.StringMatch_Prefix:
			p.Kind, p.Text = mesh.Prefix, t.Prefix
		case *message.StringMatch_Suffix:
			p.Kind, p.Text = mesh.Suffix, t.Suffix
		case *message.StringMatch_Presence:
			p.Kind = mesh.Present
		default:
			return nil, errForeign
		}
		all = append(all, p)
	}
	return all, nil
}

func decodePrefixes(list []*message.IPRange) (all []netip.Prefix, err error) {
	for _, m := range list {
		a, ok := netip.AddrFromSlice(m.GetAddress())
		if !ok || m.GetLength() > uint32(a.BitLen()) || isForeign(m) {
			return nil, fmt.Errorf("range of %d bytes / %d bits: want an address and its prefix", len(m.GetAddress()), m.GetLength())
		}
		all = append(all, netip.PrefixFrom(a, int(m.GetLength())))
	}
	return all, nil
}

func decodeAccounts(list []*message.ServiceAccountMatch) (all []mesh.ServiceAccount, err error) {
	for _, m := range list {
		if isForeign(m) {
			return nil, errForeign
		}
		all = append(all, mesh.ServiceAccount{Namespace: m.GetNamespace(), Name: m.GetServiceAccount()})
	}
	return all, nil
}

// cut bounds a reason.
func cut(s string) string {
	if len(s) > 512 {
		s = s[:512]
	}
	return strings.ToValidUTF8(s, "")
}

// inward gives the names of policies in a request those that they have in the World's table.
func inward(req *message.DeltaDiscoveryRequest) {
	if req.GetTypeUrl() != policyType {
		return
	}
	for _, names := range [][]string{req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe} {
		for i, name := range names {
			if name != "*" {
				names[i] = policyPrefix + name
			}
		}
	}
	versions := map[string]string{}
	for name, v := range req.GetInitialResourceVersions() {
		versions[policyPrefix+name] = v
	}
	req.InitialResourceVersions = versions
	req.Held = nil // ours ask for the World
}

// outward takes it away again.
func outward(resp *response) error {
	if resp.GetTypeUrl() != policyType {
		return nil
	}
	if err := resp.spell(); err != nil {
		return err
	}
	for _, r := range resp.GetResources() {
		r.Name = strings.TrimPrefix(r.GetName(), policyPrefix)
	}
	for i, name := range resp.GetRemovedResources() {
		resp.RemovedResources[i] = strings.TrimPrefix(name, policyPrefix)
	}
	return nil
}

// unpackPolicy gives the name that the policy has in the World's table.
func unpackPolicy(body *anypb.Any) (string, any, error) {
	m := &message.Authorization{}
	if err := unpack(body, policyType, m); err != nil {
		return "", nil, err
	}
	p, err := decodePolicy(m)
	if err != nil {
		return "", nil, err
	}
	return policyPrefix + p.Key(), p, nil
}

// policyNames are the names of policies in the World's table.
func policyNames(keys []string) []string {
	names := make([]string, 0, len(keys))
	for _, k := range keys {
		names = append(names, policyPrefix+k)
	}
	return names
}

// typeOf is the type of a resource in the World's table.
func typeOf(name string) string {
	if strings.HasPrefix(name, policyPrefix) {
		return policyType
	}
	return addressType
}
