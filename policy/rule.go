package policy

import (
	"net/netip"
	"slices"
	"strings"

	"tacit.dev/mesh"
)

// compiled is one policy.
type compiled struct {
	key    string
	action mesh.Action
	dryRun bool
	rules  []rule
}

// rule is one of a policy.
type rule struct {
	policy        string
	number        int
	unenforceable string
	// never: it matches nothing.
	never   bool
	clauses [][]match
	// by and ports are where an index has it.
	by    keys
	ports []uint16
}

// match is mesh.Match, ready to be asked.
type match struct {
	namespaces, notNamespaces, principals, notPrincipals texts
	accounts, notAccounts                                []mesh.ServiceAccount
	sources, notSources, destinations, notDestinations   ranges
	ports, notPorts                                      []uint16 // sorted
}

func compile(p *mesh.Policy) *compiled {
	c := &compiled{key: p.Key(), action: p.Action, dryRun: p.DryRun, rules: make([]rule, 0, len(p.Rules))}
	for i, r := range p.Rules {
		x := rule{policy: c.key, number: i, unenforceable: r.Unenforceable}
		// An Allow that cannot be enforced lets nobody in.
		if x.never = r.Unenforceable != "" && p.Action != mesh.Deny; !x.never {
			x.by, x.ports = keysOf(r.Clauses), portsOf(r.Clauses)
			for _, clause := range r.Clauses {
				if all := compileClause(clause); len(all) > 0 {
					x.clauses = append(x.clauses, all)
				} else if len(clause) > 0 {
					x.never = true // one without matches matches everything, one of empty matches nothing
				}
			}
		}
		c.rules = append(c.rules, x)
	}
	return c
}

// compileClause leaves out what matches nothing.
func compileClause(c mesh.Clause) (all []match) {
	for i := range c {
		m := &c[i]
		x := match{
			namespaces: newTexts(m.Namespaces), notNamespaces: newTexts(m.NotNamespaces),
			principals: newTexts(m.Principals), notPrincipals: newTexts(m.NotPrincipals),
			accounts: m.ServiceAccounts, notAccounts: m.NotServiceAccounts,
			sources: newRanges(m.SourceIPs), notSources: newRanges(m.NotSourceIPs),
			destinations: newRanges(m.DestinationIPs), notDestinations: newRanges(m.NotDestinationIPs),
			ports: sorted(m.DestinationPorts), notPorts: sorted(m.NotDestinationPorts),
		}
		if !isEmpty(m) {
			all = append(all, x)
		}
	}
	return all
}

func isEmpty(m *mesh.Match) bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+len(m.ServiceAccounts)+len(m.NotServiceAccounts)+
		len(m.SourceIPs)+len(m.NotSourceIPs)+len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

func sorted(ports []uint16) []uint16 {
	ports = slices.Clone(ports)
	slices.Sort(ports)
	return ports
}

func (r *rule) matches(c *Connection) bool {
	for _, clause := range r.clauses {
		if !anyOf(clause, c) {
			return false
		}
	}
	return true
}

func anyOf(clause []match, c *Connection) bool {
	for i := range clause {
		if clause[i].matches(c) {
			return true
		}
	}
	return false
}

// matches asks what is cheap first.
func (m *match) matches(c *Connection) bool {
	if len(m.ports) > 0 && !hasPort(m.ports, c) || hasPort(m.notPorts, c) {
		return false
	}
	if len(m.sources) > 0 && !m.sources.has(c.Source) || m.notSources.has(c.Source) {
		return false
	}
	if to := c.Destination.Addr(); len(m.destinations) > 0 && !m.destinations.has(to) || m.notDestinations.has(to) {
		return false
	}
	// Who is nobody has empty texts, which no pattern matches.
	if ns := c.Peer.id.Namespace; !m.namespaces.isNone() && !m.namespaces.has(ns) || m.notNamespaces.has(ns) {
		return false
	}
	if !m.principals.isNone() && !m.principals.has(c.Peer.text) || m.notPrincipals.has(c.Peer.text) {
		return false
	}
	return (len(m.accounts) == 0 || hasAccount(m.accounts, c)) && !hasAccount(m.notAccounts, c)
}

func hasPort(ports []uint16, c *Connection) bool {
	_, is := slices.BinarySearch(ports, c.Destination.Port())
	return is
}

func hasAccount(list []mesh.ServiceAccount, c *Connection) bool {
	id := c.Peer.id
	return !id.IsZero() && slices.Contains(list, mesh.ServiceAccount{Namespace: id.Namespace, Name: id.ServiceAccount})
}

// texts are the patterns of one field.
type texts struct {
	exact          []string // sorted
	prefix, suffix []string
	present        bool
}

func newTexts(list []mesh.Pattern) (t texts) {
	for _, p := range list {
		switch p.Kind {
		case mesh.Exactly:
			t.exact = append(t.exact, p.Text)
		case mesh.Prefix:
			t.prefix = append(t.prefix, p.Text)
		case mesh.Suffix:
			t.suffix = append(t.suffix, p.Text)
		case mesh.Present:
			t.present = true
		}
	}
	slices.Sort(t.exact)
	return t
}

func (t *texts) isNone() bool {
	return len(t.exact)+len(t.prefix)+len(t.suffix) == 0 && !t.present
}

func (t *texts) has(s string) bool {
	if s == "" {
		return false
	}
	if _, is := slices.BinarySearch(t.exact, s); is || t.present {
		return true
	}
	for _, p := range t.prefix {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	for _, p := range t.suffix {
		if strings.HasSuffix(s, p) {
			return true
		}
	}
	return false
}

// ranges are addresses, sorted, and none in two of them.
type ranges []span

type span struct{ first, last netip.Addr }

func newRanges(list []netip.Prefix) (all ranges) {
	list = slices.Clone(list)
	for i := range list {
		list[i] = list[i].Masked()
	}
	// Of two prefixes that have an address in common one contains the other, and comes first.
	slices.SortFunc(list, netip.Prefix.Compare)
	for _, p := range list {
		s := span{p.Addr(), lastOf(p)}
		if n := len(all); n == 0 || all[n-1].last.Less(s.first) {
			all = append(all, s)
		}
	}
	return all
}

// lastOf is the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (r ranges) has(a netip.Addr) bool {
	i, is := slices.BinarySearchFunc(r, a, func(s span, a netip.Addr) int { return s.first.Compare(a) })
	return is || i > 0 && !r[i-1].last.Less(a) && r[i-1].first.BitLen() == a.BitLen()
}
