package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/pause"
)

const trustDomain = "cluster.local"

// dice makes up pods and policies in which everything is about the same few things.
type dice struct{ *rand.Rand }

// town is what was made up.
type town struct {
	namespaces []string
	pods       []*corev1.Pod
	policies   []*unstructured.Unstructured
	differing  []*unstructured.Unstructured
}

var (
	accounts = []string{"default", "app", "admin"}
	apps     = []string{"web", "db", "cache"}
)

func (d dice) town(policies int) *town {
	t := &town{namespaces: []string{"compare-a", "compare-b"}}
	for i := range 8 {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: t.namespaces[i%2], Name: fmt.Sprint("pod-", i), Labels: map[string]string{"app": apps[i%3], "tier": fmt.Sprint(i % 4)},
		}}
		p.Spec = corev1.PodSpec{NodeName: "nowhere", ServiceAccountName: "default", Containers: []corev1.Container{{Name: "app", Image: "none"}}}
		t.pods = append(t.pods, p)
	}
	for i := range policies {
		namespace := t.namespaces[d.IntN(2)]
		if d.IntN(10) == 0 {
			namespace = rootNamespace
		}
		spec := map[string]any{}
		if d.IntN(5) > 0 { // too many of a whole namespace would deny everything
			spec["selector"] = map[string]any{"matchLabels": d.labels(i)}
		}
		switch d.IntN(3) {
		case 0:
			spec["action"] = "DENY"
		case 1:
			spec["action"] = "ALLOW"
		}
		var rules []any
		for range d.IntN(4) {
			rules = append(rules, d.rule())
		}
		if rules != nil {
			spec["rules"] = rules
		}
		t.policies = append(t.policies, newPolicy(namespace, fmt.Sprintf("policy-%03d", i), spec))
	}
	t.differing = differing(t.namespaces[0])
	return t
}

// labels are of about one pod: then a few policies are for each.
func (d dice) labels(i int) map[string]any {
	if d.IntN(4) == 0 {
		return map[string]any{"app": apps[d.IntN(len(apps))], "tier": fmt.Sprint(d.IntN(4))}
	}
	return map[string]any{"group": fmt.Sprint("g", i/4)}
}

func (d dice) some(from ...string) []any {
	var all []any
	for range 1 + d.IntN(2) {
		all = append(all, from[d.IntN(len(from))])
	}
	return all
}

var fields = map[string][]string{
	"principals": {"cluster.local/ns/compare-a/sa/app", "cluster.local/ns/compare-b/sa/*", "*/sa/admin", "*", "cluster.local/ns/compare-a/sa/default"},
	"namespaces": {"compare-a", "compare-b", "compare-*", "*-b", "*", "elsewhere"},
	"ipBlocks":   {"10.77.0.0/16", "10.77.1.0/24", "10.77.1.7", "192.0.2.0/24", "fd77::/64", "0.0.0.0/0"},
	"ports":      {"80", "8080", "443", "15008"},
	"account":    {"app", "admin", "compare-a/app", "compare-b/default"},
}

// odd are values that cannot be one, of each field.
var odd = map[string]string{"principals": "spiffe://cluster.local/ns/compare-a/sa/app", "namespaces": "compare-*-a", "ipBlocks": "nonsense", "ports": "http"}

func not(field string) string { return "not" + strings.ToUpper(field[:1]) + field[1:] }

func (d dice) rule() any {
	rule := map[string]any{}
	var from, to, when []any
	for range d.IntN(3) {
		source := map[string]any{}
		for _, field := range []string{"principals", "namespaces", "ipBlocks"} {
			if d.IntN(3) == 0 {
				source[field] = d.some(fields[field]...)
			}
			if d.IntN(60) == 0 {
				source[field] = append(d.some(fields[field]...), odd[field])
			}
			if d.IntN(6) == 0 {
				source[not(field)] = d.some(fields[field]...)
			}
		}
		if len(source) == 0 { // alone: the API server lets it stand with nothing of the above
			source["serviceAccounts"] = d.some(fields["account"]...)
		}
		if d.IntN(30) == 0 {
			source["requestPrincipals"] = []any{"*"}
		}
		from = append(from, map[string]any{"source": source})
	}
	for range d.IntN(2) {
		operation := map[string]any{"ports": d.some(fields["ports"]...)}
		if d.IntN(3) == 0 {
			operation = map[string]any{"notPorts": d.some(fields["ports"]...)}
		}
		if d.IntN(20) == 0 {
			operation["ports"] = append(d.some(fields["ports"]...), odd["ports"])
		}
		if d.IntN(20) == 0 {
			operation["methods"] = []any{"GET"}
		}
		to = append(to, map[string]any{"operation": operation})
	}
	for range d.IntN(2) {
		key := []string{"source.ip", "source.namespace", "source.principal", "destination.ip", "destination.port"}[d.IntN(5)]
		values := map[string]string{"source.ip": "ipBlocks", "source.namespace": "namespaces", "source.principal": "principals", "destination.ip": "ipBlocks", "destination.port": "ports"}
		condition := map[string]any{"key": key, "values": d.some(fields[values[key]]...)}
		if d.IntN(3) == 0 {
			condition = map[string]any{"key": key, "notValues": d.some(fields[values[key]]...)}
		}
		when = append(when, condition)
	}
	for name, list := range map[string][]any{"from": from, "to": to, "when": when} {
		if list != nil {
			rule[name] = list
		}
	}
	return rule
}

// create writes the town. Nobody runs its pods: their status is written here.
func (t *town) create(ctx context.Context, client kube.Client) error {
	for _, name := range append([]string{rootNamespace}, t.namespaces...) {
		n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := client.CoreV1().Namespaces().Create(ctx, n, metav1.CreateOptions{}); err != nil && name != rootNamespace {
			return err
		}
	}
	for i, p := range t.pods {
		p.Spec.AutomountServiceAccountToken = new(bool)
		var made *corev1.Pod
		for { // a namespace that is new has no service account yet
			var err error
			if made, err = client.CoreV1().Pods(p.Namespace).Create(ctx, p, metav1.CreateOptions{}); err == nil {
				break
			}
			if !apierrors.IsForbidden(err) || !pause.For(ctx, 50*time.Millisecond) {
				return fmt.Errorf("create pod %s/%s: %w", p.Namespace, p.Name, err)
			}
		}
		ip := fmt.Sprintf("10.77.1.%d", i+1)
		made.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
		var err error
		if t.pods[i], err = client.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, made, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("write the status of pod %s/%s: %w", p.Namespace, p.Name, err)
		}
	}
	for _, p := range t.all() {
		if _, err := client.Policies[0].Namespace(p.GetNamespace()).Create(ctx, p, metav1.CreateOptions{}); err != nil {
			spec, _ := json.Marshal(p.Object["spec"])
			return fmt.Errorf("%w: %s", err, spec)
		}
	}
	return nil
}

func (t *town) remove(ctx context.Context, client kube.Client) {
	now := int64(0)
	for _, p := range t.all() {
		_ = client.Policies[0].Namespace(p.GetNamespace()).Delete(ctx, p.GetName(), metav1.DeleteOptions{})
	}
	for _, p := range t.pods {
		_ = client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
	}
	for _, name := range append([]string{rootNamespace}, t.namespaces...) {
		_ = client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{})
	}
}

func key(p *unstructured.Unstructured) string { return p.GetNamespace() + "/" + p.GetName() }

func (t *town) all() []*unstructured.Unstructured { return slices.Concat(t.policies, t.differing) }

// isIn tells whether w has all of the town.
func (t *town) isIn(w *mesh.World) bool {
	for _, p := range t.all() {
		if w.Policy(key(p)) == nil {
			return false
		}
	}
	for _, p := range t.pods {
		if w.Workload(address(p)) == nil {
			return false
		}
	}
	return true
}

func address(p *corev1.Pod) netip.Addr {
	a, _ := netip.ParseAddr(p.Status.PodIP)
	return a
}
