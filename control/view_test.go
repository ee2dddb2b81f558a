package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/pause"
	"tacit.dev/wire/xds"
)

// What a pod shows follows from its enrollment and what its agent has said.
func TestConditionOfPods(t *testing.T) {
	now := time.Now()
	before := kube.Condition{Status: "True", Reason: kube.Captured, Message: "as it was"}
	for name, c := range map[string]struct {
		e              enrollment
		unheard        bool
		status, reason string
	}{
		"outside":                 {e: enrollment{state: Outside}},
		"outside, once shown":     {e: enrollment{state: Outside, pod: kube.Pod{Shown: before}}},
		"just enrolled":           {e: enrollment{state: Enrolling, since: now}},
		"enrolled for a while":    {e: enrollment{state: Enrolling, since: now.Add(-enrollingAfter)}, status: "False", reason: kube.Enrolling},
		"cannot be captured":      {e: enrollment{state: Enrolling, word: free, reason: "no nft", since: now}, status: "False", reason: kube.NotCaptured},
		"announced":               {e: enrollment{state: Announced, word: captured}, status: "True", reason: kube.Captured},
		"announced, and forwards": {e: enrollment{state: Announced, word: captured, reason: "it forwards"}, status: "True", reason: kube.PartlyProtected},
		"announced and lost":      {e: enrollment{state: Announced, word: free}, status: "False", reason: kube.NotCaptured},
		"deleted, taken down":     {e: enrollment{state: Announced, word: free, pod: kube.Pod{Shown: before, Ending: true}}, status: "True", reason: kube.Captured},
		"deleted, rules lost":     {e: enrollment{state: Announced, word: free, reason: "no rules", pod: kube.Pod{Ending: true}}, status: "False", reason: kube.NotCaptured},
		"not heard yet":           {e: enrollment{state: Announced, word: silent, since: now, pod: kube.Pod{Shown: before}}, status: "True", reason: kube.Captured},
		"not heard for long":      {e: enrollment{state: Announced, word: silent, pod: kube.Pod{Shown: before}}, unheard: true, status: "Unknown", reason: kube.AgentAway},
		"its agent has left":      {e: enrollment{state: Announced, word: captured, pod: kube.Pod{Shown: before}}, unheard: true, status: "Unknown", reason: kube.AgentAway},
		"enrolled in vain":        {e: enrollment{state: Enrolling, since: now}, unheard: true, status: "Unknown", reason: kube.AgentAway},
		"withdrawing":             {e: enrollment{state: Withdrawing, word: captured}, status: "False", reason: kube.Leaving},
		"released, nothing said":  {e: enrollment{state: Releasing, word: stale}},
		"released, once shown":    {e: enrollment{state: Releasing, word: stale, pod: kube.Pod{Shown: before}}, status: "False", reason: kube.Leaving},
	} {
		if c.e.word == "" {
			c.e.word = silent
		}
		got := c.e.condition(now, c.unheard)
		if got.Status != c.status || got.Reason != c.reason {
			t.Errorf("%s: %+v, want %q because of %q", name, got, c.status, c.reason)
		}
	}
}

// An agent that does not come back for a while is told of once, by time alone.
func TestAgentIsAwayForLong(t *testing.T) {
	now := time.Now()
	r := newRoster(nil, slog.New(slog.DiscardHandler))
	e := enrolled(r, testPod("a"), enrollment{state: Announced, word: captured})
	// A new leader gets to know its nodes.
	r.agents(nil, true, now.Add(-time.Hour))
	if r.look(outlook{now: now}); r.isAway(e.pod.Node, now) || r.touched[e] {
		t.Error("away, while nodes are still coming")
	}
	for _, step := range []struct {
		after           time.Duration
		connected       bool
		long, isTouched bool
	}{
		{0, true, false, false},
		{time.Hour, false, false, false}, // it has left just now
		{time.Hour + awayAfter - 1, false, false, false},
		{time.Hour + awayAfter, false, true, true},
		{2 * time.Hour, true, false, true},
		{2*time.Hour + awayAfter, false, false, false},
	} {
		clear(r.touched)
		at := now.Add(step.after)
		r.agents(map[string]bool{e.pod.Node: step.connected}, false, at)
		r.look(outlook{now: at})
		if long := r.isAway(e.pod.Node, at); long != step.long || r.touched[e] != step.isTouched {
			t.Errorf("after %v, connected %v: away for long %v, to be looked at %v", step.after, step.connected, long, r.touched[e])
		}
	}
	if next := r.timers.next(); !next.Equal(now.Add(2*time.Hour + 2*awayAfter)) {
		t.Errorf("looked at again at %v", next)
	}
	r.end(e)
	if r.look(outlook{now: now}); len(r.away) != 0 {
		t.Errorf("away, without a pod: %v", r.away)
	}
}

// enrolled puts a pod into r that is as far as e.
func enrolled(r *roster, p kube.Pod, as enrollment) *enrollment {
	e := r.begin(p, as.since)
	e.state, e.word, e.reason = as.state, as.word, as.reason
	r.settle(e, time.Now())
	return e
}

func ending(p kube.Pod) kube.Pod {
	p.Ending = true
	return p
}

// The status of the Mesh counts pods and nodes, and names what is not protected.
func TestViewOfMesh(t *testing.T) {
	r := newRoster(nil, slog.New(slog.DiscardHandler))
	now := time.Now()
	enrolled(r, testPod("a"), enrollment{state: Announced, word: captured})
	enrolled(r, testPod("b"), enrollment{state: Enrolling, word: free, reason: "no nft"})
	enrolled(r, testPod("c"), enrollment{state: Withdrawing, word: captured})
	enrolled(r, testPod("d"), enrollment{state: Outside, word: silent})
	enrolled(r, ending(testPod("e")), enrollment{state: Announced, word: free})
	f := kube.Summary{Facts: kube.MeshFacts{Found: true, Generation: 4}, TrustDomain: "lab", Exceptions: []kube.Exception{{Namespace: "kube-system", Name: "x", Reason: kube.SystemNamespace}}}
	r.objects(kube.Delta{Nodes: tainted(t, "n1", "n2")}, now)
	v := r.view(now, f, []xds.NodeStatus{{Node: "n1", Agent: true, Proxy: true}, {Node: "n2", Agent: true}})
	if want := (kube.PodCounts{Enrolled: 2, Protected: 1, Unprotected: 1, Leaving: 1, Exceptions: 1}); v.Mesh.Pods != want || v.Mesh.ObservedGeneration != 4 {
		t.Errorf("pods %+v of generation %d, want %+v of 4", v.Mesh.Pods, v.Mesh.ObservedGeneration, want)
	}
	if len(v.Untaint) != 1 || v.Untaint[0].Name != "n1" || v.Mesh.Nodes != (kube.NodeCounts{Ready: 1, Total: 2}) {
		t.Errorf("untaint %v, nodes %+v: want n1, one of two ready", v.Untaint, v.Mesh.Nodes)
	}
	if len(v.Mesh.Unprotected) != 1 || v.Mesh.Unprotected[0] != (kube.UnprotectedPod{Pod: "default/b", Reason: "no nft"}) {
		t.Errorf("unprotected %v, want default/b", v.Mesh.Unprotected)
	}
	if len(v.Pods) != 3 {
		t.Errorf("%d conditions to write, want those of a, b and c: %+v", len(v.Pods), v.Pods)
	}
	// What is shown already is not written again.
	f.Facts.Shown = *v.Mesh
	if v := r.view(now.Add(time.Minute), f, []xds.NodeStatus{{Node: "n1", Agent: true, Proxy: true}}); v.Mesh != nil {
		t.Errorf("status is written again: %+v", v.Mesh)
	}
}

// tainted are nodes as they start.
func tainted(t *testing.T, names ...string) []kube.Node {
	t.Helper()
	text := ""
	for _, n := range names {
		text += "---\napiVersion: v1\nkind: Node\nmetadata: {name: " + n + "}\nspec: {taints: [{key: " + kube.TaintNotReady + ", effect: NoSchedule}]}\n"
	}
	objects, err := kube.Decode([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return kube.Build(objects, kube.BuildConfig{TrustDomain: "lab"}).Nodes
}

func testPod(name string) kube.Pod {
	return kube.Pod{Pod: mesh.Pod{UID: name, Namespace: "default", Name: name}, Node: "n1"}
}

// failingDisplay fails once.
type failingDisplay struct{ shown chan kube.View }

func (d *failingDisplay) Show(_ context.Context, v kube.View) error {
	d.shown <- v
	if len(d.shown) == 1 {
		return errors.New("server away")
	}
	return nil
}

func TestWhatIsNotShownIsTriedAgain(t *testing.T) {
	d := &failingDisplay{make(chan kube.View, 2)}
	p := newPresenter(d, slog.New(slog.DiscardHandler))
	p.put(kube.View{Untaint: []kube.Node{{Name: "n1"}}})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() {
		for len(d.shown) < 2 && ctx.Err() == nil {
			pause.For(ctx, time.Millisecond)
		}
		cancel()
	}()
	if err := p.run(ctx); err != nil || len(d.shown) != 2 {
		t.Errorf("shown %d times, %v: want twice", len(d.shown), err)
	}
}

// What a policy should show is shown until it does, and policies are told to nodes whatever else
// has their names.
func TestPoliciesAreShownAndTold(t *testing.T) {
	r := newRoster(nil, slog.New(slog.DiscardHandler))
	now := time.Now()
	f := kube.PolicyFacts{Namespace: "a", Name: "p", Want: [2]metav1.Condition{{Type: kube.PolicyAccepted, Status: "True"}, {Type: kube.PolicyEnforced, Status: "False"}}}
	service := &mesh.Service{Namespace: "a", Name: "p", Hostname: "p"}
	r.objects(kube.Delta{Changes: mesh.Changes{Policies: []*mesh.Policy{{Namespace: "a", Name: "p"}}, Services: []*mesh.Service{service}}, Policed: []kube.PolicyFacts{f}}, now)
	v := r.view(now, kube.Summary{}, nil)
	if len(v.Policies) != 1 || v.Policies[0].Key() != "a/p" || len(v.Policies[0].Want) != 2 {
		t.Fatalf("to be shown: %+v, want two conditions of a/p", v.Policies)
	}
	if u := r.update(); len(u.Policies) != 1 || len(u.Services) != 1 {
		t.Errorf("told %+v: want a policy and a service", u.Changes)
	}
	f.Shown.Conditions = v.Policies[0].Want
	r.objects(kube.Delta{Changes: mesh.Changes{GonePolicies: []string{"a/p"}}, Policed: []kube.PolicyFacts{f}}, now)
	if v := r.view(now, kube.Summary{}, nil); len(v.Policies) != 0 {
		t.Errorf("to be shown: %+v, which is shown", v.Policies)
	}
	if u := r.update(); len(u.GonePolicies) != 1 || len(u.Gone) != 0 || r.isStirred() {
		t.Errorf("told %+v: want that a policy is gone", u.Changes)
	}
}

// What is written for many pods holds up nothing else for long, and each of them has its turn,
// also if some cannot be written.
func TestViewOfManyPods(t *testing.T) {
	r := newRoster(nil, slog.New(slog.DiscardHandler))
	const n = 3 * maxShown
	for i := range n {
		enrolled(r, testPod(fmt.Sprintf("p%04d", i)), enrollment{state: Enrolling, word: free, reason: "no nft"})
	}
	refused := func(p kube.PodView) bool { return strings.HasSuffix(p.Name, "7") }
	for range 1000 {
		v := r.view(time.Now(), kube.Summary{}, nil)
		if len(v.Pods) > maxShown {
			t.Fatalf("%d pods in one view: want %d at most", len(v.Pods), maxShown)
		}
		for _, p := range v.Pods {
			if !refused(p) {
				delete(r.views, p.UID)
			}
		}
		if len(r.views) == n/10 {
			return
		}
	}
	t.Errorf("%d pods are left: want the %d that are refused", len(r.views), n/10)
}

// The first of many are those of all, in order.
func TestFirst(t *testing.T) {
	for _, n := range []int{0, 1, 19, 20, 21, 1000} {
		all := rand.Perm(n)
		got := first(slices.Values(all), 20, cmp.Compare[int])
		if slices.Sort(all); !slices.Equal(got, all[:min(n, 20)]) {
			t.Errorf("of %d: %v", n, got)
		}
	}
}
