package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

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
