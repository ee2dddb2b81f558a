package control

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

// brokenSaver is a full disk.
type brokenSaver struct {
	saver
	err error
}

func (s *brokenSaver) save() error       { return s.err }
func (s *brokenSaver) keeps(string) bool { return s.err == nil }

// What is not remembered is not published: a restart would take it back, in clear.
func TestNothingIsPublishedThatIsNotRemembered(t *testing.T) {
	m := newModel(t, false)
	m.labels["p1-1"] = true
	m.objects()
	m.reconcile()
	disk := &brokenSaver{m, errors.New("disk full")}
	m.r.store = disk
	m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Captured})
	if wait := m.r.reconcile(m.now); wait > retryAfter || m.server.latest.Workloads[0].Direct {
		t.Errorf("direct %v, next look in %v: want not announced, and another try in %v", m.server.latest.Workloads[0].Direct, wait, retryAfter)
	}
	disk.err = nil
	m.now = m.now.Add(retryAfter)
	m.reconcile()
	if !m.server.latest.Workloads[0].Direct {
		t.Error("not announced when the disk had room again")
	}
}

// Before the objects are known nothing is published: nodes keep what they know.
func TestNothingIsPublishedBeforeTheObjects(t *testing.T) {
	m := newModel(t, false)
	m.server.version = 0
	m.r = &reconciler{inbox: newInbox(), roster: newRoster(nil, m.r.log), server: m.server, store: m, metrics: m.r.metrics, log: m.r.log, published: make(chan struct{})}
	m.r.inbox.putReports("n1", nil)
	m.r.reconcile(m.now)
	if m.server.version != 0 || m.r.started() {
		t.Error("published")
	}
}

// What an agent tells of the ports of a captured pod is told to the nodes, once.
func TestMarkedPortsAreTold(t *testing.T) {
	m := newModel(t, false)
	m.labels["p1-1"] = true
	m.objects()
	m.reconcile()
	for _, marked := range []bool{false, true, true, false} {
		changes := m.server.latest.Workloads[0].MarkedPorts != marked || !m.server.latest.Workloads[0].Direct
		version := m.server.version
		m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Captured, MarkedPorts: marked})
		m.reconcile()
		if w := m.server.latest.Workloads[0]; !w.Direct || w.MarkedPorts != marked {
			t.Errorf("direct %v, marked ports %v: want %v", w.Direct, w.MarkedPorts, marked)
		}
		if (m.server.version != version) != changes {
			t.Errorf("publication %d after %d: want another one: %v", m.server.version, version, changes)
		}
	}
}

// Another pod's object claims the address of a pod of the mesh. Nobody has it, until the
// agent of the one says that it holds it.
func TestAnAgentDecidesAboutAClaim(t *testing.T) {
	m := newModel(t, false)
	var o kube.Objects
	for uid, on := range map[string]string{"p1-1": "on", "p2-2": "off"} {
		o.Pods = append(o.Pods, kube.KeepPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: uid, Namespace: "default", UID: types.UID(uid), Labels: map[string]string{kube.LabelMesh: on}},
			Spec:       corev1.PodSpec{NodeName: nodeOf(uid)},
			Status:     corev1.PodStatus{PodIP: "10.0.0.1"},
		}))
	}
	m.tell(o)
	m.reconcile()
	if s := m.server.latest; len(s.Workloads) != 0 || len(s.Places) != 1 || !s.Places[0].Contested {
		t.Errorf("%+v and %+v: want a contested address, and no pod there", s.Workloads, s.Places)
	}
	if n := testutil.ToFloat64(m.r.metrics.contested); n != 1 {
		t.Errorf("%v contested addresses are counted: want 1", n)
	}
	if c := m.r.roster.pods["p1-1"].condition(m.now, false); c.Reason != kube.Contested {
		t.Errorf("the pod shows %+v", c)
	}
	m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Captured})
	m.reconcile()
	if s := m.server.latest; len(s.Workloads) != 1 || s.Workloads[0].Name != "p1-1" || !s.Workloads[0].Direct || len(s.Places) != 0 {
		t.Errorf("%+v and %+v: want the pod that its agent holds", s.Workloads, s.Places)
	}
	m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Released})
	m.reconcile()
	if s := m.server.latest; len(s.Workloads) != 0 || len(s.Places) != 1 {
		t.Errorf("%+v and %+v: want it contested again", s.Workloads, s.Places)
	}
}

// Acknowledgements alone publish nothing.
func TestNothingNewIsNotPublished(t *testing.T) {
	m := newModel(t, false)
	m.labels["p1-1"] = true
	m.objects()
	m.reconcile()
	version := m.server.version
	m.reconcile()
	m.r.inbox.putReport("n1", xds.Report{UID: "unknown", State: xds.Captured})
	m.reconcile()
	if m.server.version != version {
		t.Errorf("published %d times more", m.server.version-version)
	}
}

// An agent's list may come before the object of a pod of it.
func TestListBeforeObject(t *testing.T) {
	m := newModel(t, false)
	node := nodeOf("p1-1")
	m.r.inbox.putReports(node, []xds.Report{{UID: "p1-1", State: xds.Captured}})
	m.reconcile()
	m.labels["p1-1"] = true
	m.objects()
	m.reconcile()
	if e := m.r.roster.pods["p1-1"]; e.state != Announced {
		t.Errorf("state %s, want announced", e.state)
	}
}

func TestUnprotectedIsTold(t *testing.T) {
	m := newModel(t, false)
	m.labels["p1-1"] = true
	m.objects()
	m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Captured})
	m.reconcile()
	m.r.inbox.putReport(nodeOf("p1-1"), xds.Report{UID: "p1-1", State: xds.Unprotected, Reason: "rules are missing"})
	m.reconcile()
	s := m.r.roster.status(m.r.facts, "lab").Pods[0]
	if !s.Unprotected || s.Captured || !s.Direct || s.Reason != "rules are missing" || s.State != Announced {
		t.Errorf("status %+v, want it unprotected, and announced still", s)
	}
	if got := testutil.ToFloat64(m.r.metrics.unprotected); got != 1 {
		t.Errorf("%v unprotected pods counted, want 1", got)
	}
	if got := testutil.ToFloat64(m.r.metrics.pods.WithLabelValues("announced")); got != 1 {
		t.Errorf("%v announced pods counted, want 1", got)
	}
}

func TestStatusIsJSON(t *testing.T) {
	m := newModel(t, false)
	m.labels["p1-1"] = true
	m.objects()
	m.reconcile()
	b, err := json.Marshal(m.r.roster.status(m.r.facts, "lab").complete(xds.NewServer(xds.ServerConfig{})))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Pods []map[string]any `json:"pods"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	delete(got.Pods[0], "since")
	want := map[string]any{"uid": "p1-1", "namespace": "default", "name": "p1-1", "node": "n2", "identity": "spiffe://lab/ns/default/sa/default",
		"addresses": []any{"10.1.0.1"}, "wanted": true, "enrolled": true, "captured": false, "unprotected": false, "direct": false, "state": "enrolling",
		"reason": "the agent of node n2 is not connected"}
	if diff := cmp.Diff(want, got.Pods[0]); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestStoreRemembers(t *testing.T) {
	storage := folder(t)
	want := memory{UID: "u", Namespace: "n", Name: "p", Node: "n1", State: Withdrawing}
	first := loaded(t, storage)
	first.put(want)
	first.put(memory{UID: "v", State: Announced})
	first.drop("v")
	if err := first.save(); err != nil {
		t.Fatal(err)
	}
	got, err := (&store{storage: storage}).load()
	if diff := cmp.Diff([]memory{want}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func loaded(t *testing.T, storage Storage) *store {
	t.Helper()
	s := &store{storage: storage}
	if _, err := s.load(); err != nil {
		t.Fatal(err)
	}
	return s
}

// brokenShard takes everything but one shard.
type brokenShard struct {
	*StorageFolder
	broken int
	saved  []int
	mu     sync.Mutex // guards saved
}

func (s *brokenShard) Save(shard int, b []byte) error {
	if shard == s.broken {
		return errors.New("too large")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saved = append(s.saved, shard)
	return s.StorageFolder.Save(shard, b)
}

// A shard that cannot be written is tried again, and holds up its own pods only; what does not
// differ is not written.
func TestStoreSavesWhatDiffers(t *testing.T) {
	storage := &brokenShard{StorageFolder: folder(t), broken: shardOf("a")}
	s := loaded(t, storage)
	s.put(memory{UID: "a", State: Announced})
	s.put(memory{UID: "b", State: Announced})
	if err := s.save(); err == nil || s.keeps("a") || !s.keeps("b") || !slices.Equal(storage.saved, []int{shardOf("b")}) {
		t.Errorf("error %v, keeps %v %v, saved %v: want b alone, and to hear of the other", err, s.keeps("a"), s.keeps("b"), storage.saved)
	}
	storage.broken, storage.saved = -1, nil
	s.put(memory{UID: "b", State: Announced})
	if err := s.save(); err != nil || !s.keeps("a") || !slices.Equal(storage.saved, []int{shardOf("a")}) {
		t.Errorf("error %v, keeps a %v, saved %v: want a alone", err, s.keeps("a"), storage.saved)
	}
}

func TestInboxKeepsTheLatest(t *testing.T) {
	b := newInbox()
	b.putReport("n1", xds.Report{UID: "a", State: xds.Captured})
	b.putReports("n1", []xds.Report{{UID: "b", State: xds.Captured}})
	for range 2 * maxReports {
		b.putReport("n1", xds.Report{UID: "c", State: xds.Unprotected})
	}
	b.putReport("n1", xds.Report{UID: "c", State: xds.Captured})
	_, _, nodes := b.take()
	n := nodes["n1"]
	if len(n.list) != 1 || len(n.changes) != 1 || n.changes["c"].State != xds.Captured {
		t.Errorf("list %v, changes %v: want b, and c captured", n.list, n.changes)
	}
}

// A term that begins late knows all objects, and then hears what changes; also that there
// are none.
func TestLatestForALateTerm(t *testing.T) {
	l := &latest{}
	taken := func(b *inbox) (names []string, told bool) {
		events, told, _ := b.take()
		for _, e := range events {
			name := e.Name
			if e.Object == nil {
				name = "-" + name
			}
			names = append(names, name)
		}
		slices.Sort(names)
		return names, told
	}
	space := func(name string) kube.Event {
		return kube.Event{Key: kube.Key{Kind: "Namespace", Name: name}, Object: &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}}
	}
	gone := func(name string) kube.Event { return kube.Event{Key: kube.Key{Kind: "Namespace", Name: name}} }
	first, second := newInbox(), newInbox()
	l.deliver(first)
	if names, told := taken(first); told || l.known() {
		t.Errorf("told of %v before anything is known", names)
	}
	l.put(nil)
	if names, told := taken(first); !told || len(names) != 0 || !l.known() {
		t.Errorf("told %v of %v: want that there is nothing", told, names)
	}
	l.put([]kube.Event{space("a"), space("b"), space("c")})
	l.put([]kube.Event{gone("a")})
	if names, _ := taken(first); !slices.Equal(names, []string{"b", "c"}) {
		t.Errorf("told of %v: want b and c", names)
	}
	l.put([]kube.Event{gone("b"), space("d")})
	l.deliver(second)
	if names, _ := taken(first); !slices.Equal(names, []string{"-b", "d"}) {
		t.Errorf("told of %v: want that b is gone and d there", names)
	}
	l.put([]kube.Event{gone("c")})
	if names, told := taken(second); !told || !slices.Equal(names, []string{"d"}) {
		t.Errorf("the second term is told of %v: want d alone", names)
	}
	if names, told := taken(first); told {
		t.Errorf("the first term is told of %v after its end", names)
	}
}

func TestServerNames(t *testing.T) {
	at := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	names, err := serverNames(at("[fd00:30::1]:15010"), []string{"control", "control"})
	if err != nil || !slices.Equal(names, []string{"control", "fd00:30::1"}) {
		t.Errorf("%q, %v", names, err)
	}
	names, err = serverNames(at("[::]:15010"), []string{"control"})
	if err != nil || !slices.Contains(names, "control") || !slices.Contains(names, "localhost") {
		t.Errorf("%q, %v: want control and localhost", names, err)
	}
}

// control's certificate is made once, and again when half of its life is over.
func TestServerCertificateIsKept(t *testing.T) {
	authority, err := ca.Open(ca.Config{Store: ca.Folder(t.TempDir()), TrustDomain: "lab", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	s := &serverCertificate{ca: authority, names: []string{"127.0.0.1"}}
	first, err := s.get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.get(nil); err != nil || again != first {
		t.Errorf("another certificate at once (%v)", err)
	}
	leaf := *first.Leaf
	leaf.NotBefore = leaf.NotBefore.AddDate(0, 0, -2)
	s.cert.Leaf = &leaf
	if renewed, err := s.get(nil); err != nil || renewed == first {
		t.Errorf("not renewed after half of its life (%v)", err)
	}
}
