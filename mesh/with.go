package mesh

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// With returns the World that follows on w when c has happened. It knows also what led to
// pods and services a while before now and leads nowhere any more. It costs what is in c,
// and for each port of a service whose endpoints change the length of their list. w is not
// changed, unless it was made of a Part: that is no World yet, and With makes it another one.
// What c points to is kept: nothing of it may be changed afterwards.
func (w *World) With(c Changes, now time.Time) *World {
	next := *w
	if !w.open {
		next.era++
	}
	next.open = c.Part
	m := &making{World: &next, edits: make(map[servicePort]*edit), touched: make(map[destination]bool), strings: make(map[string]string)}
	for _, name := range c.Gone {
		m.remove(name)
	}
	if len(c.Policies)+len(c.GonePolicies) > 0 {
		next.policyVersion++
	}
	for _, key := range c.GonePolicies {
		m.removePolicy(key)
	}
	for _, p := range c.Policies {
		m.removePolicy(p.Key())
		m.addPolicy(p)
	}
	for _, s := range c.Services {
		m.remove(s.Key())
		m.addService(s)
	}
	for _, p := range c.Places {
		m.remove(p.Name)
		m.addPlace(p)
	}
	for _, wl := range c.Workloads {
		m.remove(wl.UID)
		m.addPeer(m.peerOf(wl))
	}
	for at, e := range m.edits {
		m.changeEndpoints(at, e)
	}
	next.former.note(&next, m.touched, now)
	if w.open && !next.open {
		next.peers.pack(next.era)
		next.pods.owner.pack(next.era)
		next.endpoints.pack(next.era)
		next.kinds.all.pack(next.era)
	}
	return &next
}

// making is a World that nobody else sees yet.
type making struct {
	*World
	edits map[servicePort]*edit
	// touched is what led to something before, or does so now, or both.
	touched map[destination]bool
	// strings are those that Peers share that are made at once, kind is room for one of theirs.
	strings map[string]string
	kind    Kind
}

// edit is what changes in a list of endpoints: whose are other ones, and which are new.
type edit struct {
	uids []string
	with []Endpoint
}

func (e *edit) of(p *Peer) *edit {
	e.uids = append(e.uids, p.UID)
	return e
}

// remove takes away what has the name, whatever it is.
func (m *making) remove(name string) {
	if p, ok := m.peers.get(name); ok {
		m.removePeer(p)
	}
	if s, ok := m.services.get(name); ok {
		m.removeService(s)
	}
	if p, ok := m.places.get(name); ok {
		m.removePlace(p)
	}
}

// peerOf makes a Peer that shares what it can.
func (m *making) peerOf(w *Workload) *Peer {
	spot := w.spot()
	m.kind = w.kind(m.kind.Services[:0])
	return w.peer(
		m.spots.take(m.era, spot.hash(), &spot, (*Spot).same, func(s *Spot) *Spot { return s.copy(m.intern) }),
		m.kinds.take(m.era, m.kind.hash(), &m.kind, (*Kind).same, func(k *Kind) *Kind { return k.copy(m.intern) }))
}

func (m *making) addPeer(p *Peer) {
	m.peers.set(m.era, p.UID, p)
	for _, to := range m.touch(p.leads()) {
		m.pods.add(m.era, to.at, p, byReadiness)
	}
	for _, h := range p.HostPorts {
		m.changeHostPort(hostPort{p.Node, h.Port}, nil, p)
	}
	if p.Mode.isStrict() {
		m.stricts++
	}
	if p.Ready {
		for _, s := range p.Services {
			e := m.editOf(s).of(p)
			e.with = append(e.with, Endpoint{p, s.Target})
		}
	}
}

func (m *making) removePeer(p *Peer) {
	m.peers.del(m.era, p.UID)
	for _, to := range m.touch(p.leads()) {
		m.pods.remove(m.era, to.at, p)
	}
	for _, h := range p.HostPorts {
		m.changeHostPort(hostPort{p.Node, h.Port}, p, nil)
	}
	if p.Mode.isStrict() {
		m.stricts--
	}
	if p.Ready {
		for _, s := range p.Services {
			m.editOf(s).of(p)
		}
	}
	m.spots.drop(m.era, p.Spot.hash(), p.Spot)
	m.kinds.drop(m.era, p.Kind.hash(), p.Kind)
}

// changeHostPort takes a pod from those that have the port, and adds one; either may be nil.
func (m *making) changeHostPort(at hostPort, without, with *Peer) {
	had, _ := m.hostPorts.get(at)
	all := make([]*Peer, 0, len(had)+1)
	for _, p := range had {
		if p != without && p != with {
			all = append(all, p)
		}
	}
	if with != nil {
		i, _ := slices.BinarySearchFunc(all, with, byUID)
		all = slices.Insert(all, i, with)
	}
	if len(all) == 0 {
		m.hostPorts.del(m.era, at)
		return
	}
	m.hostPorts.set(m.era, at, all)
}

// editOf returns what changes in the list of endpoints to which s belongs.
func (m *making) editOf(s Serving) *edit {
	k := servicePort{s.Service, s.Port.Service}
	e := m.edits[k]
	if e == nil {
		e = &edit{}
		m.edits[k] = e
	}
	return e
}

// changeEndpoints makes a list of endpoints anew. A Peer may be in it several times.
func (m *making) changeEndpoints(at servicePort, e *edit) {
	e.with = slices.DeleteFunc(e.with, func(x Endpoint) bool { now, _ := m.peers.get(x.Workload.UID); return now != x.Workload })
	slices.SortStableFunc(e.with, func(a, b Endpoint) int { return byUID(a.Workload, b.Workload) })
	slices.Sort(e.uids)
	had, _ := m.endpoints.get(at)
	all := make([]Endpoint, 0, len(had)+len(e.with))
	for _, uid := range slices.Compact(e.uids) {
		i, _ := slices.BinarySearchFunc(had, uid, func(x Endpoint, uid string) int { return cmp.Compare(x.Workload.UID, uid) })
		all, had = append(all, had[:i]...), had[i:]
		for len(had) > 0 && had[0].Workload.UID == uid {
			had = had[1:]
		}
		for len(e.with) > 0 && e.with[0].Workload.UID == uid {
			all, e.with = append(all, e.with[0]), e.with[1:]
		}
	}
	if all = append(all, had...); len(all) == 0 {
		m.endpoints.del(m.era, at)
		return
	}
	m.endpoints.set(m.era, at, all)
}

func (m *making) addService(s *Service) {
	m.services.set(m.era, s.Key(), s)
	for _, to := range m.touch(wholes(s.Addresses)) {
		m.virtual.add(m.era, to.at, s, byKey)
	}
	for _, to := range m.touch(s.inlets()) {
		m.inlets.add(m.era, to, s, func(a, b *Service) int { return byKey(b, a) })
	}
	if s.HealthPort != 0 {
		count(&m.healthPorts, m.era, s.HealthPort, 1)
	}
}

func (m *making) removeService(s *Service) {
	m.services.del(m.era, s.Key())
	for _, to := range m.touch(wholes(s.Addresses)) {
		m.virtual.remove(m.era, to.at, s)
	}
	for _, to := range m.touch(s.inlets()) {
		m.inlets.remove(m.era, to, s)
	}
	if s.HealthPort != 0 {
		count(&m.healthPorts, m.era, s.HealthPort, -1)
	}
}

func (m *making) addPlace(p *Place) {
	m.places.set(m.era, p.Name, p)
	if of := m.claimsOf(p); of != nil {
		for _, to := range wholes(p.Addresses) {
			of.add(m.era, to.at, p, byName)
		}
	}
	if p.NodePorts != (NodePorts{}) {
		m.portRange.add(m.era, struct{}{}, p, byName)
	}
	for _, r := range p.Ranges {
		m.ranges.change(m.era, r, 1)
	}
	m.changeTrust(p, 1)
}

func (m *making) removePlace(p *Place) {
	m.places.del(m.era, p.Name)
	if of := m.claimsOf(p); of != nil {
		for _, to := range wholes(p.Addresses) {
			of.remove(m.era, to.at, p)
		}
	}
	m.portRange.remove(m.era, struct{}{}, p)
	for _, r := range p.Ranges {
		m.ranges.change(m.era, r, -1)
	}
	m.changeTrust(p, -1)
}

func (m *making) addPolicy(p *Policy) {
	m.policies.set(m.era, p.Key(), p)
	if p.Scope == Named {
		m.named++
	}
	if at, is := p.broad(); is {
		had, _ := m.broad.get(at)
		i, _ := slices.BinarySearchFunc(had, p, byPolicyKey)
		m.broad.set(m.era, at, slices.Insert(slices.Clone(had), i, p))
	}
}

func (m *making) removePolicy(key string) {
	p, ok := m.policies.get(key)
	if !ok {
		return
	}
	m.policies.del(m.era, key)
	if p.Scope == Named {
		m.named--
	}
	if at, is := p.broad(); is {
		had, _ := m.broad.get(at)
		had = slices.DeleteFunc(slices.Clone(had), func(o *Policy) bool { return o == p })
		if len(had) == 0 {
			m.broad.del(m.era, at)
		} else {
			m.broad.set(m.era, at, had)
		}
	}
}

// broad says of whom the policy is, if it is not of who names it.
func (p *Policy) broad() (of string, is bool) {
	switch p.Scope {
	case WholeMesh:
		return "", true
	case WholeNamespace:
		return p.Namespace, true
	}
	return "", false
}

// claimsOf says what the addresses of a place are, nil if they are nothing.
func (m *making) claimsOf(p *Place) *claims[address, *Place] {
	switch {
	case p.Contested:
		return &m.contested
	case p.Node != "":
		return &m.nodes
	}
	return nil
}

// touch notes that something else may lead, or nothing.
func (m *making) touch(all []destination) []destination {
	for _, to := range all {
		m.touched[to] = true
	}
	return all
}

// intern returns the same string for the same string.
func (m *making) intern(s string) string {
	had, ok := m.strings[s]
	if !ok {
		had = strings.Clone(s)
		m.strings[had] = had
	}
	return had
}

// leads is what leads to the Peer by its own addresses.
func (p *Peer) leads() []destination {
	if p.HostNetwork || p.Listed {
		return nil
	}
	return wholes(p.Addresses)
}

// inlets is what leads to the service besides its own addresses.
func (s *Service) inlets() (all []destination) {
	for _, to := range wholes(s.External) {
		for _, p := range s.Ports {
			all = append(all, destination{to.at, p.Service})
		}
	}
	for _, p := range s.NodePorts {
		all = append(all, destination{port: p.Node})
	}
	return all
}

// wholes are all ports of each address.
func wholes(addresses []netip.Addr) (all []destination) {
	for _, x := range addresses {
		if a, ok := addressOf(x); ok {
			all = append(all, destination{at: a})
		}
	}
	return all
}

// byReadiness puts one that is ready behind those that are not.
func byReadiness(a, b *Peer) int {
	if a.Ready != b.Ready {
		if a.Ready {
			return 1
		}
		return -1
	}
	return byUID(a, b)
}

func byUID(a, b *Peer) int { return cmp.Compare(a.UID, b.UID) }

func byName(a, b *Place) int { return cmp.Compare(a.Name, b.Name) }

func byKey(a, b *Service) int { return cmp.Compare(a.Key(), b.Key()) }

func byPolicyKey(a, b *Policy) int { return cmp.Compare(a.Key(), b.Key()) }
