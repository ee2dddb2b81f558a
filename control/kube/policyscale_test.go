package kube

import (
	"encoding/json"
	"fmt"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// policyOfMany is policy i of a namespace: some are for all of it, most for one of its two pods.
func policyOfMany(namespace, i, version int) *AuthorizationPolicy {
	selector := fmt.Sprintf(`"selector":{"matchLabels":{"app":"service-%d"}},`, namespace/10*(i%2))
	if i%5 == 0 {
		selector = ""
	}
	spec := fmt.Sprintf(`{%s"action":"DENY","rules":[{"from":[{"source":{"serviceAccounts":["bad-%d-%d"]}}]}]}`, selector, i, version)
	return &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprintf("team-%d", namespace), Name: fmt.Sprintf("p%d", i)}, Spec: json.RawMessage(spec)}
}

// many is a cluster of n namespaces with two pods and ten policies each.
func many(n int) []Event {
	var events []Event
	for i := range n {
		for _, j := range []int{0, 1} {
			p := largePod(20*i+j, 0)
			p.Labels["app"] = fmt.Sprintf("service-%d", i/10*j)
			events = append(events, Event{Key{"Pod", p.Namespace, p.Name}, p})
		}
		for j := range 10 {
			p := policyOfMany(i, j, 0)
			events = append(events, Event{Key{"AuthorizationPolicy", p.Namespace, p.Name}, p})
		}
	}
	return events
}

// TestPoliciesOfManyNamespaces: in a thousand namespaces with ten thousand policies a change costs
// what it costs among ten namespaces, and tells only what it changes.
func TestPoliciesOfManyNamespaces(t *testing.T) {
	type change struct {
		name                string
		event               func(version int) Event
		workloads, policies int
	}
	changes := []change{
		{"another rule", func(v int) Event {
			p := policyOfMany(7, 1, v)
			return Event{Key{"AuthorizationPolicy", p.Namespace, p.Name}, p}
		}, 0, 1},
		{"a policy of all pods comes and goes", func(v int) Event {
			e := Event{Key: Key{"AuthorizationPolicy", "team-7", "new"}}
			if v%2 == 0 {
				p := policyOfMany(7, 0, v)
				p.Name, e.Object = "new", p
			}
			return e
		}, 0, 1},
		{"a policy of one pod comes and goes", func(v int) Event {
			e := Event{Key: Key{"AuthorizationPolicy", "team-7", "new"}}
			if v%2 == 0 {
				p := policyOfMany(7, 1, v)
				p.Name, p.Spec, e.Object = "new", json.RawMessage(`{"selector":{"matchLabels":{"pod-template-hash":"one"}},"rules":[{}]}`), p
			}
			return e
		}, 1, 1},
		{"a pod is other", func(v int) Event {
			p := largePod(140, v)
			p.Labels = map[string]string{"app": fmt.Sprint("service-", v%2)}
			return Event{Key{"Pod", p.Namespace, p.Name}, p}
		}, 1, 0},
	}
	costs := make(map[string][]float64)
	for _, n := range []int{10, 1000} {
		b := NewBuilder(labConfig)
		one := largePod(141, 0)
		one.Labels["pod-template-hash"] = "one"
		if d := b.Apply(many(n), nil); len(d.Policies) != 10*n {
			t.Fatalf("%d policies told: want %d", len(d.Policies), 10*n)
		}
		b.Apply([]Event{{Key{"Pod", one.Namespace, one.Name}, one}}, nil)
		for _, c := range changes {
			version := 1
			costs[c.name] = append(costs[c.name], testing.AllocsPerRun(20, func() {
				version++
				d := b.Apply([]Event{c.event(version)}, nil)
				if len(d.Workloads) > c.workloads || len(d.Policies)+len(d.GonePolicies) > c.policies {
					t.Errorf("%s: %d workloads and %d policies told: want at most %d and %d", c.name, len(d.Workloads), len(d.Policies)+len(d.GonePolicies), c.workloads, c.policies)
				}
			}))
		}
	}
	for name, of := range costs {
		if t.Logf("%s: %.0f allocations among 10 namespaces, %.0f among 1000", name, of[0], of[1]); of[1] > 2*of[0]+50 {
			t.Errorf("%s: %.0f allocations among 10 namespaces, %.0f among 1000", name, of[0], of[1])
		}
	}
}
