package control

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/wire/xds"
)

// roster is the enrolment of every pod. It reads no clock and does no I/O; the
// reconciling goroutine owns it.
type roster struct {
	log    *slog.Logger
	result kube.Result
	pods   map[string]*enrolment // by UID
	nodes  map[string]bool       // those that are objects
	// heard is what each agent said when it connected, by node and UID: it may
	// hold a pod whose object is not here yet.
	heard map[string]map[string]xds.Report
	// away is since when agents are not connected.
	away away
	// gone are pods that are to be forgotten, by UID.
	gone map[string]bool
	// past is what an earlier process remembered, by UID, until its object is here.
	past map[string]memory
}

func newRoster(past []memory, log *slog.Logger) *roster {
	r := &roster{
		log:   log,
		pods:  make(map[string]*enrolment),
		heard: make(map[string]map[string]xds.Report),
		away:  make(away),
		gone:  make(map[string]bool),
		past:  make(map[string]memory, len(past)),
	}
	for _, m := range past {
		r.past[m.UID] = m
	}
	return r
}

// objects takes in what the objects say now.
func (r *roster) objects(result kube.Result, now time.Time) {
	r.result = result
	r.nodes = make(map[string]bool, len(result.Nodes))
	for _, n := range result.Nodes {
		r.nodes[n.Name] = true
	}
	old := r.pods
	r.pods = make(map[string]*enrolment, len(result.Pods))
	for _, p := range result.Pods {
		e := old[p.UID]
		if e == nil || e.pod.Node != p.Node {
			e = r.begin(p, now)
		}
		e.pod = p
		r.pods[p.UID] = e
	}
	for uid, e := range old {
		if r.pods[uid] == nil {
			// Should its object come back, its agent has to speak again.
			delete(r.heard[e.pod.Node], uid)
			r.gone[uid] = true
			r.log.Info("pod gone", "pod", e.pod.Namespace+"/"+e.pod.Name, "uid", uid, "node", e.pod.Node, "state", e.state)
		}
	}
	// The first objects are all objects: what is not among them is gone.
	for uid := range r.past {
		if r.pods[uid] == nil {
			r.gone[uid] = true
		}
	}
	clear(r.past)
}

// begin makes the enrolment of a pod that was not known to this process.
func (r *roster) begin(p kube.Pod, now time.Time) *enrolment {
	e := &enrolment{pod: p, state: Outside, word: silent, since: now}
	if m, ok := r.past[p.UID]; ok && m.Node == p.Node {
		e.state = m.State
	}
	if said, ok := r.heard[p.Node][p.UID]; ok {
		e.hear(said)
	}
	return e
}

// reports takes in all that an agent holds: what is not in it is not captured.
// Of a pod whose object is not here yet it is kept.
func (r *roster) reports(node string, all []xds.Report) {
	held := make(map[string]xds.Report, len(all))
	for _, said := range all {
		held[said.UID] = said
	}
	r.heard[node] = held
	for uid, e := range r.pods {
		if said, ok := held[uid]; e.pod.Node == node && ok {
			e.hear(said)
		} else if e.pod.Node == node {
			e.hear(xds.Report{State: xds.Released})
		}
	}
}

// report takes in one change. An agent is heard about pods of its own node only,
// and about those whose objects are here: it was told of no other.
func (r *roster) report(node string, said xds.Report) {
	delete(r.heard[node], said.UID)
	e := r.pods[said.UID]
	if e == nil || e.pod.Node != node {
		r.log.Debug("report about a pod that is not there", "node", node, "uid", said.UID, "state", said.State)
		return
	}
	e.hear(said)
	r.log.Debug("pod reported", "pod", e.pod.Namespace+"/"+e.pod.Name, "node", node, "state", said.State, "reason", said.Reason)
}

// advance steps every enrolment, and tells whether any changed.
func (r *roster) advance(o outlook) (changed bool) {
	for _, uid := range slices.Sorted(maps.Keys(r.pods)) {
		e := r.pods[uid]
		before := e.state
		if e.news {
			e.news, changed = false, true
		}
		if e.spread(o.applied) {
			changed = true
		}
		if e.advance(o) {
			changed = true
			r.log.Info("enrolment", "pod", e.pod.Namespace+"/"+e.pod.Name, "uid", uid, "node", e.pod.Node,
				"identity", e.pod.ID.String(), "from", before, "state", e.state)
		}
	}
	return changed
}

// published notes which publication withdrew the pods that are withdrawn now, and which
// announces those that are announced.
func (r *roster) published(version uint64) {
	for _, e := range r.pods {
		e.announced(version)
		if e.state == Withdrawing && e.withdrawn == 0 {
			e.withdrawn = version
		}
	}
}

// deadline is when the next state may change though nobody says anything; zero if
// none does.
func (r *roster) deadline() (first time.Time) {
	for _, e := range r.pods {
		if d := e.deadline(); !d.IsZero() && (first.IsZero() || d.Before(first)) {
			first = d
		}
	}
	return first
}

// snapshot is what all nodes should know.
func (r *roster) snapshot() xds.Snapshot {
	s := xds.Snapshot{Workloads: slices.Clone(r.result.Workloads), Services: r.result.Services, Places: r.result.Places, Namespaces: r.result.Namespaces, Pods: make(map[string][]mesh.Pod)}
	enrolled := make(map[*mesh.Workload]*enrolment)
	for _, p := range r.result.Pods {
		e := r.pods[p.UID]
		told := p.Pod
		told.Enrol, told.Known = e.state.enrol(), e.known()
		s.Pods[p.Node] = append(s.Pods[p.Node], told)
		if e.state.mayDial() && p.Workload != nil {
			enrolled[p.Workload] = e
		}
	}
	for i, w := range s.Workloads {
		if e, is := enrolled[w]; is {
			told := *w
			told.Enrolled, told.Direct, told.MarkedPorts = true, e.direct(), e.markedPorts
			s.Workloads[i] = &told
		}
	}
	return s
}

// allowed is who may be signed for on which node.
func (r *roster) allowed() map[allowance]bool {
	set := make(map[allowance]bool)
	for _, e := range r.pods {
		if e.state.mayDial() {
			set[allowance{e.pod.Node, e.pod.ID}] = true
		}
	}
	return set
}

// allowance lets a node have a leaf of an identity.
type allowance struct {
	node string
	id   mesh.ID
}

// remember gives s what must outlive the process: who may be dialled by direct, and
// whose release is under way.
func (r *roster) remember(s saver) {
	for _, e := range r.pods {
		switch e.state {
		case Announced, Withdrawing, Releasing:
			s.put(memory{UID: e.pod.UID, Namespace: e.pod.Namespace, Name: e.pod.Name, Node: e.pod.Node, State: e.state})
		default:
			s.drop(e.pod.UID)
		}
	}
	for uid := range r.gone {
		s.drop(uid)
	}
	clear(r.gone)
}

// kept notes whose state s has saved.
func (r *roster) kept(s saver) {
	for uid, e := range r.pods {
		e.unkept = !s.keeps(uid)
	}
}

// isNode tells whether a node of that name is in the cluster, as far as objects tell of
// nodes.
func (r *roster) isNode(name string) bool { return len(r.nodes) == 0 || r.nodes[name] }

// told are the addresses of pods as their agents say, by UID. What one said that is away
// for long may not be true any more.
func (r *roster) told(now time.Time) map[string][]netip.Addr {
	all := make(map[string][]netip.Addr)
	for uid, e := range r.pods {
		if len(e.told) > 0 && !r.away.long(e.pod.Node, now) {
			all[uid] = e.told
		}
	}
	return all
}

// vouched are the pods, by UID, that their agents hold captured as their labels ask. An agent
// that is away for long vouches for nobody.
func (r *roster) vouched(now time.Time) map[string]bool {
	all := make(map[string]bool)
	for uid, e := range r.pods {
		if e.word == captured && e.pod.Enrol && e.state.enrol() && !r.away.long(e.pod.Node, now) {
			all[uid] = true
		}
	}
	return all
}

// waiting tells whether any pod waits for nodes.
func (r *roster) waiting() bool {
	for _, e := range r.pods {
		if e.state == Withdrawing || e.spreading != 0 {
			return true
		}
	}
	return false
}
