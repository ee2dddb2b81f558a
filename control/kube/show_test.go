package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
)

// A pod's condition comes, changes and goes; the conditions of others stay. What was
// written is not written again before it can have come back to us.
func TestDisplayOfPods(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", UID: "ua"}}
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	client := fake.NewClientset(pod)
	d := NewDisplay(Client{Interface: client}, 0, nil)
	is := Condition{}
	show := func(want Condition) Condition {
		t.Helper()
		if err := d.Show(t.Context(), View{Pods: []PodView{{UID: "ua", Namespace: "shop", Name: "a", Is: is, Want: want}}}); err != nil {
			t.Fatal(err)
		}
		p, err := client.CoreV1().Pods("shop").Get(t.Context(), "a", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !isReady(KeepPod(p)) {
			t.Errorf("conditions %+v: want Ready left alone", p.Status.Conditions)
		}
		is = shown(KeepPod(p))
		return is
	}
	bad := Condition{Status: "False", Reason: NotCaptured, Message: "no nft"}
	if got := show(bad); !got.Same(bad) || got.Since.IsZero() {
		t.Errorf("%+v, want %+v since some time", got, bad)
	}
	events, err := client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(events.Items) != 1 || events.Items[0].Message != "no nft" {
		t.Errorf("events %+v, %v: want one with the reason", events, err)
	}
	since := is.Since
	worse := Condition{Status: "False", Reason: NotCaptured, Message: "still no nft"}
	if got := show(worse); !got.Same(worse) || !got.Since.Equal(since) {
		t.Errorf("%+v, want %+v since %v", got, worse, since)
	}
	before := len(client.Actions())
	show(worse) // the view of somebody who has not heard of it yet
	if n := len(client.Actions()) - before; n != 1 {
		t.Errorf("%d requests for what was written already, want only the test's own", n)
	}
	if got := show(Condition{}); got != (Condition{}) {
		t.Errorf("%+v, want none", got)
	}
}

// A status keeps the time of what stays as it is, and differs only if something does.
func TestStatusOfMesh(t *testing.T) {
	s := Summary{Facts: MeshFacts{Found: true, Generation: 2}, TrustDomain: "lab", Pods: PodCounts{Enrolled: 1, Protected: 1}}
	first, differs := s.Status(time.Unix(1000, 0))
	if !differs {
		t.Fatal("an empty status is taken for this one")
	}
	s.Facts.Shown = first
	if again, differs := s.Status(time.Unix(2000, 0)); differs {
		t.Errorf("%+v differs from %+v", again, first)
	}
	s.Pods = PodCounts{Enrolled: 2, Protected: 1, Unprotected: 1}
	s.Facts.Faults = []string{"enrollment"}
	next, differs := s.Status(time.Unix(3000, 0))
	if !differs || len(next.Conditions) != 2 {
		t.Fatalf("%+v, differs %v: want two other conditions", next, differs)
	}
	for _, c := range next.Conditions {
		if c.Status != metav1.ConditionFalse || c.LastTransitionTime.Unix() != 3000 {
			t.Errorf("%+v, want False from now on", c)
		}
	}
}

// Conditions of a policy come and change; those of others stay, also if they write meanwhile.
func TestDisplayOfPolicies(t *testing.T) {
	at := PolicyResources()[0]
	object := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{
		"observedGeneration": "1", "conditions": []any{map[string]any{"type": "ZtunnelAccepted", "status": "True", "observedGeneration": "7"}},
	}}}
	object.SetGroupVersionKind(at.GroupVersion().WithKind("AuthorizationPolicy"))
	object.SetNamespace("shop")
	object.SetName("p")
	client := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		at: "AuthorizationPolicyList", PolicyResources()[1]: "AuthorizationPolicyList",
	}, object)
	d := NewDisplay(Client{Policies: Policies(client)}, 0, nil)
	show := func(f PolicyFacts) (types string) {
		t.Helper()
		want, differs := f.Conditions(time.Unix(1000, 0))
		if !differs {
			t.Errorf("%s shows %s already", f.Key(), f.Shown.Conditions)
		}
		if err := d.Show(t.Context(), View{Policies: []PolicyView{{Namespace: f.Namespace, Name: f.Name, Is: f.Shown.Conditions, Want: want}}}); err != nil && !strings.Contains(err.Error(), "test failed") { // 422 of a server
			t.Fatal(err)
		}
		o, err := client.Resource(at).Namespace("shop").Get(t.Context(), "p", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		object = o
		list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
		for _, c := range list {
			types += fmt.Sprint(c.(map[string]any)["type"], "=", c.(map[string]any)["status"], " ")
		}
		return types
	}
	facts := func() PolicyFacts {
		v, err := new(API).readPolicy(object)
		if err != nil {
			t.Fatal(err)
		}
		r := reader{cfg: policyConfig}
		p := v.(*AuthorizationPolicy)
		read := r.translate(p)
		return factsOf(p, &read, podCounts{all: 1})
	}
	stale := facts()
	if got, want := show(facts()), "ZtunnelAccepted=True tacit.dev/Accepted=True tacit.dev/Enforced=True "; got != want {
		t.Errorf("conditions %s: want %s", got, want)
	}
	if _, differs := facts().Conditions(time.Unix(2000, 0)); differs {
		t.Error("what is shown is to be shown again")
	}
	before := len(client.Actions())
	show(stale) // the view of somebody who has not heard of it yet
	if n := len(client.Actions()) - before; n != 1 {
		t.Errorf("%d requests for what was written already, want only the test's own", n)
	}
	stale.Want[0].Status = metav1.ConditionFalse
	if got := show(stale); !strings.Contains(got, "Accepted=True tacit.dev/Enforced=True") {
		t.Errorf("conditions %s: somebody who knew others has written", got)
	}
}

// Conditions are written no faster than is allowed.
func TestDisplayKeepsToItsRate(t *testing.T) {
	client := fake.NewClientset()
	d := NewDisplay(Client{Interface: client}, 20, nil)
	var v View
	for i := range 30 {
		v.Pods = append(v.Pods, PodView{UID: fmt.Sprint(i), Namespace: "shop", Name: fmt.Sprint(i), Want: Condition{Status: "True"}})
	}
	began := time.Now()
	if err := d.Show(t.Context(), v); err != nil { // no pod is there any more
		t.Fatal(err)
	}
	if took := time.Since(began); took < 450*time.Millisecond || len(client.Actions()) != 30 {
		t.Errorf("%d writes in %v, want 30 in half a second: 20 at once, and 20 per second", len(client.Actions()), took)
	}
}
