package policy

import (
	"slices"
	"strings"

	"tacit.dev/mesh"
)

// obvious decides in the slow way, by the words of mesh.Policy.
func obvious(policies []*mesh.Policy, unknown []string, c Connection, dryRun bool) (allowed bool, why Reason) {
	if len(unknown) > 0 {
		return false, Unknown
	}
	allows, allowed := false, false
	for _, p := range policies {
		if p.DryRun && !dryRun {
			continue
		}
		allows = allows || p.Action == mesh.Allow
		for _, r := range p.Rules {
			matches := ruleMatches(r, c)
			switch {
			case p.Action == mesh.Deny && matches && r.Unenforceable != "":
				why = max(why, Unenforceable)
			case p.Action == mesh.Deny && matches:
				why = max(why, Matched)
			case p.Action == mesh.Allow && matches && r.Unenforceable == "":
				allowed = true
			}
		}
	}
	switch {
	case why != Open:
		return false, why
	case allowed:
		return true, Matched
	case allows:
		return false, Unmatched
	}
	return true, Open
}

func ruleMatches(r mesh.Rule, c Connection) bool {
	for _, clause := range r.Clauses {
		if len(clause) > 0 && !slices.ContainsFunc(clause, func(m mesh.Match) bool { return matchMatches(m, c) }) {
			return false
		}
	}
	return true
}

func matchMatches(m mesh.Match, c Connection) bool {
	asked, all := false, true
	ask(&asked, &all, m.Namespaces, m.NotNamespaces, func(p mesh.Pattern) bool { return patternMatches(p, c.Peer.id.Namespace) })
	ask(&asked, &all, m.Principals, m.NotPrincipals, func(p mesh.Pattern) bool {
		return patternMatches(p, strings.TrimPrefix(c.Peer.id.String(), "spiffe://"))
	})
	ask(&asked, &all, m.ServiceAccounts, m.NotServiceAccounts, func(a mesh.ServiceAccount) bool {
		return a.Namespace == c.Peer.id.Namespace && a.Name == c.Peer.id.ServiceAccount
	})
	ask(&asked, &all, m.SourceIPs, m.NotSourceIPs, contains(c.Source))
	ask(&asked, &all, m.DestinationIPs, m.NotDestinationIPs, contains(c.Destination.Addr()))
	ask(&asked, &all, m.DestinationPorts, m.NotDestinationPorts, func(p uint16) bool { return p == c.Destination.Port() })
	return asked && all
}

// ask looks at one kind of values.
func ask[V any](asked, all *bool, is, not []V, matches func(V) bool) {
	*asked = *asked || len(is)+len(not) > 0
	*all = *all && (len(is) == 0 || slices.ContainsFunc(is, matches)) && !slices.ContainsFunc(not, matches)
}

func patternMatches(p mesh.Pattern, text string) bool {
	switch p.Kind {
	case mesh.Exactly:
		return text == p.Text
	case mesh.Prefix:
		return text != "" && strings.HasPrefix(text, p.Text)
	case mesh.Suffix:
		return text != "" && strings.HasSuffix(text, p.Text)
	}
	return text != ""
}
