package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A reader that comes when it likes has the objects as they are, and what waits for it is
// never more than what it knows and what there is.
func TestPendingEventsAreFew(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	now, read, pending := make(Set), make(Set), Pending{}
	for n := range 20_000 {
		name := fmt.Sprint("p", random.IntN(8))
		k := Key{"Pod", "default", name}
		e := Event{Key: k}
		if random.IntN(2) == 0 {
			e.Object = &PodObject{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "u"}, Spec: podSpec{NodeName: fmt.Sprint(n)}}
		}
		if e.Object != nil || now[k] != nil {
			pending.Put(e, now[k] != nil)
			now.Apply([]Event{e})
		}
		for k := range pending.events {
			if now[k] == nil && read[k] == nil {
				t.Fatalf("%v waits, and is neither there nor known", k)
			}
		}
		if random.IntN(10) == 0 {
			read.Apply(pending.Take())
			if !maps.Equal(now, read) {
				t.Fatalf("read %v, want %v", read, now)
			}
		}
	}
}

// A pod that was only written again is the same; one of which anything else differs is not.
func TestSamePods(t *testing.T) {
	pod := func(change func(*PodObject)) *PodObject {
		p := &PodObject{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p", UID: "1", ResourceVersion: "7", Labels: map[string]string{"app": "x"}},
			Spec:       podSpec{NodeName: "n1", Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 80}}}}},
			Status:     podStatus{PodIP: "10.0.0.1", Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}
		change(p)
		return p
	}
	before := pod(func(*PodObject) {})
	if again := pod(func(p *PodObject) { p.ResourceVersion = "8" }); !same(before, again) {
		t.Error("another version alone is a difference")
	}
	if before.ResourceVersion != "7" {
		t.Error("a pod was changed")
	}
	for i, change := range []func(*PodObject){
		func(p *PodObject) { p.UID = "2" },
		func(p *PodObject) { p.Labels["app"] = "y" },
		func(p *PodObject) { p.Annotations = map[string]string{AnnotationExcludeInbound: "80"} },
		func(p *PodObject) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} },
		func(p *PodObject) { p.Spec.NodeName = "n2" },
		func(p *PodObject) { p.Spec.Containers[0].Ports[0].ContainerPort = 81 },
		func(p *PodObject) { p.Status.PodIP = "10.0.0.2" },
		func(p *PodObject) { p.Status.Conditions[0].Status = corev1.ConditionFalse },
	} {
		if same(before, pod(change)) {
			t.Errorf("change %d is none", i)
		}
	}
}
