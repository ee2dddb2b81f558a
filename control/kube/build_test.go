package kube

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/rogpeppe/go-internal/txtar"

	"tacit.dev/mesh"
)

var update = flag.Bool("update", false, "write the results into testdata")

var labConfig = BuildConfig{TrustDomain: "lab", Namespace: "tacit-system"}

// Each file of testdata holds objects, and what Build makes of them.
func TestBuild(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("%d files, %v", len(paths), err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) { testBuild(t, path) })
	}
}

func testBuild(t *testing.T, path string) {
	a, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	objects, want := archive(t, a)
	got := text(Build(objects, labConfig))
	if *update {
		want.Data = []byte(got)
		if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(string(want.Data), got); diff != "" {
		t.Errorf("(-want +got, or run with -update)\n%s", diff)
	}
}

// Of the ports out of which Services get ports of nodes are known: those that Services have,
// those of kube-proxy, and those at which a pod of a node's network says that it listens,
// whether an API server has filled in its host ports or not.
func TestNodePorts(t *testing.T) {
	o, err := Decode([]byte(`
apiVersion: v1
kind: Pod
metadata: {name: exporter, namespace: default}
spec:
  nodeName: n1
  hostNetwork: true
  containers:
  - ports: [{containerPort: 31000}, {containerPort: 31001, hostPort: 31001, hostIP: 172.30.0.1}, {containerPort: 31002, protocol: UDP}, {containerPort: 9100}]
status: {podIP: 172.30.0.1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: LoadBalancer
  clusterIP: 10.31.0.1
  externalTrafficPolicy: Local
  healthCheckNodePort: 30090
  ports: [{port: 80, nodePort: 30080}]
`))
	if err != nil {
		t.Fatal(err)
	}
	cfg := labConfig
	cfg.NodePorts = mesh.NodePorts{First: 30000, Last: 32767}
	r := Build(o, cfg)
	if len(r.Places) != 1 || r.Places[0].NodePorts != cfg.NodePorts {
		t.Errorf("places %+v", r.Places)
	}
	if diff := cmp.Diff([]mesh.HostPort{{Port: 31000, Target: 31000}, {Port: 31001, Target: 31001}}, r.Workloads[0].HostPorts, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("ports of the host (-want +got):\n%s", diff)
	}
	if s := r.Services[0]; s.HealthPort != 30090 || len(s.NodePorts) != 1 {
		t.Errorf("service %+v", s)
	}
	if diff := cmp.Diff(text(r), text(Build(o.kept(), cfg))); diff != "" {
		t.Errorf("of what a source keeps (-whole +kept):\n%s", diff)
	}
	if r := Build(o, labConfig); len(r.Places) != 0 || len(r.Workloads[0].HostPorts) != 0 {
		t.Errorf("without a range: places %+v, ports %v", r.Places, r.Workloads[0].HostPorts)
	}
}

// What an agent says about its pods comes before what their objects say; but it takes no
// address of a pod whose object has it.
func TestToldAddresses(t *testing.T) {
	o, err := Decode([]byte(`
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: default, uid: uid-a}
spec: {nodeName: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: default, uid: uid-b}
spec: {nodeName: n1}
status: {podIP: 10.1.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: c, namespace: default, uid: uid-c}
spec: {nodeName: n2}
status: {podIP: 10.1.0.3, startTime: "2026-01-01T00:00:00Z"}
---
apiVersion: v1
kind: Pod
metadata: {name: thief, namespace: default, uid: uid-d}
spec: {nodeName: n1}
status: {startTime: "2026-01-02T00:00:00Z"}
`))
	if err != nil {
		t.Fatal(err)
	}
	at := func(text string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(text)} }
	o.Told = map[string][]netip.Addr{"uid-a": at("10.1.0.1"), "uid-b": at("10.1.0.9"), "uid-d": at("10.1.0.3")}
	got := map[string]string{}
	for _, w := range Build(o, labConfig).Workloads {
		got[w.Name] = fmt.Sprint(w.Addresses)
	}
	if diff := cmp.Diff(map[string]string{"a": "[10.1.0.1]", "b": "[10.1.0.9]", "c": "[10.1.0.3]"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Of two pods that claim an address, an agent and an object together are believed; and none
// is if a pod of the mesh is among them and nothing else decides.
func TestClaims(t *testing.T) {
	pod := func(name, more, status string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: default, uid: uid-%[1]s%s}\nspec: {nodeName: n1}\nstatus: {podIP: 10.1.0.1%s}\n---\n", name, more, status)
	}
	const on, deleted = `, labels: {tacit.dev/mesh: "on"}`, `, deletionTimestamp: "2026-01-01T00:01:00Z"`
	const early, late = `, startTime: "2026-01-01T00:00:00Z"`, `, startTime: "2026-01-02T00:00:00Z"`
	node := func(address string) string {
		return "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\nstatus: {addresses: [{type: InternalIP, address: " + address + "}]}\n---\n"
	}
	victim, thief := pod("victim", on, early), pod("thief", "", late)
	for _, row := range []struct {
		name    string
		objects string
		vouched []string
		told    string // of victim
		want    string // who has the address, or contested
		problem string
	}{
		{"an object's word alone", victim + thief, nil, "", "contested", "is contested"},
		{"an agent holds the one", victim + thief, []string{"victim"}, "", "victim", "is not its own"},
		{"its agent says where, too", victim + thief, []string{"victim"}, "10.1.0.1", "victim", "is not its own"},
		{"its agent says it is elsewhere", victim + thief, []string{"victim"}, "10.1.0.2", "thief", ""},
		{"agents hold both", victim + thief, []string{"victim", "thief"}, "", "contested", "is contested"},
		{"neither is in the mesh", pod("victim", "", early) + thief, nil, "", "thief", ""},
		{"the one before is being deleted", pod("victim", on+deleted, early) + thief, nil, "", "thief", ""},
		{"it is being deleted, and there", pod("victim", on+deleted, early) + thief, []string{"victim"}, "", "victim", "is not its own"},
		{"it has finished", strings.Replace(victim, "status: {", "status: {phase: Succeeded, ", 1) + thief, nil, "", "thief", ""},
		{"a node claims it", victim + node("10.1.0.1"), nil, "", "contested", "Node n2"},
		{"a node claims what an agent holds", victim + node("10.1.0.1"), []string{"victim"}, "", "victim", ""},
		{"a pod claims a node's", thief + node("10.1.0.1"), nil, "", "", "Node n2 has it"},
		{"a pod claims a service's", victim + "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: default}\nspec: {clusterIP: 10.1.0.1}\n", []string{"victim"}, "", "", "Service default/s has it"},
	} {
		o, err := Decode([]byte(row.objects))
		if err != nil {
			t.Fatal(row.name, err)
		}
		o.Vouched, o.Told = map[string]bool{}, map[string][]netip.Addr{}
		for _, name := range row.vouched {
			o.Vouched["uid-"+name] = true
		}
		if row.told != "" {
			o.Told["uid-victim"] = []netip.Addr{netip.MustParseAddr(row.told)}
		}
		r := Build(o, labConfig)
		got := ""
		for _, w := range r.Workloads {
			if slices.Contains(w.Addresses, netip.MustParseAddr("10.1.0.1")) {
				got += w.Name
			}
		}
		for _, p := range r.Places {
			if p.Contested {
				got += "contested"
			}
		}
		if got != row.want {
			t.Errorf("%s: %q has the address, want %q", row.name, got, row.want)
		}
		if problems := fmt.Sprint(r.Problems); (row.problem == "") != (len(r.Problems) == 0) || !strings.Contains(problems, row.problem) {
			t.Errorf("%s: problems %s, want %q", row.name, problems, row.problem)
		}
	}
}

// What an agent sees in a pod besides is the pod's where the cluster's ranges have it, and nobody
// else claims it: anybody who may change the network of a pod can give it any address.
func TestOtherAddresses(t *testing.T) {
	const objects = `
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: default, uid: uid-a, labels: {tacit.dev/mesh: "on"}}
spec: {nodeName: n1}
status: {podIP: 10.1.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: default, uid: uid-b}
spec: {nodeName: n1}
status: {podIP: 10.1.0.2}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 10.8.0.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: s, namespace: default}
spec: {clusterIP: 10.9.0.1}
`
	for _, row := range []struct {
		name      string
		a, b      string // what is seen in them
		wantA     string
		contested bool
	}{
		{"in a range", "10.1.0.9", "", "[10.1.0.1 10.1.0.9]", false},
		{"its own one", "10.1.0.1", "", "[10.1.0.1]", false},
		{"outside", "192.0.2.1", "", "[10.1.0.1]", false},
		{"another pod's", "10.1.0.2", "", "[10.1.0.1]", false},
		{"a node's", "10.8.0.1", "", "[10.1.0.1]", false},
		{"a service's", "10.9.0.1", "", "[10.1.0.1]", false},
		{"seen in both", "10.1.0.9", "10.1.0.9", "[10.1.0.1]", true},
		{"its own one is seen in the other", "", "10.1.0.1", "[10.1.0.1]", false},
		{"of the link", "fe80::1", "", "[10.1.0.1]", false},
	} {
		o, err := Decode([]byte(objects))
		if err != nil {
			t.Fatal(err)
		}
		o.Others = make(map[string][]netip.Addr)
		for uid, at := range map[string]string{"uid-a": row.a, "uid-b": row.b} {
			if at != "" {
				o.Others[uid] = []netip.Addr{netip.MustParseAddr(at)}
			}
		}
		cfg := labConfig
		cfg.Ranges = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		r := Build(o, cfg)
		contested := slices.ContainsFunc(r.Places, func(p *mesh.Place) bool { return p.Contested })
		if got := fmt.Sprint(r.Workloads[0].Addresses); got != row.wantA || contested != row.contested || len(r.Workloads) != 2 {
			t.Errorf("%s: %s, contested %v, %d workloads: want %s, %v, 2", row.name, got, contested, len(r.Workloads), row.wantA, row.contested)
		}
		for _, p := range r.Pods {
			if p.Contested {
				t.Errorf("%s: pod %s counts as contested, which has its own address", row.name, p.Name)
			}
		}
	}
}

// archive reads the objects of an archive, and finds its file "want".
func archive(t *testing.T, a *txtar.Archive) (o Objects, want *txtar.File) {
	t.Helper()
	seen := make(map[string]bool)
	for i := range a.Files {
		if a.Files[i].Name == "want" {
			want = &a.Files[i]
			continue
		}
		more, err := Decode(a.Files[i].Data)
		if err != nil {
			t.Fatalf("%s: %v", a.Files[i].Name, err)
		}
		if twice := o.append(more, seen); len(twice) != 0 {
			t.Fatalf("%s: %v stand there twice", a.Files[i].Name, twice)
		}
	}
	if want == nil {
		t.Fatal("no file want")
	}
	return o, want
}

// text is a result as a person reads it.
func text(r Result) string {
	var b strings.Builder
	for _, w := range r.Workloads {
		fmt.Fprintf(&b, "workload %s\n", w.UID)
		fmt.Fprintf(&b, "  node %q addresses %v ready %v host-network %v direct %v\n", w.Node, w.Addresses, w.Ready, w.HostNetwork, w.Direct)
		if w.Listed {
			fmt.Fprintf(&b, "  listed, of %q\n", w.Of)
		} else {
			fmt.Fprintf(&b, "  identity %q\n", w.ID)
		}
		if w.Zone != "" {
			fmt.Fprintf(&b, "  zone %s\n", w.Zone)
		}
		if !w.Listed {
			fmt.Fprintf(&b, "  owner %s %s canonical %s %s\n", w.OwnerKind, w.OwnerName, w.CanonicalName, w.CanonicalRevision)
		}
		for _, p := range w.HostPorts {
			fmt.Fprintf(&b, "  port %d of its node at %v is its port %d\n", p.Port, p.Address, p.Target)
		}
		for _, key := range sortedKeys(w.Services) {
			fmt.Fprintf(&b, "  serves %s %s\n", key, ports(w.Services[key]))
		}
	}
	for _, s := range r.Services {
		fmt.Fprintf(&b, "service %s addresses %v ports %s\n", s.Key(), s.Addresses, ports(s.Ports))
		if s.Reach != "" || s.Affinity != 0 {
			fmt.Fprintf(&b, "  reach %q affinity %v\n", s.Reach, s.Affinity)
		}
		if len(s.External)+len(s.NodePorts) > 0 {
			fmt.Fprintf(&b, "  external %v node ports %v local %v\n", s.External, s.NodePorts, s.NodeLocal)
		}
	}
	for _, p := range r.Places {
		fmt.Fprintf(&b, "place %s node %q addresses %v contested %v ranges %v\n", p.Name, p.Node, p.Addresses, p.Contested, p.Ranges)
	}
	for _, p := range r.Pods {
		fmt.Fprintf(&b, "pod %s %s/%s node %s enroll %v workload %v\n", p.UID, p.Namespace, p.Name, p.Node, p.Enroll, p.Workload != nil)
		for _, e := range p.ExcludeOutbound {
			fmt.Fprintf(&b, "  excludes outbound %s\n", exclusion(e))
		}
		if len(p.ProbePorts) > 0 {
			fmt.Fprintf(&b, "  is called by its kubelet on %v\n", p.ProbePorts)
		}
		for _, port := range p.ExcludeInbound {
			fmt.Fprintf(&b, "  excludes inbound %d\n", port)
		}
	}
	for _, e := range r.Exceptions {
		fmt.Fprintf(&b, "exception %s/%s: %s\n", e.Namespace, e.Name, e.Reason)
	}
	for _, n := range r.Nodes {
		fmt.Fprintf(&b, "node %s tainted %v\n", n.Name, n.Tainted())
	}
	if m := r.Mesh; m.Found {
		fmt.Fprintf(&b, "mesh generation %d enrollment %q namespaces %v\n", m.Generation, m.Policy.Enrollment, sortedKeys(m.Policy.Namespaces))
	}
	fmt.Fprintf(&b, "namespaces %s\n", strings.Join(r.Namespaces, " "))
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	return b.String()
}

func ports(list []mesh.Port) string {
	var texts []string
	for _, p := range list {
		texts = append(texts, fmt.Sprintf("%d→%d", p.Service, p.Target))
	}
	return strings.Join(texts, " ")
}

func exclusion(e mesh.Exclusion) string {
	prefix, port := "any", "any"
	if e.Prefix.IsValid() {
		prefix = e.Prefix.String()
	}
	if e.Port != 0 {
		port = fmt.Sprint(e.Port)
	}
	return prefix + " port " + port
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// The order of the objects says nothing, and Build leaves them as they are.
func TestBuildIsPure(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for _, path := range paths {
		a, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		o, _ := archive(t, a)
		untouched, _ := archive(t, a)
		want := Build(o, labConfig)
		if diff := cmp.Diff(untouched, o); diff != "" {
			t.Fatalf("%s: objects were changed (-before +after)\n%s", path, diff)
		}
		for range 20 {
			shuffle(random, o.Namespaces)
			shuffle(random, o.Pods)
			shuffle(random, o.Services)
			shuffle(random, o.EndpointSlices)
			if diff := cmp.Diff(want, Build(o, labConfig), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Fatalf("%s: (-want +got)\n%s", path, diff)
			}
		}
	}
}

func shuffle[T any](r *rand.Rand, list []T) {
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

func BenchmarkBuild(b *testing.B) {
	file, err := os.ReadFile("testdata/services.txtar")
	if err != nil {
		b.Fatal(err)
	}
	var o Objects
	for _, f := range txtar.Parse(file).Files {
		if f.Name == "want" {
			continue
		}
		for i := range 1000 {
			more, err := Decode([]byte(strings.ReplaceAll(string(f.Data), "namespace: shop", fmt.Sprintf("namespace: shop%d", i))))
			if err != nil {
				b.Fatal(err)
			}
			o.append(more, make(map[string]bool))
		}
	}
	for b.Loop() {
		Build(o, labConfig)
	}
}
