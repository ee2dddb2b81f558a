package kube

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// large is a cluster of n pods, in Services of ten, a hundred on each node, twenty in each
// namespace, all in the mesh.
func large(n int) []Event {
	var events []Event
	add := func(o metav1.Object) {
		k, _ := keyOf(o)
		events = append(events, Event{k, o})
	}
	for i := range n / 20 {
		add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("team-%d", i), Labels: map[string]string{LabelMesh: "on"}}})
	}
	for i := range n / 100 {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", i), Labels: map[string]string{corev1.LabelTopologyZone: "zone"}}}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: at(netip.MustParseAddr("172.16.0.0"), i).String()}}
		add(node)
	}
	for i := range n / 10 {
		add(&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: largeSpace(10 * i), Name: fmt.Sprintf("service-%d", i)},
			Spec:       corev1.ServiceSpec{ClusterIP: at(netip.MustParseAddr("10.96.0.0"), i).String(), Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
		})
		add(largeSlice(i, true))
	}
	for i := range n {
		add(largePod(i, 0))
	}
	return events
}

func at(first netip.Addr, i int) netip.Addr {
	b := first.As4()
	return netip.AddrFrom4([4]byte{b[0], b[1] + byte(i>>16), byte(i >> 8), byte(i)})
}

func largeSpace(pod int) string { return fmt.Sprintf("team-%d", pod/20) }

// largePod is pod i, ready or not by version.
func largePod(i, version int) *PodObject {
	controller := true
	return KeepPod(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: largeSpace(i), Name: fmt.Sprintf("service-%d-6d8f7b9c54-%05d", i/10, i), UID: types.UID(fmt.Sprintf("8c2f0a51-1111-4222-8333-%012d", i)),
			Labels:          map[string]string{"app": fmt.Sprintf("service-%d", i/10), "pod-template-hash": "6d8f7b9c54"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: fmt.Sprintf("service-%d-6d8f7b9c54", i/10), Controller: &controller}},
		},
		Spec: corev1.PodSpec{NodeName: fmt.Sprintf("node-%d", i/100), ServiceAccountName: fmt.Sprintf("service-%d", i/10)},
		Status: corev1.PodStatus{
			PodIP:      at(netip.MustParseAddr("10.128.0.0"), i).String(),
			Conditions: []corev1.PodCondition{{Type: ConditionProtected, Status: corev1.ConditionTrue, Message: fmt.Sprint(version)}},
			PodIPs:     []corev1.PodIP{{IP: at(netip.MustParseAddr("10.128.0.0"), i).String()}},
		},
	})
}

// largeSlice is that of Service i; its first pod is ready or not.
func largeSlice(i int, ready bool) *discoveryv1.EndpointSlice {
	name, port := "http", int32(8080)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: largeSpace(10 * i), Name: fmt.Sprintf("service-%d-x7k2p", i), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("service-%d", i)}},
		Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
	}
	for n := range 10 {
		p := largePod(10*i+n, 0)
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{p.Status.PodIP}, Conditions: discoveryv1.EndpointConditions{Ready: new(ready || n > 0)},
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		})
	}
	return s
}

// BenchmarkBuilder is what one change costs, beside ever more pods: that of a pod's object
// which nobody else sees, of an endpoint, and the coming and going of a pod with its endpoint.
func BenchmarkBuilder(b *testing.B) {
	cfg := labConfig
	cfg.Ranges = []netip.Prefix{netip.MustParsePrefix("10.128.0.0/14")}
	for _, n := range []int{1_000, 10_000, 100_000} {
		var before, after runtime.MemStats
		events := large(n)
		runtime.GC()
		runtime.ReadMemStats(&before)
		builder := NewBuilder(cfg)
		builder.Apply(events, nil)
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(events)
		change := func(name string, event func(i int) []Event, workloads int) {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				i := 0
				for b.Loop() {
					i++
					if d := builder.Apply(event(i), nil); len(d.Workloads)+len(d.Gone) != workloads {
						b.Fatalf("%d workloads and %d gone: want %d", len(d.Workloads), len(d.Gone), workloads)
					}
				}
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "heap-B/pod")
			})
		}
		of := func(o metav1.Object) Event {
			k, _ := keyOf(o)
			return Event{k, o}
		}
		change("condition", func(i int) []Event { return []Event{of(largePod(i*7919%n, i))} }, 0)
		ready := false
		change("endpoint", func(int) []Event { ready = !ready; return []Event{of(largeSlice(0, !ready))} }, 1)
		there := true
		change("pod", func(int) []Event {
			e := of(largePod(n/2, 0))
			if there = !there; !there {
				e.Object = nil
			}
			return []Event{e}
		}, 1)
	}
}

// BenchmarkSlice is what one endpoint that becomes ready, or is no more, costs in a Service of many:
// as much as there are endpoints. docs/scale.md says why that is borne.
func BenchmarkSlice(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		var events []Event
		add := func(o metav1.Object) {
			k, _ := keyOf(o)
			events = append(events, Event{k, o})
		}
		add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "one", Labels: map[string]string{LabelMesh: "on"}}})
		add(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "one", Name: "large"}, Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}})
		for i := range n {
			p := largePod(i, 0)
			p.Namespace = "one"
			add(p)
		}
		for i := range n / 100 {
			add(sliceOfOne(i, true))
		}
		builder := NewBuilder(labConfig)
		builder.Apply(events, nil)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ready := true
			for b.Loop() {
				ready = !ready
				s := sliceOfOne(0, ready)
				k, _ := keyOf(s)
				if d := builder.Apply([]Event{{k, s}}, nil); len(d.Workloads) != 1 {
					b.Fatalf("%d workloads, want 1", len(d.Workloads))
				}
			}
		})
	}
}

// sliceOfOne is slice i of the Service of BenchmarkSlice, of a hundred endpoints.
func sliceOfOne(i int, ready bool) *discoveryv1.EndpointSlice {
	s := largeSlice(10*i, ready)
	for n := 1; n < 10; n++ {
		s.Endpoints = append(s.Endpoints, largeSlice(10*i+n, true).Endpoints...)
	}
	s.Namespace, s.Name, s.Labels[discoveryv1.LabelServiceName] = "one", fmt.Sprintf("large-%d", i), "large"
	for n := range s.Endpoints {
		s.Endpoints[n].TargetRef.Namespace = "one"
	}
	return s
}
