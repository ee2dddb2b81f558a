package kube

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// boundsPod is a running pod with two annotations.
func boundsPod(namespace string, n int, outbound, inbound string) *corev1.Pod {
	name := fmt.Sprintf("p%d", n)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: types.UID(namespace + name), Labels: map[string]string{LabelMesh: "on"},
			Annotations: map[string]string{AnnotationExcludeOutbound: outbound, AnnotationExcludeInbound: inbound},
		},
		Spec:   corev1.PodSpec{NodeName: "n1"},
		Status: corev1.PodStatus{PodIP: fmt.Sprintf("10.%d.%d.%d", 1+n>>16, n>>8&255, n&255)},
	}
}

// whole has all of a pod, as if it had not been bounded before it was read.
func whole(p *corev1.Pod) *PodObject {
	return &PodObject{
		ObjectMeta: p.ObjectMeta,
		Spec: podSpec{NodeName: p.Spec.NodeName, ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork,
			InitContainers: p.Spec.InitContainers, Containers: p.Spec.Containers},
		Status: podStatus{Phase: p.Status.Phase, StartTime: p.Status.StartTime, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs, Conditions: p.Status.Conditions},
	}
}

// allocated is how many bytes f allocates in all.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Who may edit a namespace can write annotations of 256 kB on each of its pods.
func TestHugeAnnotationsCostLittle(t *testing.T) {
	var o Objects
	for n := range 10 {
		o.Pods = append(o.Pods, whole(boundsPod("default", n, strings.Repeat("x,", 120_000), strings.Repeat("y,", 120_000))))
	}
	var r Result
	if n := allocated(func() { r = Build(o, labConfig) }); n > 1<<20 {
		t.Errorf("10 pods with annotations of 240 kB took %d bytes: want less than 1 MiB", n)
	}
	if len(r.Problems) != 2 || r.Problems[0].More != 9 {
		t.Errorf("%d problems: %.200v: want two, each of 10 pods", len(r.Problems), r.Problems)
	}
	for _, p := range r.Pods {
		if !p.Enroll || len(p.ExcludeOutbound)+len(p.ExcludeInbound) > 0 {
			t.Fatalf("%+v: want all of it captured", p)
		}
	}
}

// Many different faults are few problems, and nobody's hide those of another namespace. Which
// are told does not depend on the order of the objects.
func TestProblemsAreBounded(t *testing.T) {
	var o Objects
	bad := 0
	for n := range 20_000 {
		o.Pods = append(o.Pods, whole(boundsPod("many", n, fmt.Sprintf("a%d,b%d,c%d,d%d,e%d", n, n, n, n, n), "")))
		bad += maxFaults + 1
	}
	o.Pods = append(o.Pods, whole(boundsPod("other", 70_000, "oops", "")))
	r := Build(o, labConfig)
	told := 0
	for _, p := range r.Problems {
		told += 1 + p.More
	}
	if len(r.Problems) != maxProblemsOfOne+1 || told+r.Untold != bad+1 || r.Problems[len(r.Problems)-1].Object != "Pod other/p70000" {
		t.Errorf("%d problems, %d told and %d untold of %d, the last %v", len(r.Problems), told, r.Untold, bad+1, r.Problems[len(r.Problems)-1])
	}
	rand.Shuffle(len(o.Pods), func(i, j int) { o.Pods[i], o.Pods[j] = o.Pods[j], o.Pods[i] })
	if again := Build(o, labConfig); !slices.Equal(again.Problems, r.Problems) || again.Untold != r.Untold {
		t.Errorf("in another order other problems are told: %v, want %v", again.Problems, r.Problems)
	}
	o = Objects{}
	for n := range 2 * maxProblems {
		o.Pods = append(o.Pods, whole(boundsPod(fmt.Sprintf("ns%d", n), n, "oops", "")))
	}
	if r := Build(o, labConfig); len(r.Problems) != maxProblems || r.Untold != maxProblems {
		t.Errorf("%d told, %d untold: want %d each", len(r.Problems), r.Untold, maxProblems)
	}
}

// What an annotation says beyond its bounds is told in few and short words.
func TestFaultsAreFewAndShort(t *testing.T) {
	long := strings.Repeat("z", 3000)
	for text, want := range map[string][]string{
		"":                                   nil,
		"80,x":                               {`"x": want`},
		"a,b,c,d,e":                          {`"a": want`, `"b": want`, `"c": want`, "2 more"},
		long:                                 {`"zzz`},
		strings.Repeat("80,", maxExclusions): nil,
		strings.Repeat("80 ", 70):            {`"80": more than 64`, `"80": more than 64`, `"80": more than 64`, "3 more"},
		strings.Repeat(" ", maxAnnotation):   nil,
		strings.Repeat("8,", maxAnnotation/2) + "8": {"it has more than 4096 bytes"},
	} {
		list, out := parseOutbound(text)
		ports, in := parsePorts(text)
		for _, bad := range [][]string{out, in} {
			if len(bad) != len(want) {
				t.Errorf("%.40q: %q, want %q", text, bad, want)
				continue
			}
			for i := range bad {
				if !strings.HasPrefix(bad[i], want[i]) || len(bad[i]) > 200 {
					t.Errorf("%.40q: %q, want %q", text, bad[i], want[i])
				}
			}
		}
		if len(list) > maxExclusions || len(ports) > maxExclusions {
			t.Errorf("%.40q: %d and %d exclusions", text, len(list), len(ports))
		}
	}
}

func FuzzAnnotations(f *testing.F) {
	for _, s := range []string{"80", "10.0.0.1", "10.0.0.0/8,[fd00::/8]:443", "fd00::1%eth0", "[::ffff:1.2.3.4]:1", "x,y,z,1,2", strings.Repeat("1,", 3000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, bad := parseOutbound(text)
		ports, alsoBad := parsePorts(text)
		if len(list) > maxExclusions || len(ports) > maxExclusions {
			t.Errorf("%d and %d exclusions", len(list), len(ports))
		}
		for _, e := range list {
			if e.Port == 0 && !e.Prefix.IsValid() || e.Prefix.IsValid() && e.Prefix != e.Prefix.Masked() {
				t.Errorf("%q became %+v", text, e)
			}
		}
		for _, bad := range [][]string{bad, alsoBad} {
			if len(bad) > maxFaults+1 {
				t.Errorf("%d faults", len(bad))
			}
			for _, b := range bad {
				if len(b) > 500 {
					t.Errorf("a fault of %d bytes", len(b))
				}
			}
		}
	})
}

// A slice may have 20,000 ports and 1,000 endpoints, and each with each is one to know.
func TestHugeServicesCostLittle(t *testing.T) {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "s"}, Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1"}}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "s-1", Labels: map[string]string{discoveryv1.LabelServiceName: "s"}}}
	for n := range 20_000 {
		name, port := fmt.Sprint("p", n), int32(n+1)
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: name, Port: port})
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	for n := range 1000 {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.9.%d.%d", n>>8, n&255)}})
	}
	var r Result
	if n := allocated(func() {
		r = Build(Objects{Services: []*corev1.Service{s}, EndpointSlices: []*discoveryv1.EndpointSlice{slice}}, labConfig)
	}); n > 64<<20 {
		t.Errorf("one service took %d MB", n>>20)
	}
	count := 0
	for _, w := range r.Workloads {
		for _, ports := range w.Services {
			count += len(ports)
		}
	}
	if len(r.Services) != 1 || len(r.Services[0].Ports) != maxServicePorts || count != maxEndpoints || len(r.Problems) != 2 {
		t.Errorf("%d services, %d endpoints, problems %v: want %d ports, %d endpoints, two problems", len(r.Services), count, r.Problems, maxServicePorts, maxEndpoints)
	}
}

// Whatever names and lists an object has, what nodes are told of it fits.
func TestLongFieldsOfPods(t *testing.T) {
	long := strings.Repeat("l", 1<<20)
	p := boundsPod("default", 1, "", "")
	controller := true
	p.OwnerReferences = []metav1.OwnerReference{{Kind: "Job", Name: long + "-12345678", Controller: &controller}}
	p.Labels["app"], p.Labels["version"], p.Labels[LabelIstio] = long, long, long
	for n := range 200 {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: fmt.Sprintf("10.8.0.%d", n)})
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{
			TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(1000 + n)}}}})
	}
	delete(p.Labels, LabelMesh)
	r := Build(Objects{Pods: []*PodObject{whole(p)}}, labConfig)
	if len(r.Workloads) != 1 || len(r.Pods) != 1 {
		t.Fatalf("%d workloads, %d pods: want one each", len(r.Workloads), len(r.Pods))
	}
	w := r.Workloads[0]
	if w.OwnerName != p.Name || w.OwnerKind != "pod" || w.CanonicalName != p.Name || w.CanonicalRevision != "latest" || len(w.Addresses) > maxAddresses {
		t.Errorf("owner %.20q, canonical %.20q, revision %.20q, %d addresses", w.OwnerName, w.CanonicalName, w.CanonicalRevision, len(w.Addresses))
	}
	if len(r.Pods[0].ProbePorts) != maxProbePorts {
		t.Errorf("%d ports of probes: want %d", len(r.Pods[0].ProbePorts), maxProbePorts)
	}
	for _, p := range r.Problems {
		if len(p.Text) > 500 {
			t.Errorf("problem of %d bytes: %.100s", len(p.Text), p.Text)
		}
	}
	if len(r.Problems) != 3 {
		t.Errorf("%v: want a problem each of label, addresses and probes", r.Problems)
	}
}

// What is kept of an object that the API server told is what Build reads.
func TestKeptIsLittle(t *testing.T) {
	long := strings.Repeat("l", 1<<20)
	p := boundsPod("default", 1, long, long)
	p.Labels["mine"], p.Annotations["tacit.dev/other"] = long, long
	controller := true
	p.OwnerReferences = []metav1.OwnerReference{{Kind: "Other", Name: long}, {Kind: "Job", Name: "job", Controller: &controller}}
	p.Spec.Containers = []corev1.Container{{LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{long}}}},
		Lifecycle: &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt(80), Path: long, HTTPHeaders: []corev1.HTTPHeader{{Value: long}}}}}}}
	kept, err := keepRead(p)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(kept)
	if err != nil || len(b) > 16<<10 {
		t.Errorf("%d bytes are kept of a pod, %v", len(b), err)
	}
	before, after := Build(Objects{Pods: []*PodObject{whole(p)}}, labConfig), Build(Objects{Pods: []*PodObject{kept.(*PodObject)}}, labConfig)
	if text(before) != text(after) {
		t.Errorf("as it was: %s\nas it is kept: %s", text(before), text(after))
	}
}

// A document of a few lines that stands for a great one is refused.
func TestBombsAreRefused(t *testing.T) {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: Pod\nmetadata:\n  name: bomb\n  annotations:\n    a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for n := range 9 {
		fmt.Fprintf(&b, "    a%d: &a%d [%s]\n", n+1, n+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", n), 10), ","))
	}
	deep := "apiVersion: v1\nkind: Pod\nmetadata: {name: deep, x: " + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + "}\n"
	for _, text := range []string{b.String(), deep} {
		if n := allocated(func() {
			if _, err := Decode([]byte(text)); err == nil {
				t.Errorf("%.60q was read", text)
			}
		}); n > 256<<20 {
			t.Errorf("%.60q took %d MB", text, n>>20)
		}
	}
}

func TestWhatIsNoExclusion(t *testing.T) {
	for _, s := range []string{"+80", "-1", "0", "10.0.0.0/33", "10.0.0.1:", "10.0.0.1:0", "65536", ":80", "::ffff:10.0.0.0/104",
		"[10.0.0.1:80", "example.com", "example.com:80", "fd00::1:99999", "fe80::1%eth0"} {
		if list, bad := parseOutbound(s); len(list) != 0 || len(bad) != 1 {
			t.Errorf("%q: %v, %q: want one fault", s, list, bad)
		}
	}
}

// What is known of a Service's external addresses is up to their own bound: a connection to
// one that is not known would leave as to the outside.
func TestExternalAddressesUpToTheirBound(t *testing.T) {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "s"}, Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1"}}
	for n := range maxExternal + 1 {
		s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, fmt.Sprintf("192.0.2.%d", n))
	}
	r := Build(Objects{Services: []*corev1.Service{s}}, labConfig)
	if len(r.Services) != 1 || len(r.Services[0].External) != maxExternal || len(r.Problems) != 1 {
		t.Errorf("%v, %v: want %d external addresses, and a problem", r.Services, r.Problems, maxExternal)
	}
}
