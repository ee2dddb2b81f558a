package policy

import (
	"net/netip"
	"slices"

	"tacit.dev/mesh"
)

// index finds, of many rules, those that may match a connection: by its port, and then by
// one thing of its peer that the rule asks for.
type index struct {
	// ports have the rules that match some ports only, any the others.
	ports map[uint16]*table
	any   table
}

// table has each rule once for each value of the thing by which it is found. Which thing
// that is, is the rule's own affair: the first that it asks for in all alternatives of a clause.
type table struct {
	principals map[string][]*rule
	accounts   map[mesh.ServiceAccount][]*rule
	namespaces map[string][]*rule
	sources    map[netip.Addr][]*rule
	// rest have to be looked at one by one.
	rest []*rule
}

func (x *index) add(p *compiled) {
	for i := range p.rules {
		r := &p.rules[i]
		if r.never {
			continue
		}
		if len(r.ports) == 0 {
			x.any.add(r)
		}
		for _, port := range r.ports {
			if x.ports == nil {
				x.ports = make(map[uint16]*table)
			}
			if x.ports[port] == nil {
				x.ports[port] = new(table)
			}
			x.ports[port].add(r)
		}
	}
}

func (t *table) add(r *rule) {
	switch by := r.by; {
	case len(by.principals) > 0:
		insert(&t.principals, by.principals, r)
	case len(by.accounts) > 0:
		insert(&t.accounts, by.accounts, r)
	case len(by.namespaces) > 0:
		insert(&t.namespaces, by.namespaces, r)
	case len(by.sources) > 0:
		insert(&t.sources, by.sources, r)
	default:
		t.rest = append(t.rest, r)
	}
}

func insert[K comparable](m *map[K][]*rule, keys []K, r *rule) {
	if *m == nil {
		*m = make(map[K][]*rule)
	}
	for _, k := range keys {
		if last := (*m)[k]; len(last) == 0 || last[len(last)-1] != r {
			(*m)[k] = append(last, r)
		}
	}
}

// find returns a rule that matches, or nil.
func (x *index) find(c *Connection) *rule {
	if t := x.ports[c.Destination.Port()]; t != nil {
		if r := t.find(c); r != nil {
			return r
		}
	}
	return x.any.find(c)
}

func (t *table) find(c *Connection) *rule {
	if r := first(t.rest, c); r != nil {
		return r
	}
	if len(t.sources) > 0 {
		if r := first(t.sources[c.Source], c); r != nil {
			return r
		}
	}
	id := c.Peer.id
	if id.IsZero() {
		return nil
	}
	if len(t.principals) > 0 {
		if r := first(t.principals[c.Peer.text], c); r != nil {
			return r
		}
	}
	if len(t.accounts) > 0 {
		if r := first(t.accounts[mesh.ServiceAccount{Namespace: id.Namespace, Name: id.ServiceAccount}], c); r != nil {
			return r
		}
	}
	return first(t.namespaces[id.Namespace], c)
}

func first(rules []*rule, c *Connection) *rule {
	for _, r := range rules {
		if r.matches(c) {
			return r
		}
	}
	return nil
}

// keys are values of one thing, of which a connection must have one for a rule to match.
type keys struct {
	principals []string
	accounts   []mesh.ServiceAccount
	namespaces []string
	sources    []netip.Addr
}

// keysOf finds by which thing a rule can be found, none if by nothing.
func keysOf(clauses []mesh.Clause) keys {
	for _, c := range clauses {
		if k, ok := gather(c, func(m *mesh.Match) ([]string, bool) { return exact(m.Principals) }); ok {
			return keys{principals: k}
		}
		if k, ok := gather(c, func(m *mesh.Match) ([]mesh.ServiceAccount, bool) {
			return m.ServiceAccounts, len(m.ServiceAccounts) > 0
		}); ok {
			return keys{accounts: k}
		}
		if k, ok := gather(c, func(m *mesh.Match) ([]string, bool) { return exact(m.Namespaces) }); ok {
			return keys{namespaces: k}
		}
		if k, ok := gather(c, func(m *mesh.Match) ([]netip.Addr, bool) { return single(m.SourceIPs) }); ok {
			return keys{sources: k}
		}
	}
	return keys{}
}

// portsOf are the ports at which a rule may match, nil for all.
func portsOf(clauses []mesh.Clause) []uint16 {
	for _, c := range clauses {
		if ports, ok := gather(c, func(m *mesh.Match) ([]uint16, bool) { return m.DestinationPorts, len(m.DestinationPorts) > 0 }); ok {
			slices.Sort(ports)
			return slices.Compact(ports)
		}
	}
	return nil
}

// gather collects what all alternatives of a clause ask for, and reports false if one of
// them does not.
func gather[K any](c mesh.Clause, of func(*mesh.Match) ([]K, bool)) (all []K, ok bool) {
	for i := range c {
		some, ok := of(&c[i])
		if !ok {
			return nil, false
		}
		all = append(all, some...)
	}
	return all, len(c) > 0
}

func exact(list []mesh.Pattern) (texts []string, ok bool) {
	for _, p := range list {
		if p.Kind != mesh.Exactly {
			return nil, false
		}
		texts = append(texts, p.Text)
	}
	return texts, len(list) > 0
}

func single(list []netip.Prefix) (all []netip.Addr, ok bool) {
	for _, p := range list {
		if !p.IsSingleIP() {
			return nil, false
		}
		all = append(all, p.Addr())
	}
	return all, len(list) > 0
}
