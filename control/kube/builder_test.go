package kube

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tacit.dev/mesh"
)

// Whatever happens to the objects of a cluster, in whatever batches, a Builder knows what
// Build says of the objects as they are; and what it told of that, put together, is the same.
func TestBuilderIsBuild(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	runs := uint64(1000)
	if os.Getenv("TACIT_SOAK") != "" {
		runs = 100_000
	}
	for run := range runs {
		g := &generator{random: rand.New(rand.NewPCG(seed, run))}
		b := newBuilderTest()
		for range 12 {
			events, said := g.batch(b.objects)
			if diff := b.apply(events, said); diff != "" {
				t.Fatalf("run %d (-Build +Builder):\n%s\nlast events: %s\nsaid %+v", run, diff, eventNames(events), said)
			}
		}
	}
}

// Endpoints lead elsewhere when their pod is on another node, or its object has another
// address than before, though others see the pod where it was.
func TestBuilderFollowsPodsOfEndpoints(t *testing.T) {
	const objects = `
apiVersion: v1
kind: Service
metadata: {name: s, namespace: a}
spec: {clusterIP: 10.9.0.1, internalTrafficPolicy: Local, ports: [{name: web, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s-1, namespace: a, labels: {kubernetes.io/service-name: s}}
ports: [{name: web, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], targetRef: {kind: Pod, name: p}, conditions: {ready: true}}
- {addresses: [10.1.0.2], targetRef: {kind: Pod, name: q}, conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: a, uid: up}
spec: {nodeName: n1}
status: {podIP: 10.1.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: q, namespace: a, uid: uq}
spec: {nodeName: n2}
status: {podIP: 10.1.0.2}
`
	o, err := Decode([]byte(objects))
	if err != nil {
		t.Fatal(err)
	}
	b := newBuilderTest()
	check := func(what string, events []Event, said ...Said) {
		t.Helper()
		if diff := b.apply(events, said); diff != "" {
			t.Fatalf("%s (-Build +Builder):\n%s", what, diff)
		}
	}
	check("at first", o.Set().Events(), Said{UID: "up", Told: []netip.Addr{netip.MustParseAddr("10.1.0.7")}})
	changed := func(name string, change func(*PodObject)) []Event {
		k := Key{"Pod", "a", name}
		p := *b.objects[k].(*PodObject)
		change(&p)
		return []Event{{k, &p}}
	}
	check("on another node", changed("q", func(p *PodObject) { p.Spec.NodeName = "n1" }))
	check("at another address by its object", changed("p", func(p *PodObject) { p.Status.PodIP = "10.1.0.3" }))
}

// What nothing is left of is forgotten.
func TestBuilderForgets(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for run := range uint64(50) {
		g := &generator{random: rand.New(rand.NewPCG(seed, run))}
		b := newBuilderTest()
		for range 10 {
			events, said := g.batch(b.objects)
			b.apply(events, said)
		}
		for uid := range b.said {
			b.apply(nil, []Said{{UID: uid}})
		}
		for k := range maps.Clone(b.objects) {
			b.apply([]Event{{Key: k}}, nil)
		}
		b.builder.Problems()
		x := b.builder
		for what, n := range map[string]int{
			"said": len(x.said), "pods": len(x.pods), "spaces": len(x.spaces), "nodes": len(x.nodes), "services": len(x.services), "sliced": len(x.sliced),
			"addresses": len(x.addresses), "uids": len(x.uids), "range asked": len(x.rangeAsked), "disputes": len(x.disputes), "policed": len(x.policed), "peered": len(x.peered), "counted": x.counts.all + x.counts.outside, "enrolling": len(x.enrolling),
			"exceptions": len(x.exceptions), "told": len(x.tally.at), "told by namespace": len(x.tally.spaces), "ranges": len(x.ranges.count) + len(x.ranges.lengths),
		} {
			if n != 0 {
				t.Errorf("run %d: %d %s are left of nothing", run, n, what)
			}
		}
	}
}

// builderTest is a Builder, the objects that it should know, and what somebody knows who
// heard all that it told.
type builderTest struct {
	builder     *Builder
	objects     Set
	said        map[string]Said
	beforeModes *Modes
	before      Policy
	workloads   map[string]*mesh.Workload
	services    map[string]*mesh.Service
	places      map[string]*mesh.Place
	policies    map[string]*mesh.Policy
	policed     map[string]PolicyFacts
	pods        map[string]*Pod
	nodes       map[string]Node
	// copies are the workloads as they were when they were told.
	copies map[string]mesh.Workload
}

func newBuilderTest() *builderTest {
	return &builderTest{
		builder: NewBuilder(labConfig), objects: make(Set), said: make(map[string]Said), workloads: make(map[string]*mesh.Workload),
		services: make(map[string]*mesh.Service), places: make(map[string]*mesh.Place), policies: make(map[string]*mesh.Policy), policed: make(map[string]PolicyFacts), pods: make(map[string]*Pod), nodes: make(map[string]Node),
		copies: make(map[string]mesh.Workload),
	}
}

// apply returns what differs then.
func (b *builderTest) apply(events []Event, said []Said) string {
	b.objects.Apply(events)
	for _, s := range said {
		if b.said[s.UID] = s; len(s.Told)+len(s.Others) == 0 && !s.Vouched {
			delete(b.said, s.UID)
		}
	}
	had := b.builder.Result()
	d := b.builder.Apply(events, said)
	o := b.objects.Objects()
	o.Told, o.Others, o.Vouched = make(map[string][]netip.Addr), make(map[string][]netip.Addr), make(map[string]bool)
	for uid, s := range b.said {
		o.Told[uid], o.Others[uid], o.Vouched[uid] = s.Told, s.Others, s.Vouched
	}
	cfg := labConfig
	cfg.Before, cfg.BeforeModes = b.before, b.beforeModes
	want, got := Build(o, cfg), b.builder.Result()
	b.before, b.beforeModes = want.Mesh.Policy, &want.Mesh.Modes
	if diff := b.diff(want, got); diff != "" {
		return diff
	}
	if diff := b.hear(d); diff != "" {
		return diff
	}
	return b.compare(got) + b.lazy(d, had, got)
}

func (b *builderTest) diff(want, got Result) string {
	if reflect.DeepEqual(want, got) {
		return ""
	}
	return cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})) + "\n(nothing may also be empty and not nil)"
}

// hear takes in a delta, and tells if something in it is no news.
func (b *builderTest) hear(d Delta) string {
	for _, uid := range d.Gone {
		if b.workloads[uid] == nil && b.services[uid] == nil && b.places[uid] == nil {
			return "gone, and was not there: " + uid
		}
		delete(b.workloads, uid)
		delete(b.copies, uid)
		delete(b.services, uid)
		delete(b.places, uid)
	}
	for _, w := range d.Workloads {
		if reflect.DeepEqual(b.workloads[w.UID], w) {
			return "told again: " + w.UID
		}
		c := *w
		c.Services = maps.Clone(w.Services)
		b.workloads[w.UID], b.copies[w.UID] = w, c
	}
	for _, s := range d.Services {
		if reflect.DeepEqual(b.services[s.Key()], s) {
			return "told again: " + s.Key()
		}
		b.services[s.Key()] = s
	}
	for _, p := range d.Places {
		if reflect.DeepEqual(b.places[p.Name], p) {
			return "told again: " + p.Name
		}
		b.places[p.Name] = p
	}
	for _, key := range d.GonePoliced {
		delete(b.policed, key)
	}
	for _, f := range d.Policed {
		b.policed[f.Key()] = f
	}
	for _, key := range d.GonePolicies {
		if b.policies[key] == nil {
			return "gone, and was not there: policy " + key
		}
		delete(b.policies, key)
	}
	for _, p := range d.Policies {
		if reflect.DeepEqual(b.policies[p.Key()], p) {
			return "told again: policy " + p.Key()
		}
		b.policies[p.Key()] = p
	}
	for _, uid := range d.GonePods {
		delete(b.pods, uid)
	}
	for _, p := range d.Pods {
		if had := b.pods[p.UID]; had != nil && had.Workload == p.Workload && reflect.DeepEqual(had, p) {
			return "told again: pod " + p.UID
		}
		b.pods[p.UID] = p
	}
	for _, name := range d.GoneNodes {
		delete(b.nodes, name)
	}
	for _, n := range d.Nodes {
		b.nodes[n.Name] = n
	}
	return ""
}

// compare tells if somebody who heard everything knows something else. Pointers are the same,
// and what they point to is as it was told.
func (b *builderTest) compare(r Result) string {
	if len(r.Workloads) != len(b.workloads) || len(r.Services) != len(b.services) || len(r.Places) != len(b.places) || len(r.Pods) != len(b.pods) || len(r.Nodes) != len(b.nodes) {
		return fmt.Sprintf("told of %d workloads, %d services, %d places, %d pods, %d nodes: want %d, %d, %d, %d, %d",
			len(b.workloads), len(b.services), len(b.places), len(b.pods), len(b.nodes), len(r.Workloads), len(r.Services), len(r.Places), len(r.Pods), len(r.Nodes))
	}
	for _, w := range r.Workloads {
		if b.workloads[w.UID] != w || !reflect.DeepEqual(b.copies[w.UID], *w) {
			return fmt.Sprintf("told %+v\nwhich was %+v\nis %+v", b.workloads[w.UID], b.copies[w.UID], w)
		}
	}
	for _, s := range r.Services {
		if b.services[s.Key()] != s {
			return fmt.Sprintf("told %+v, is %+v", b.services[s.Key()], s)
		}
	}
	for _, p := range r.Places {
		if b.places[p.Name] != p {
			return fmt.Sprintf("told %+v, is %+v", b.places[p.Name], p)
		}
	}
	if len(r.Policies) != len(b.policies) {
		return fmt.Sprintf("told of %d policies: want %d", len(b.policies), len(r.Policies))
	}
	if len(r.Policed) != len(b.policed) {
		return fmt.Sprintf("told what to show of %d policies: want %d", len(b.policed), len(r.Policed))
	}
	for _, f := range r.Policed {
		if !reflect.DeepEqual(b.policed[f.Key()], f) {
			return fmt.Sprintf("told to show %+v, is %+v", b.policed[f.Key()], f)
		}
	}
	for _, p := range r.Policies {
		if b.policies[p.Key()] != p {
			return fmt.Sprintf("told %+v, is %+v", b.policies[p.Key()], p)
		}
	}
	for _, p := range r.Pods {
		if told := b.pods[p.UID]; told == nil || told.Workload != p.Workload || !reflect.DeepEqual(*told, p) {
			return fmt.Sprintf("told %+v, is %+v", told, p)
		}
	}
	for _, n := range r.Nodes {
		if !reflect.DeepEqual(b.nodes[n.Name], n) {
			return fmt.Sprintf("told %+v, is %+v", b.nodes[n.Name], n)
		}
	}
	return ""
}

// lazy tells if something differs, and the delta does not say so.
func (b *builderTest) lazy(d Delta, had, now Result) (wrong string) {
	for _, row := range []struct {
		what     string
		had, now any
		told     bool
	}{
		{"the Mesh", had.Mesh, now.Mesh, d.Mesh},
		{"namespaces", had.Namespaces, now.Namespaces, d.Namespaces},
		{"problems", had.Problems, now.Problems, d.Problems},
		{"untold problems", had.Untold, now.Untold, d.Problems},
		{"exceptions", had.Exceptions, now.Exceptions, d.Exceptions},
		{"disputed addresses", had.Disputed, now.Disputed, d.Disputed},
	} {
		if !row.told && !reflect.DeepEqual(row.had, row.now) {
			wrong += fmt.Sprintf("not told that %s differ: %+v, before %+v\n", row.what, row.now, row.had)
		}
	}
	return wrong
}

// generator makes objects of few names and addresses, so that they meet often.
type generator struct{ random *rand.Rand }

func (g *generator) batch(known Set) (events []Event, said []Said) {
	now := make(map[Key]Event)
	for range 1 + g.random.IntN(1+g.random.IntN(12)) {
		e := g.event(known)
		now[e.Key] = e
	}
	for g.is(3) {
		said = append(said, g.said())
	}
	slices.SortFunc(said, func(x, y Said) int { return strings.Compare(x.UID, y.UID) })
	said = slices.CompactFunc(said, func(x, y Said) bool { return x.UID == y.UID })
	return slices.Collect(maps.Values(now)), said
}

// is tells, once in n times.
func (g *generator) is(n int) bool { return g.random.IntN(n) == 0 }

func (g *generator) of(list ...string) string { return list[g.random.IntN(len(list))] }

func (g *generator) namespace() string { return g.of("a", "a", "a", "b", "b", "kube-system") }

func (g *generator) podAddress() string {
	return fmt.Sprintf("10.1.0.%d", 1+g.random.IntN(5))
}

func (g *generator) anyAddress() string {
	return g.of(g.podAddress(), g.podAddress(), g.podAddress(), g.serviceAddress(), g.nodeAddress(), "192.0.2.1", "fd00::1", "nonsense")
}

func (g *generator) serviceAddress() string { return fmt.Sprintf("10.9.0.%d", 1+g.random.IntN(3)) }
func (g *generator) nodeAddress() string    { return fmt.Sprintf("10.8.0.%d", 1+g.random.IntN(3)) }

// event changes an object that is there as often as it makes a new one.
func (g *generator) event(known Set) Event {
	var o metav1.Object
	switch n := g.random.IntN(26); {
	case n >= 23:
		o = g.peer()
	case n >= 20:
		o = g.policy()
	case n < 9:
		o = g.pod()
	case n < 11:
		o = g.space()
	case n < 13:
		o = g.node()
	case n < 15:
		o = g.service()
	case n < 18:
		o = g.slice()
	case n < 19:
		o = &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: g.of("x", "y")}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{g.of("10.9.0.0/16", "10.1.0.0/24", "0.0.0.0/0", "?")}}}
	default:
		o = &Mesh{ObjectMeta: metav1.ObjectMeta{Name: g.of(MeshName, MeshName, "other"), Generation: g.random.Int64N(3)},
			Spec: MeshSpec{Enrollment: g.of("", "", Labeled, All, None, "odd"), Namespaces: []string{g.of("a", "b", "kube-system")}, NamespaceSelector: g.selector(),
				Revoked: []string{g.of("a/x", "a/y", "spiffe://lab/ns/a/sa/x", "odd")}, MaxConnectionAge: g.of("", "1h", "odd"), Mode: g.of("", "", PermissiveMode, StrictMode, "odd")}}
		if g.is(2) {
			o.(*Mesh).Spec.Outbound = &MeshOutbound{Mode: g.of("", StrictMode, "odd"), Outside: g.of("", OutsideListed, "odd"), Allowed: []string{g.of("10.9.0.1:443", "odd")}}
		}
		if g.is(2) {
			o.(*Mesh).Spec.Exceptions = []MeshException{{Namespace: g.namespace(), Workload: g.of("", "p1", "p2"), Selector: map[string]string{"app": g.of("1", "2")}, Ports: []int32{80}, From: []string{g.of("10.8.0.0/16", "odd")}[:g.random.IntN(2)]}}
		}
	}
	k, _ := keyOf(o)
	if g.is(5) {
		return Event{Key: k}
	}
	if p, is := known[k].(*PodObject); is && g.is(2) {
		o = g.changed(p)
	}
	return Event{k, o}
}

// selector selects namespaces: some, all, none, or it is none.
func (g *generator) selector() *metav1.LabelSelector {
	operator := metav1.LabelSelectorOperator(g.of("Exists", "DoesNotExist", "odd"))
	return []*metav1.LabelSelector{nil, nil, {}, {MatchLabels: map[string]string{LabelMesh: "on"}},
		{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: LabelMesh, Operator: operator}}}}[g.random.IntN(5)]
}

// changed is the same pod with one thing about it different.
func (g *generator) changed(p *PodObject) *PodObject {
	other, like := *p, g.pod()
	q := &other
	switch g.random.IntN(9) {
	case 0:
		q.Status.Conditions = like.Status.Conditions
	case 1:
		q.Labels = like.Labels
	case 2:
		q.DeletionTimestamp = like.DeletionTimestamp
	case 3:
		q.Status.PodIP = like.Status.PodIP
	case 4:
		q.Status.Phase = like.Status.Phase
	case 5:
		q.Annotations = like.Annotations
	case 6:
		q.UID = like.UID
	case 7:
		q.Spec.NodeName = like.Spec.NodeName
	case 8:
		q.Spec.HostNetwork = like.Spec.HostNetwork
	}
	return q
}

func (g *generator) labels(more ...string) map[string]string {
	labels := make(map[string]string)
	if g.is(2) {
		labels[LabelMesh] = g.of("on", "on", "off", "odd")
	}
	if g.is(5) {
		labels[LabelIstio] = g.of("ambient", "none", "odd")
	}
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	if g.is(40) {
		for i := range maxPodLabels + 1 {
			labels[fmt.Sprint("l", i)] = ""
		}
	}
	return labels
}

// policy is for a namespace, for some of its pods, or for who serves a service; those of tacit
// are for the whole mesh.
func (g *generator) policy() *AuthorizationPolicy {
	p := &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: g.of("a", "a", "b", labConfig.Namespace), Name: g.of("x", "y", "z"), Generation: g.random.Int64N(3)}}
	var fields []string
	if g.is(2) {
		fields = append(fields, `"selector":{"matchLabels":`+g.of(`{"app":"1"}`, `{"app":"2"}`, `{"app":"1","tacit.dev/mesh":"on"}`, `{}`, `{"*":""}`)+`}`)
	}
	if g.is(4) {
		fields = append(fields, `"targetRefs":[{"kind":"Service","name":"`+g.of("s1", "s2", "s3")+`"}`+g.of("", `,{"kind":"Gateway","name":"g"}`, `,{"kind":"Service","name":"s2"}`)+`]`)
	}
	fields = append(fields, `"action":"`+g.of("ALLOW", "DENY", "", "AUDIT", "CUSTOM", "?")+`"`)
	if g.is(2) {
		fields = append(fields, `"rules":[{"to":[{"operation":{`+g.of(`"ports":["80"]`, `"methods":["GET"]`, ``, `"ports":["x"]`)+`}}]}]`)
	}
	p.Spec = json.RawMessage("{" + strings.Join(fields, ",") + "}")
	if g.is(4) {
		p.Annotations = map[string]string{AnnotationDryRun: g.of("true", "false", "?")}
	}
	return p
}

// peer is for a namespace, or for some of its pods; those of tacit are for the whole mesh.
func (g *generator) peer() *PeerAuthentication {
	p := &PeerAuthentication{ObjectMeta: metav1.ObjectMeta{
		Namespace: g.of("a", "a", "b", labConfig.Namespace), Name: g.of("x", "y", "z"), Generation: g.random.Int64N(3),
		CreationTimestamp: metav1.Unix(g.random.Int64N(3), 0),
	}}
	mode := func() string {
		return `{"mode":"` + g.of("STRICT", "PERMISSIVE", "DISABLE", "UNSET", "", "?") + `"}`
	}
	var fields []string
	if g.is(2) {
		fields = append(fields, `"selector":{"matchLabels":`+g.of(`{"app":"1"}`, `{"app":"2"}`, `{}`)+`}`)
	}
	if g.is(3) {
		fields = append(fields, `"portLevelMtls":{"`+g.of("80", "81", "x")+`":`+mode()+`}`)
	}
	fields = append(fields, `"mtls":`+g.of(mode(), mode(), "null"))
	if g.is(9) {
		fields = append(fields, `"newer":1`)
	}
	p.Spec = json.RawMessage("{" + strings.Join(fields, ",") + "}")
	return p
}

func (g *generator) pod() *PodObject {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: g.namespace(), Name: g.of("p1", "p2", "p3"), UID: types.UID(g.of("u1", "u2", "u3", "u4", "u5", "u6", "")), Labels: g.labels("app", g.of("1", "2", "3")),
		},
		Spec:   corev1.PodSpec{NodeName: g.of("n1", "n1", "n2", "n3", ""), ServiceAccountName: g.of("", "sa", "sa", "sa", "not/one")},
		Status: corev1.PodStatus{PodIP: g.anyAddress()},
	}
	if g.is(6) {
		p.Spec.HostNetwork, p.Status.PodIP = true, g.nodeAddress()
	}
	if g.is(5) {
		p.Annotations = map[string]string{AnnotationOutboundMode: g.of("", StrictMode, PermissiveMode, "odd"), AnnotationOutboundAllowed: g.of("", "443", "x"), AnnotationAdmitNodes: g.of("", "80", "z")}
	}
	if g.is(4) {
		p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}, {IP: "fd00::" + g.of("1", "2")}}
	}
	if g.is(6) {
		p.Status.Phase = corev1.PodSucceeded
	}
	if g.is(5) {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(9, 0)}
	}
	if g.is(2) {
		p.Status.StartTime = &metav1.Time{Time: time.Unix(g.random.Int64N(3), 0)}
	}
	if g.is(2) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
	}
	if g.is(4) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: ConditionProtected, Status: corev1.ConditionTrue})
	}
	if g.is(4) {
		p.Annotations = map[string]string{AnnotationExcludeOutbound: g.of("80", "x", "10.0.0.1:80,y"), AnnotationExcludeInbound: g.of("", "80", "z")}
	}
	if g.is(4) {
		p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 80, HostPort: 8080}}}}
	}
	return KeepPod(p)
}

func (g *generator) space() *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: g.namespace(), Labels: g.labels()}}
	if g.is(3) {
		n.Annotations = map[string]string{AnnotationOutboundMode: g.of("", StrictMode, PermissiveMode, "odd"), AnnotationOutboundAllowed: g.of("", "443", "x")}
	}
	return n
}

func (g *generator) node() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: g.of("n1", "n2", "n3"), Labels: map[string]string{corev1.LabelTopologyZone: g.of("", "z1", "z2")}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: g.of(g.nodeAddress(), g.nodeAddress(), g.podAddress())}}
	n.Spec.PodCIDR = g.of("10.1.0.0/24", "10.1.0.0/24", "10.2.0.0/24", "", "0.0.0.0/1")
	if g.is(3) {
		n.Spec.Taints = []corev1.Taint{{Key: TaintNotReady}}
	}
	if g.is(3) {
		n.Annotations = map[string]string{AnnotationLost: g.of("once", "twice")}
	}
	return n
}

func (g *generator) service() *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: g.of("a", "b"), Name: g.of("s1", "s2")}}
	s.Spec.ClusterIP = g.of(g.serviceAddress(), g.serviceAddress(), g.podAddress(), "None")
	s.Spec.Ports = []corev1.ServicePort{{Name: "web", Port: 80, TargetPort: intstr.FromInt(8080)}}
	if g.is(2) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "more", Port: 81, NodePort: 30081})
	}
	if g.is(8) {
		s.Spec.Type = corev1.ServiceTypeExternalName
	}
	if g.is(4) {
		local := corev1.ServiceInternalTrafficPolicyLocal
		s.Spec.InternalTrafficPolicy = &local
	}
	if g.is(8) {
		s.Spec.ExternalIPs = slices.Repeat([]string{"192.0.2.9"}, maxExternal+1)
	}
	return s
}

func (g *generator) slice() *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: g.of("a", "b"), Name: g.of("e1", "e2", "e3"), Labels: map[string]string{discoveryv1.LabelServiceName: g.of("s1", "s1", "s2", "s3")},
	}}
	for _, name := range []string{"web", g.of("more", "other")} {
		port := int32(8000 + g.random.IntN(2))
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	for range g.random.IntN(4) {
		end := discoveryv1.Endpoint{Addresses: []string{g.anyAddress()}}
		if g.is(2) {
			end.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: g.of("p1", "p2", "p3"), Namespace: g.of("", "a", "b"), UID: types.UID(g.of("", "", "u1", "u2"))}
		}
		if g.is(2) {
			end.Conditions = discoveryv1.EndpointConditions{Ready: new(g.is(2)), Serving: new(g.is(2)), Terminating: new(g.is(2))}
		}
		s.Endpoints = append(s.Endpoints, end)
	}
	return s
}

func (g *generator) said() Said {
	s := Said{UID: g.of("u1", "u2", "u3", "u4", "u5", "u6"), Vouched: g.is(2)}
	if g.is(2) {
		s.Told = []netip.Addr{netip.MustParseAddr(g.podAddress())}
	}
	for g.is(2) {
		if a, err := netip.ParseAddr(g.anyAddress()); err == nil && !slices.Contains(s.Others, a) {
			s.Others = append(s.Others, a)
		}
	}
	return s
}
