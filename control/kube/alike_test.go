package kube

import (
	"fmt"
	"reflect"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// ofDeployment is a pod as a watch brings it: nothing of it is shared with another.
func ofDeployment(set, i int) *corev1.Pod {
	isController := true
	probe := func(path string) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: fmt.Sprint("/", path), Port: intstr.FromString("http")}}}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprint("namespace-", set), Name: fmt.Sprintf("set-%d-%d", set, i), Labels: map[string]string{"app": fmt.Sprint("app-", set), "version": fmt.Sprint("v", 1)},
			OwnerReferences: []metav1.OwnerReference{{Kind: fmt.Sprint("Replica", "Set"), Name: fmt.Sprint("set-", set), Controller: &isController}},
		},
		Spec: corev1.PodSpec{
			NodeName: fmt.Sprintf("ip-10-0-0-%d.compute.internal", i%10), ServiceAccountName: fmt.Sprint("account-", set),
			Containers: []corev1.Container{{
				ReadinessProbe: probe("ready"), LivenessProbe: probe("alive"), Ports: []corev1.ContainerPort{{Name: fmt.Sprint("ht", "tp"), ContainerPort: 8080}},
			}},
		},
		Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

// Pods that share are the same as before, and those that differ keep what is their own.
func TestAlikeChangesNothing(t *testing.T) {
	var a alike
	for i := range 200 {
		pod := func() *PodObject {
			p := ofDeployment(i%3, i)
			if i%7 == 0 {
				p.Labels["version"] = fmt.Sprint("v", i)
			}
			if i%11 == 0 {
				p.OwnerReferences = nil
			}
			if i%13 == 0 {
				p.Spec.Containers[0].Ports[0].ContainerPort = int32(i)
			}
			return KeepPod(p)
		}
		p, want := pod(), pod()
		if a.share(p); !reflect.DeepEqual(p, want) {
			t.Fatalf("%v: want %v", p, want)
		}
	}
}

// What the pods of a Deployment have in common is there once.
func TestAlikeSaves(t *testing.T) {
	each := func(share func(*PodObject)) int {
		const n = 2000
		all := make([]*PodObject, n)
		before := heapNow()
		for i := range all {
			all[i] = KeepPod(ofDeployment(i%20, i))
			share(all[i])
		}
		size := (heapNow() - before) / n
		runtime.KeepAlive(all)
		return size
	}
	var a alike
	apart, shared := each(func(*PodObject) {}), each(a.share)
	t.Logf("%d bytes each, %d where they share", apart, shared)
	if shared > 2*apart/3 {
		t.Errorf("%d bytes for a pod that shares with others, %d for one that does not", shared, apart)
	}
}

// What is gone is forgotten, and what is used is not.
func TestAlikeForgets(t *testing.T) {
	var l lately[int, int]
	for i := range 5 * maxAlike {
		l.put(i, i+1)
		if l.get(0) != 1 {
			t.Fatalf("%d is forgotten though it is used", 0)
		}
	}
	if n := len(l.recent) + len(l.earlier); n > 2*maxAlike+1 || l.get(1) != 0 {
		t.Errorf("%d are remembered", n)
	}
}

func heapNow() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
