package control

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/wire/xds"
)

// roster is the enrollment of every pod. What is new touches the enrollments that it is about,
// and only those are looked at:
//
//	objects, reports, agents that come and go, time, acknowledgements
//	        │
//	     touched ──step──► stirred: what others are told, or is remembered, is different
//	                          │
//	               remember, update: told
//
// It reads no clock and does no I/O; the reconciling goroutine owns it.
type roster struct {
	log  *slog.Logger
	pods map[string]*enrollment // by UID
	// on are the enrollments by node, at those by the UID of the pod's workload.
	on    map[string]map[*enrollment]bool
	at    map[string]*enrollment
	nodes map[string]kube.Node // those that are objects
	// heard is what each agent said when it connected, by node and UID: it may
	// hold a pod whose object is not here yet.
	heard map[string]map[string]xds.Report
	// connected are nodes whose agent is, away are since when those are not that have pods.
	connected map[string]bool
	away      map[string]time.Time
	gathering bool // nodes gather as yet
	lost      map[string]lost
	// past is what an earlier process remembered, by UID, until its object is here.
	past map[string]memory

	touched, stirred map[*enrollment]bool
	// unkept are those whose state is not saved, gone those that are to be forgotten, by UID.
	unkept map[*enrollment]bool
	gone   map[string]bool
	// withdrawing and spreading wait for nodes, the oldest publication first.
	withdrawing, spreading []awaited
	timers                 timers
	// untold is what the objects say that nodes have not been told.
	untold     pendingWorld
	gonePods   map[string][]string // by node
	namespaces namespaces
	// allowed is who may be signed for, hosts is which workloads nodes have pods of.
	allowed *allowances
	hosts   *hosts
	said    []kube.Said
	counts  counts
	views   map[string]kube.PodView // conditions that pods should show and do not, by UID
	// policed are conditions that policies should show and do not, by NAMESPACE/NAME.
	policed map[string]kube.PolicyView
}

func newRoster(past []memory, log *slog.Logger) *roster {
	r := &roster{
		log:       log,
		pods:      make(map[string]*enrollment),
		on:        make(map[string]map[*enrollment]bool),
		at:        make(map[string]*enrollment),
		nodes:     make(map[string]kube.Node),
		heard:     make(map[string]map[string]xds.Report),
		connected: make(map[string]bool),
		away:      make(map[string]time.Time),
		gathering: true,
		lost:      make(map[string]lost),
		past:      make(map[string]memory, len(past)),
		touched:   make(map[*enrollment]bool),
		stirred:   make(map[*enrollment]bool),
		unkept:    make(map[*enrollment]bool),
		gone:      make(map[string]bool),
		untold:    newPendingWorld(),
		gonePods:  make(map[string][]string),
		allowed:   newAllowances(),
		hosts:     newHosts(),
		counts:    newCounts(),
		views:     make(map[string]kube.PodView),
		policed:   make(map[string]kube.PolicyView),
	}
	for _, m := range past {
		r.past[m.UID] = m
	}
	return r
}

// objects takes in what is different in the objects. The first that come are all objects.
func (r *roster) objects(d kube.Delta, now time.Time) {
	r.untold.add(d.Changes)
	r.police(d, now)
	for _, n := range d.Nodes {
		r.nodes[n.Name] = n
		r.mark(n)
	}
	for _, name := range d.GoneNodes {
		delete(r.nodes, name)
		delete(r.lost, name)
		r.hosts.forget(name)
	}
	for _, uid := range d.GonePods {
		r.end(r.pods[uid])
	}
	for _, p := range d.Pods {
		e := r.pods[p.UID]
		if e != nil && e.pod.Node != p.Node {
			r.leave(e)
			e = nil
		}
		if e == nil {
			e = r.begin(*p, now)
		}
		r.place(e, *p)
		r.touched[e], r.stirred[e] = true, true
	}
	// What is not among the first is gone.
	for uid := range r.past {
		if r.pods[uid] == nil {
			r.gone[uid] = true
		}
	}
	clear(r.past)
}

// police notes what policies should show and do not.
func (r *roster) police(d kube.Delta, now time.Time) {
	for _, key := range d.GonePoliced {
		delete(r.policed, key)
	}
	for _, f := range d.Policed {
		delete(r.policed, f.Key())
		if want, differs := f.Conditions(now); differs {
			r.policed[f.Key()] = kube.PolicyView{Kind: f.Kind, Namespace: f.Namespace, Name: f.Name, Is: f.Shown.Conditions, Want: want}
		}
	}
}

// begin makes the enrollment of a pod that was not known to this process.
func (r *roster) begin(p kube.Pod, now time.Time) *enrollment {
	e := &enrollment{pod: p, state: Outside, word: silent, since: now}
	if m, ok := r.past[p.UID]; ok && m.Node == p.Node {
		e.state = m.State
	}
	if said, ok := r.heard[p.Node][p.UID]; ok {
		e.hear(said)
	}
	r.pods[p.UID] = e
	if r.on[p.Node] == nil {
		r.on[p.Node] = make(map[*enrollment]bool)
		r.miss(p.Node, now)
	}
	r.on[p.Node][e] = true
	return e
}

// place notes the pod as its object is now.
func (r *roster) place(e *enrollment, p kube.Pod) {
	if w := e.pod.Workload; w != nil && r.at[w.UID] == e {
		delete(r.at, w.UID)
	}
	r.hosts.replace(e.hosted, p.Workload)
	e.hosted = p.Workload
	if e.pod = p; p.Workload != nil {
		r.at[p.Workload.UID] = e
	}
}

// end is for a pod whose object is gone. Should it come back, its agent has to speak again.
func (r *roster) end(e *enrollment) {
	if e == nil {
		return
	}
	r.leave(e)
	delete(r.pods, e.pod.UID)
	delete(r.heard[e.pod.Node], e.pod.UID)
	r.gone[e.pod.UID] = true
	r.log.Info("pod gone", "pod", e.pod.Namespace+"/"+e.pod.Name, "uid", e.pod.UID, "node", e.pod.Node, "state", e.state)
}

// leave takes e out of everything but pods.
func (r *roster) leave(e *enrollment) {
	r.place(e, kube.Pod{Pod: e.pod.Pod, Node: e.pod.Node})
	delete(r.touched, e)
	delete(r.stirred, e)
	delete(r.unkept, e)
	delete(r.views, e.pod.UID)
	if delete(r.on[e.pod.Node], e); len(r.on[e.pod.Node]) == 0 {
		delete(r.on, e.pod.Node)
		delete(r.away, e.pod.Node)
	}
	if e.toldNode {
		r.gonePods[e.pod.Node] = append(r.gonePods[e.pod.Node], e.pod.UID)
	}
	r.allowed.replace(&e.allowed, nil)
	r.counts.replace(e, counted{})
	r.say(e, kube.Said{UID: e.pod.UID})
}

// reports takes in all that an agent holds: what is not in it is not captured.
// Of a pod whose object is not here yet it is kept.
func (r *roster) reports(node string, all []xds.Report) {
	held := make(map[string]xds.Report, len(all))
	for _, said := range all {
		held[said.UID] = said
	}
	r.heard[node] = held
	for e := range r.on[node] {
		if said, ok := held[e.pod.UID]; ok {
			e.hear(said)
		} else {
			e.hear(xds.Report{State: xds.Released})
		}
		r.touched[e] = true
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
	r.touched[e] = true
	r.log.Debug("pod reported", "pod", e.pod.Namespace+"/"+e.pod.Name, "node", node, "state", said.State, "reason", said.Reason)
}

// look touches what changes though neither objects nor agents say anything: by time, and
// because nodes know more.
func (r *roster) look(o outlook) {
	for _, t := range r.timers.due(o.now) {
		if t.node != "" {
			r.touchNode(t.node)
		} else if r.pods[t.pod.pod.UID] == t.pod {
			r.touched[t.pod] = true
		}
	}
	for len(r.withdrawing) > 0 && (r.isOver(r.withdrawing[0], func(e *enrollment) uint64 { return e.withdrawn }) || o.acked(r.withdrawing[0].version)) {
		r.withdrawing = r.touchFirst(r.withdrawing)
	}
	for len(r.spreading) > 0 && (r.isOver(r.spreading[0], func(e *enrollment) uint64 { return e.spreading }) || o.applied() >= r.spreading[0].version) {
		r.spreading = r.touchFirst(r.spreading)
	}
}

func (r *roster) touchNode(node string) {
	for e := range r.on[node] {
		r.touched[e] = true
	}
}

// awaited is an enrollment that waits until every node knows a publication.
type awaited struct {
	version uint64
	pod     *enrollment
}

// isOver tells whether nobody waits for that any more.
func (r *roster) isOver(a awaited, waits func(*enrollment) uint64) bool {
	return r.pods[a.pod.pod.UID] != a.pod || waits(a.pod) != a.version
}

func (r *roster) touchFirst(list []awaited) []awaited {
	if e := list[0].pod; r.pods[e.pod.UID] == e {
		r.touched[e] = true
	}
	if len(list) == 1 {
		return nil
	}
	return list[1:]
}

// step steps every enrollment that was touched, and tells whether something is to be told.
func (r *roster) step(o outlook) (changed bool) {
	o.connected = r.connected
	for _, e := range slices.SortedFunc(maps.Keys(r.touched), byUID) {
		before := e.state
		if e.news {
			e.news, r.stirred[e] = false, true
		}
		if e.spread(o.applied) {
			r.stirred[e] = true
		}
		if e.advance(o) {
			r.stirred[e] = true
			r.log.Info("enrollment", "pod", e.pod.Namespace+"/"+e.pod.Name, "uid", e.pod.UID, "node", e.pod.Node,
				"identity", e.pod.ID.String(), "from", before, "state", e.state)
		}
		r.settle(e, o.now)
	}
	clear(r.touched)
	return r.isStirred()
}

func (r *roster) isStirred() bool {
	return len(r.stirred) > 0 || len(r.gone) > 0 || len(r.gonePods) > 0 || r.untold.any() || r.namespaces.differ
}

func byUID(x, y *enrollment) int { return cmp.Compare(x.pod.UID, y.pod.UID) }

// settle brings what follows from e's state up to date, but for what is published.
func (r *roster) settle(e *enrollment, now time.Time) {
	long := r.isAway(e.pod.Node, now)
	if at := e.lookAgain(); at.After(now) && !at.Equal(e.timed) {
		e.timed = at
		r.timers.push(timer{at: at, pod: e})
	}
	said := kube.Said{UID: e.pod.UID}
	if !long {
		said.Told, said.Others, said.Vouched = e.told, e.others, e.word == captured && e.pod.Enroll && e.state.enroll()
	}
	r.say(e, said)
	want := e.condition(now, long)
	r.counts.replace(e, e.counted(want))
	if want.Same(e.pod.Shown) {
		delete(r.views, e.pod.UID)
	} else {
		r.views[e.pod.UID] = kube.PodView{UID: e.pod.UID, Namespace: e.pod.Namespace, Name: e.pod.Name, Is: e.pod.Shown, Want: want}
	}
}

// say tells the reader of objects what the agent of e says: its addresses, where it has told
// them, and whether it holds the pod captured as its labels ask. What one said that is away
// for long may not be true any more.
func (r *roster) say(e *enrollment, said kube.Said) {
	if said.Vouched != e.said.Vouched || !slices.Equal(said.Told, e.said.Told) || !slices.Equal(said.Others, e.said.Others) {
		e.said = said
		r.said = append(r.said, said)
	}
}

// takeSaid is what agents say otherwise than at the last call, the latest of each pod.
func (r *roster) takeSaid() []kube.Said {
	latest := make(map[string]kube.Said, len(r.said))
	for _, s := range r.said {
		latest[s.UID] = s
	}
	r.said = nil
	return slices.Collect(maps.Values(latest))
}

// update is what nodes have to be told, and lets sign for whom they are told.
func (r *roster) update() xds.Update {
	u := xds.Update{Pods: make(map[string]xds.PodChanges)}
	for node, gone := range r.gonePods {
		// One that has come back under its UID is no longer gone.
		gone = slices.DeleteFunc(gone, func(uid string) bool { e := r.pods[uid]; return e != nil && e.pod.Node == node })
		u.Pods[node] = xds.PodChanges{Gone: gone}
	}
	for _, e := range slices.SortedFunc(maps.Keys(r.stirred), byUID) {
		r.allowed.replace(&e.allowed, e.allowance())
		told := e.pod.Pod
		told.Enroll, told.Known = e.state.enroll(), e.everywhere
		c := u.Pods[e.pod.Node]
		c.Pods = append(c.Pods, told)
		u.Pods[e.pod.Node], e.toldNode = c, true
		if w := e.pod.Workload; w != nil && r.at[w.UID] == e {
			r.untold.workloads[w.UID] = w
		}
	}
	u.Changes = r.untold.take()
	for i, w := range u.Workloads {
		if e := r.at[w.UID]; e != nil && e.pod.Workload == w && e.state.mayDial() {
			dressed := *w
			dressed.Enrolled, dressed.Direct, dressed.MarkedPorts = true, e.direct(), e.markedPorts
			if e.state.leaves() {
				dressed.Mode = &mesh.Mode{Inbound: mesh.Permissive, Outbound: mesh.Permissive}
			}
			u.Workloads[i] = &dressed
		}
	}
	u.Namespaces, u.GoneNamespaces = r.namespaces.take()
	return u
}

// published notes which publication withdrew the pods that are withdrawn now, and which
// announces those that are announced.
func (r *roster) published(version uint64) {
	for e := range r.stirred {
		if e.announced(version) {
			r.spreading = append(r.spreading, awaited{version, e})
		}
		if e.state == Withdrawing && e.withdrawn == 0 {
			e.withdrawn = version
			r.withdrawing = append(r.withdrawing, awaited{version, e})
		}
	}
	clear(r.stirred)
	clear(r.gonePods)
}

// remember gives s what must outlive the process: who may be dialled by direct, and
// whose release is under way.
func (r *roster) remember(s saver) {
	for uid := range r.gone {
		s.drop(uid)
	}
	clear(r.gone)
	for e := range r.stirred {
		switch e.state {
		case Announced, Withdrawing, Releasing:
			s.put(memory{UID: e.pod.UID, Namespace: e.pod.Namespace, Name: e.pod.Name, Node: e.pod.Node, State: e.state})
		default:
			s.drop(e.pod.UID)
		}
	}
}

// kept notes whose state s has saved.
func (r *roster) kept(s saver, now time.Time) {
	for e := range r.stirred {
		if e.unkept = !s.keeps(e.pod.UID); e.unkept {
			r.unkept[e] = true
			r.settle(e, now)
		}
	}
	for e := range r.unkept {
		if e.unkept = !s.keeps(e.pod.UID); !e.unkept {
			delete(r.unkept, e)
			r.stirred[e] = true
			r.settle(e, now)
		}
	}
}

// isNode tells whether a node of that name is in the cluster, as far as objects tell of
// nodes.
func (r *roster) isNode(name string) bool {
	_, is := r.nodes[name]
	return is || len(r.nodes) == 0
}

// waiting tells whether any pod waits for nodes.
func (r *roster) waiting() bool { return len(r.withdrawing)+len(r.spreading) > 0 }

// pendingWorld are changes that follow on each other.
type pendingWorld struct {
	workloads map[string]*mesh.Workload
	services  map[string]*mesh.Service
	places    map[string]*mesh.Place
	gone      map[string]bool
	// policies are nil where they are gone: their names may be those of services.
	policies map[string]*mesh.Policy
}

func newPendingWorld() pendingWorld {
	return pendingWorld{
		make(map[string]*mesh.Workload), make(map[string]*mesh.Service), make(map[string]*mesh.Place), make(map[string]bool), make(map[string]*mesh.Policy),
	}
}

func (p pendingWorld) any() bool {
	return len(p.workloads)+len(p.services)+len(p.places)+len(p.gone)+len(p.policies) > 0
}

func (p pendingWorld) add(c mesh.Changes) {
	for _, name := range c.Gone {
		delete(p.workloads, name)
		delete(p.services, name)
		delete(p.places, name)
		p.gone[name] = true
	}
	for _, key := range c.GonePolicies {
		p.policies[key] = nil
	}
	for _, w := range c.Workloads {
		p.workloads[w.UID] = w
		delete(p.gone, w.UID)
	}
	for _, s := range c.Services {
		p.services[s.Key()] = s
		delete(p.gone, s.Key())
	}
	for _, l := range c.Places {
		p.places[l.Name] = l
		delete(p.gone, l.Name)
	}
	for _, x := range c.Policies {
		p.policies[x.Key()] = x
	}
}

// take empties p. What it returns is sorted.
func (p pendingWorld) take() mesh.Changes {
	c := mesh.Changes{
		Workloads: slices.SortedFunc(maps.Values(p.workloads), func(x, y *mesh.Workload) int { return strings.Compare(x.UID, y.UID) }),
		Services:  slices.SortedFunc(maps.Values(p.services), func(x, y *mesh.Service) int { return strings.Compare(x.Key(), y.Key()) }),
		Places:    slices.SortedFunc(maps.Values(p.places), func(x, y *mesh.Place) int { return strings.Compare(x.Name, y.Name) }),
		Gone:      slices.Sorted(maps.Keys(p.gone)),
	}
	for _, key := range slices.Sorted(maps.Keys(p.policies)) {
		if x := p.policies[key]; x != nil {
			c.Policies = append(c.Policies, x)
		} else {
			c.GonePolicies = append(c.GonePolicies, key)
		}
	}
	clear(p.workloads)
	clear(p.services)
	clear(p.places)
	clear(p.gone)
	clear(p.policies)
	return c
}

// namespaces are those in which a pod may have to be enrolled, as nodes know them and as they
// should.
type namespaces struct {
	told, now []string
	differ    bool
}

func (n *namespaces) put(now []string) { n.now, n.differ = now, !slices.Equal(n.told, now) }

// take is what nodes have to be told, and takes it for told.
func (n *namespaces) take() (come, gone []string) {
	missing := func(from, in []string) (list []string) {
		for _, s := range from {
			if _, is := slices.BinarySearch(in, s); !is {
				list = append(list, s)
			}
		}
		return list
	}
	come, gone = missing(n.now, n.told), missing(n.told, n.now)
	n.told, n.differ = n.now, false
	return come, gone
}
