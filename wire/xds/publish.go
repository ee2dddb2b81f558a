package xds

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// edit is what changes in one table.
type edit struct {
	table *table
	set   []*entry
	gone  []string
}

// Update tells every node what of u concerns it, and returns the version that it makes: a
// node that has acknowledged it acts on nothing older. Versions count up, from 1, by what
// changes; an update that changes nothing keeps the version. Before the first one nodes
// are told nothing, so that a control that has not read its source yet takes nothing away.
//
// It costs what changes, and to wake the streams that it concerns. It waits for no node: a
// slow one is later told only the latest. A resource that cannot be encoded is left as it
// was, logged and counted.
func (s *Server) Update(u Update) (version uint64) {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	bad := map[string]string{}
	edits := map[mesh.Process]edit{
		everyProxy: s.edit(s.world, worldResources(u.Changes), slices.Concat(u.Gone, policyNames(u.GonePolicies)), bad),
		everyAgent: s.edit(s.namespaces, namespaceResources(u.Namespaces), u.GoneNamespaces, bad),
	}
	for node, c := range u.Pods {
		if node != "" { // nobody is there to be told
			edits[agentOf(node)] = s.edit(s.podsOf(node), podResources(c.Pods), c.Gone, bad)
		}
	}
	s.tellInvalid(bad)
	return s.install(edits)
}

// To whom an edit is told. A process without a name of a node is that of every node.
var (
	everyProxy = mesh.Process{}
	everyAgent = mesh.Process{Agent: true}
)

func agentOf(node string) mesh.Process { return mesh.Process{Node: node, Agent: true} }

// edit encodes what is to be set. What cannot be encoded is left as it is and told in bad.
// Called with publishing: nobody else changes tables, so they are read without a lock.
func (s *Server) edit(t *table, resources []resource, gone []string, bad map[string]string) edit {
	e := edit{table: t}
	seen := make(map[string]bool, len(resources))
	for _, r := range resources {
		if seen[r.name] {
			bad[r.name] = "the name is there twice"
			continue
		}
		seen[r.name] = true
		next, err := r.entry(s.cfg.Secret, t.typeURL, t.get(r.name))
		if err != nil {
			bad[r.name] = err.Error()
			continue
		}
		delete(s.invalid, r.name)
		if next != nil {
			e.set = append(e.set, next)
		}
	}
	for _, name := range gone {
		delete(s.invalid, name)
		if !seen[name] && t.get(name) != nil {
			seen[name] = true
			e.gone = append(e.gone, name)
		}
	}
	return e
}

// tellInvalid logs what was not known to be invalid before. Called with publishing.
func (s *Server) tellInvalid(bad map[string]string) {
	for name, why := range bad {
		if s.invalid[name] != why {
			s.metrics.invalid.Inc()
			s.cfg.Log.Error("resource not published, left as it was", "resource", name, "error", why)
		}
		s.invalid[name] = why
	}
}

// install makes the edits one publication, and wakes those whom they concern.
func (s *Server) install(edits map[mesh.Process]edit) uint64 {
	s.told.Lock()
	first := s.version == 0
	for to, e := range edits {
		for _, name := range e.gone {
			s.version++
			e.table.put(s.version, &entry{name: name, gone: true})
		}
		for _, one := range e.set {
			s.version++
			e.table.put(s.version, one)
		}
		if len(e.set)+len(e.gone) == 0 {
			delete(edits, to)
		}
	}
	if first {
		s.version = max(s.version, 1)
		s.world.last = s.version // every proxy has to acknowledge the first word
	}
	version := s.version
	s.told.Unlock()
	if first || len(edits) > 0 {
		s.metrics.version.Set(float64(version))
		s.wake(edits, first)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for to := range edits {
		s.tidy(to.Node)
	}
	return version
}

// wake lets those look whom the edits concern.
func (s *Server) wake(edits map[mesh.Process]edit, everybody bool) {
	_, proxies := edits[everyProxy]
	_, agents := edits[everyAgent]
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, n := range s.nodes {
		_, own := edits[agentOf(name)]
		for st := range n.streams {
			if everybody || st.from.Agent && (agents || own) || !st.from.Agent && proxies {
				st.wake()
			}
		}
	}
}

// podsOf finds or makes the table of a node's pods.
func (s *Server) podsOf(node string) *table {
	s.told.Lock()
	defer s.told.Unlock()
	if s.pods[node] == nil {
		s.pods[node] = newTable(podType, s.version)
	}
	return s.pods[node]
}

// tidy forgets the table of a node that has no pods and is not connected: names of nodes
// do not pile up. Called with mu.
func (s *Server) tidy(node string) {
	s.told.Lock()
	defer s.told.Unlock()
	if t := s.pods[node]; t != nil && t.live == 0 && (s.nodes[node] == nil || len(s.nodes[node].opened) == 0) {
		delete(s.pods, node)
	}
}

// resource is one thing to publish. A source that is the same pointer as before is
// not encoded again; nil always is.
type resource struct {
	name   string
	source any
	encode func() (proto.Message, error)
}

// entry encodes r, and returns nil if it is the same as the old one.
func (r resource) entry(secret []byte, typeURL string, old *entry) (*entry, error) {
	if old != nil && r.source != nil && old.source == r.source {
		return nil, nil
	}
	m, err := r.encode()
	if err != nil {
		return nil, err
	}
	next, err := newEntry(secret, typeURL, r.name, m)
	if err != nil {
		return nil, err
	}
	next.source = r.source
	if old != nil && old.hash == next.hash {
		old.source = r.source
		return nil, nil
	}
	return next, nil
}

func worldResources(c mesh.Changes) []resource {
	out := make([]resource, 0, len(c.Workloads)+len(c.Services)+len(c.Places)+len(c.Policies))
	for _, w := range c.Workloads { // most are made for this one time: their pointers say nothing
		out = append(out, resource{w.UID, nil, func() (proto.Message, error) { return acceptable(encodeWorkload(w)) }})
	}
	for _, s := range c.Services {
		out = append(out, resource{s.Key(), s, func() (proto.Message, error) { return acceptable(encodeService(s)) }})
	}
	for _, p := range c.Places {
		out = append(out, resource{p.Name, p, func() (proto.Message, error) { return acceptable(encodePlace(p)) }})
	}
	for _, p := range c.Policies {
		out = append(out, resource{policyPrefix + p.Key(), p, func() (proto.Message, error) { return encodePolicy(p) }})
	}
	return out
}

// acceptable refuses to publish what a node would refuse to take.
func acceptable(m *message.Address, err error) (proto.Message, error) {
	if err == nil {
		_, _, err = decodeAddress(m)
	}
	return m, err
}

func podResources(pods []mesh.Pod) []resource {
	out := make([]resource, 0, len(pods))
	for _, p := range pods {
		out = append(out, resource{p.UID, nil, func() (proto.Message, error) { return encodePod(p) }})
	}
	return out
}
