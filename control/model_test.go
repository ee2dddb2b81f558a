package control

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/wire/xds"
)

// model is a mesh in slow motion: one control, and per node an agent and a proxy
// to which news comes late. The reconciler is the real one.
type model struct {
	t      testing.TB
	saved  []memory
	now    time.Time
	r      *reconciler
	server *fakeServer
	labels map[string]bool // by UID: does it exist, and should it be enrolled
	born   int             // pods so far, for their UIDs
	agents map[string]*modelAgent
	trace  []string
	told   kube.Set // to the present control
}

// fakeServer is a publisher whose nodes take what it published when they like.
type fakeServer struct {
	version uint64
	latest  everything
	proxies map[string]*modelProxy
}

// everything is what was published.
type everything struct {
	Workloads []*mesh.Workload
	Services  []*mesh.Service
	Places    []*mesh.Place
	Pods      map[string][]mesh.Pod
}

// modelProxy dials what its World calls direct.
type modelProxy struct {
	acked  uint64
	direct map[string]bool
}

// modelAgent captures and releases what it was told, one after the other.
type modelAgent struct {
	node     string
	captured map[string]bool
	draining map[string]bool // not redirected any more, but not released
	out      []xds.Report    // said, and not heard yet
	taken    uint64          // the publication it knows
	// coy: it says nothing when it begins to drain, and nothing when it stops
	// draining. A control that restarts meanwhile could not tell.
	coy bool
}

func (s *fakeServer) Update(u xds.Update) uint64 {
	s.version++
	gone := make(map[string]bool)
	for _, name := range u.Gone {
		gone[name] = true
	}
	s.latest.Workloads = replaced(s.latest.Workloads, u.Workloads, gone, func(w *mesh.Workload) string { return w.UID })
	s.latest.Services = replaced(s.latest.Services, u.Services, gone, (*mesh.Service).Key)
	s.latest.Places = replaced(s.latest.Places, u.Places, gone, func(p *mesh.Place) string { return p.Name })
	pods := make(map[string][]mesh.Pod)
	for node, list := range s.latest.Pods {
		pods[node] = list
	}
	for node, c := range u.Pods {
		gone := make(map[string]bool)
		for _, uid := range c.Gone {
			gone[uid] = true
		}
		pods[node] = replaced(pods[node], c.Pods, gone, func(p mesh.Pod) string { return p.UID })
	}
	s.latest.Pods = pods
	return s.version
}

// replaced is had with what is new in the place of what has the same name, without what is
// gone, sorted.
func replaced[T any](had, next []T, gone map[string]bool, name func(T) string) (list []T) {
	for _, v := range next {
		gone[name(v)] = true
	}
	for _, v := range had {
		if !gone[name(v)] {
			list = append(list, v)
		}
	}
	list = append(list, next...)
	slices.SortFunc(list, func(x, y T) int { return strings.Compare(name(x), name(y)) })
	return list
}

func (s *fakeServer) Acked(version uint64) (waiting []string) {
	for node, p := range s.proxies {
		if p.acked < version {
			waiting = append(waiting, node)
		}
	}
	return waiting
}

func (s *fakeServer) Applied(func(string) bool) uint64 {
	oldest := uint64(math.MaxUint64)
	for _, p := range s.proxies {
		oldest = min(oldest, p.acked)
	}
	return oldest
}

func (s *fakeServer) Changed() <-chan struct{} { return nil }

func (s *fakeServer) Nodes() (list []xds.NodeStatus) { return nil }

func (s *fakeServer) Agents() map[string]bool {
	connected := make(map[string]bool)
	for node := range s.proxies {
		connected[node] = true
	}
	return connected
}

func (s *fakeServer) Gathering() bool    { return false }
func (s *fakeServer) Forget(string) bool { return true }

var modelNodes = []string{"n1", "n2"}

func newModel(t testing.TB, coy bool) *model {
	m := &model{t: t, now: time.Unix(0, 0),
		labels: make(map[string]bool), agents: make(map[string]*modelAgent), server: &fakeServer{proxies: make(map[string]*modelProxy)}}
	for _, n := range modelNodes {
		m.agents[n] = &modelAgent{node: n, captured: make(map[string]bool), draining: make(map[string]bool), coy: coy}
		m.server.proxies[n] = &modelProxy{direct: make(map[string]bool)}
	}
	m.restart()
	return m
}

// restart begins another control on the state of the last.
func (m *model) restart() {
	log := slog.New(slog.DiscardHandler)
	m.server.version, m.server.latest = 0, everything{}
	m.r = &reconciler{build: kube.BuildConfig{TrustDomain: "lab"}, inbox: newInbox(), roster: newRoster(m.saved, log),
		server: m.server, store: m, metrics: newMetrics(prometheus.NewRegistry()), log: log, published: make(chan struct{}), ended: make(chan struct{})}
	m.told = nil
	m.objects()
	for _, n := range modelNodes {
		m.server.proxies[n].acked = 0 // expected, until it acknowledges
		a := m.agents[n]
		a.out, a.taken = nil, 0
		var all []xds.Report
		for uid := range a.captured {
			if !a.draining[uid] {
				all = append(all, xds.Report{UID: uid, State: xds.Captured})
			}
		}
		m.r.inbox.putReports(n, all)
	}
	m.reconcile()
}

func (m *model) put(what memory) {
	m.drop(what.UID)
	m.saved = append(m.saved, what)
}

func (m *model) drop(uid string) {
	m.saved = slices.DeleteFunc(slices.Clone(m.saved), func(had memory) bool { return had.UID == uid })
}

func (m *model) save() error           { return nil }
func (m *model) keeps(uid string) bool { return true }

// reconcile has control look, and compares what it has read bit by bit with what the objects
// and the agents say.
func (m *model) reconcile() {
	m.t.Helper()
	m.r.reconcile(m.now)
	if len(m.r.roster.said) > 0 {
		m.t.Fatalf("not read: %+v", m.r.roster.said)
	}
	o := m.told.Objects()
	o.Told, o.Others, o.Vouched = make(map[string][]netip.Addr), make(map[string][]netip.Addr), make(map[string]bool)
	for uid, e := range m.r.roster.pods {
		o.Told[uid], o.Others[uid], o.Vouched[uid] = e.said.Told, e.said.Others, e.said.Vouched
	}
	if want, got := kube.Build(o, m.r.build), m.r.objects.Result(); !reflect.DeepEqual(want, got) {
		m.t.Fatalf("control has read %+v\nthe objects say %+v; steps:\n%s", got, want, strings.Join(m.trace, "\n"))
	}
}

func (m *model) objects() {
	var o kube.Objects
	for _, uid := range slices.Sorted(maps.Keys(m.labels)) {
		on := m.labels[uid]
		value := map[bool]string{true: "on", false: "off"}[on]
		o.Pods = append(o.Pods, kube.KeepPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: uid, Namespace: "default", UID: types.UID(uid), Labels: map[string]string{kube.LabelMesh: value}},
			Spec:       corev1.PodSpec{NodeName: nodeOf(uid)},
			Status:     corev1.PodStatus{PodIP: addressOf(uid)},
		}))
	}
	m.tell(o)
}

// tell has control know these objects, and no others.
func (m *model) tell(o kube.Objects) {
	now := o.Set()
	m.r.inbox.putObjects(m.told.To(now), m.told)
	m.told = now
}

// addressOf is the address of a pod, of which each has its own.
func addressOf(uid string) string {
	var place, n int
	fmt.Sscanf(uid, "p%d-%d", &place, &n)
	return fmt.Sprintf("10.%d.%d.%d", place, n>>8, n&255)
}

func nodeOf(uid string) string { return modelNodes[int(uid[1]-'0')%len(modelNodes)] }

// pod is the pod in one of three places, which it makes if it is empty.
func (m *model) pod(place int) string {
	prefix := fmt.Sprintf("p%d-", place)
	for uid := range m.labels {
		if strings.HasPrefix(uid, prefix) {
			return uid
		}
	}
	m.born++
	return fmt.Sprintf("%s%d", prefix, m.born)
}

// takePods has an agent do what control told last.
func (m *model) takePods(a *modelAgent) {
	if a.taken = m.server.version; a.taken == 0 {
		return
	}
	enroll := make(map[string]bool)
	for _, p := range m.server.latest.Pods[a.node] {
		enroll[p.UID] = p.Enroll
	}
	for _, uid := range slices.Sorted(maps.Keys(enroll)) {
		on := enroll[uid]
		switch {
		case on && a.draining[uid]:
			delete(a.draining, uid)
			if !a.coy {
				a.say(uid, xds.Captured)
			}
		case on && !a.captured[uid]:
			a.captured[uid] = true
			a.say(uid, xds.Captured)
		case !on && a.captured[uid] && !a.draining[uid]:
			a.draining[uid] = true
			if !a.coy {
				a.say(uid, xds.Unprotected)
			}
		}
	}
	for uid := range a.captured {
		if _, ok := enroll[uid]; !ok { // the pod is deleted, its namespace gone
			delete(a.captured, uid)
			delete(a.draining, uid)
		}
	}
}

func (a *modelAgent) say(uid string, s xds.PodState) {
	a.out = append(a.out, xds.Report{UID: uid, State: s})
}

// finish has an agent release what it drains.
func (a *modelAgent) finish() {
	for _, uid := range slices.Sorted(maps.Keys(a.draining)) {
		delete(a.draining, uid)
		delete(a.captured, uid)
		a.say(uid, xds.Released)
	}
}

// idle: it has done and said all that it was told.
func (m *model) idle(a *modelAgent) bool { return a.taken == m.server.version && len(a.out) == 0 }

func (m *model) takeWorld(p *modelProxy) {
	if m.server.version == 0 {
		return
	}
	p.direct = make(map[string]bool)
	for _, w := range m.server.latest.Workloads {
		if w.Direct {
			p.direct[w.Name] = true
		}
	}
	p.acked = m.server.version
}

// check: nobody dials a pod by direct that is not redirected into its proxy, and what has been
// told is what is to be told.
func (m *model) check() {
	m.t.Helper()
	m.checkTold()
	for node, p := range m.server.proxies {
		for pod := range p.direct {
			a := m.agents[nodeOf(pod)]
			if _, exists := m.labels[pod]; exists && (!a.captured[pod] || a.draining[pod]) {
				m.t.Fatalf("node %s dials %s by direct, and it is not captured (state %s); steps:\n%s",
					node, pod, m.r.roster.pods[pod].state, strings.Join(m.trace, "\n"))
			}
		}
	}
}

// checkTold compares what was told, change by change, with the enrollments as they are.
func (m *model) checkTold() {
	m.t.Helper()
	workloads, pods := 0, 0
	for _, e := range m.r.roster.pods {
		pods++
		told := slices.IndexFunc(m.server.latest.Pods[e.pod.Node], func(p mesh.Pod) bool { return p.UID == e.pod.UID && p.Enroll == e.state.enroll() })
		if told < 0 {
			m.t.Fatalf("pod %s, %s, is told as %+v; steps:\n%s", e.pod.UID, e.state, m.server.latest.Pods, strings.Join(m.trace, "\n"))
		}
		if e.pod.Workload == nil {
			continue
		}
		workloads++
		is := slices.IndexFunc(m.server.latest.Workloads, func(w *mesh.Workload) bool {
			return w.UID == e.pod.Workload.UID && w.Direct == e.direct() && w.Enrolled == e.state.mayDial() && (w.Mode != nil) == e.state.leaves()
		})
		if is < 0 {
			m.t.Fatalf("workload of %s, %s, is told as %+v; steps:\n%s", e.pod.UID, e.state, m.server.latest.Workloads, strings.Join(m.trace, "\n"))
		}
	}
	told := 0
	for _, list := range m.server.latest.Pods {
		told += len(list)
	}
	if told != pods || len(m.server.latest.Workloads) != workloads {
		m.t.Fatalf("%d pods and %d workloads are told, want %d and %d; steps:\n%s", told, len(m.server.latest.Workloads), pods, workloads, strings.Join(m.trace, "\n"))
	}
}

// step does one thing at random.
func (m *model) step(random *rand.Rand) string {
	node := modelNodes[random.IntN(len(modelNodes))]
	a, p := m.agents[node], m.server.proxies[node]
	pod := m.pod(1 + random.IntN(3))
	what := random.IntN(100)
	switch {
	case what < 15:
		m.labels[pod] = !m.labels[pod]
		m.objects()
		m.reconcile()
		return "label of " + pod
	case what < 17:
		delete(m.labels, pod)
		m.objects()
		m.reconcile()
		return "deletion of " + pod
	case what < 40:
		m.takePods(a)
		return "pods to " + node
	case what < 65 && len(a.out) > 0:
		m.r.inbox.putReport(node, a.out[0])
		a.out = a.out[1:]
		m.reconcile()
		return "report of " + node
	case what < 80:
		m.takeWorld(p)
		m.reconcile()
		return "world to " + node
	case what < 84:
		a.finish()
		return "end of draining on " + node
	case what < 87 && !a.coy:
		m.restart()
		return "restart of control"
	default:
		// Time passes only for agents that keep up with it.
		for _, a := range m.agents {
			if !m.idle(a) {
				return "nothing"
			}
		}
		m.now = m.now.Add([]time.Duration{restFor, settleAfter}[random.IntN(2)])
		m.reconcile()
		return "a while"
	}
}

// settle lets everybody take and say everything.
func (m *model) settle() {
	for range 12 {
		for _, n := range modelNodes {
			a := m.agents[n]
			m.takePods(a)
			a.finish()
			m.takeWorld(m.server.proxies[n])
			for _, said := range a.out {
				m.r.inbox.putReport(n, said)
				m.reconcile()
			}
			a.out = nil
			m.reconcile()
		}
		m.now = m.now.Add(settleAfter)
		m.reconcile()
	}
}

// No order of events makes anybody dial an uncaptured pod by direct, and in the
// end everybody is as the labels say.
func TestOrderIsKept(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for run := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, run))
		m := newModel(t, run%2 == 1)
		for range 150 {
			m.trace = append(m.trace, m.step(random))
			m.check()
		}
		m.settle()
		m.check()
		checkEnd(t, m)
	}
}

func checkEnd(t *testing.T, m *model) {
	t.Helper()
	for _, pod := range slices.Sorted(maps.Keys(m.labels)) {
		want := Outside
		if m.labels[pod] {
			want = Announced
		}
		e := m.r.roster.pods[pod]
		if e.state != want {
			t.Fatalf("%s, label %v, ends %s (word %s), want %s; steps:\n%s", pod, m.labels[pod], e.state, e.word, want, strings.Join(m.trace, "\n"))
		}
		if a := m.agents[nodeOf(pod)]; a.captured[pod] != m.labels[pod] {
			t.Fatalf("%s, label %v, ends captured %v", pod, m.labels[pod], a.captured[pod])
		}
	}
}
