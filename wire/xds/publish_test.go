package xds

import "tacit.dev/mesh"

// Snapshot is all that control tells at one moment, for tests: control itself tells what
// differs.
type Snapshot struct {
	// Workloads, Services, Places and Policies go to every proxy.
	Workloads []*mesh.Workload
	Services  []*mesh.Service
	Places    []*mesh.Place
	Policies  []*mesh.Policy
	// Pods go, by name of the node, to that node's agent and to no other.
	Pods map[string][]mesh.Pod
	// Namespaces go to every agent: those in which a pod may have to be enrolled.
	// What begins elsewhere may begin without an agent.
	Namespaces []string
}

// Publish makes snap all that is told, by what differs. It looks at everything.
func (s *Server) Publish(snap Snapshot) (version uint64) {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	bad := map[string]string{}
	replace := func(t *table, all []resource) edit { return s.edit(t, all, t.others(all), bad) }
	world := mesh.Changes{Workloads: snap.Workloads, Services: snap.Services, Places: snap.Places, Policies: snap.Policies}
	edits := map[mesh.Process]edit{
		everyProxy: replace(s.world, worldResources(world)),
		everyAgent: replace(s.namespaces, namespaceResources(snap.Namespaces)),
	}
	for node := range snap.Pods {
		if node != "" {
			edits[agentOf(node)] = replace(s.podsOf(node), podResources(snap.Pods[node]))
		}
	}
	for _, node := range s.nodesWithPods() {
		if _, is := snap.Pods[node]; !is {
			edits[agentOf(node)] = replace(s.podsOf(node), nil)
		}
	}
	s.tellInvalid(bad)
	s.invalid = bad
	return s.install(edits)
}

func (s *Server) nodesWithPods() (names []string) {
	s.told.RLock()
	defer s.told.RUnlock()
	for name := range s.pods {
		names = append(names, name)
	}
	return names
}

// others names what is there and not among these.
func (t *table) others(these []resource) (names []string) {
	named := make(map[string]bool, len(these))
	for _, r := range these {
		named[r.name] = true
	}
	for name, e := range t.entries {
		if !e.gone && !named[name] {
			names = append(names, name)
		}
	}
	return names
}
