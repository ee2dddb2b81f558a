package kube

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Namespaces are enrolled by their names, by their labels, or both; a label of Tacit's counts more, and
// what cannot be understood changes nothing.
func TestNamespacesAreSelected(t *testing.T) {
	var o Objects
	for name, labels := range map[string]map[string]string{
		"named": nil, "prod": {"env": "prod"}, "test": {"env": "test"}, "off": {"env": "prod", LabelMesh: "off"}, "kube-system": {"env": "prod"},
	} {
		o.Namespaces = append(o.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
		o.Pods = append(o.Pods, KeepPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "p", UID: types.UID("u-" + name)}, Spec: corev1.PodSpec{NodeName: "n1"}}))
	}
	prod := &metav1.LabelSelector{MatchLabels: map[string]string{"env": "prod"}}
	odd := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "env", Operator: "Like"}}}
	before := Policy{Enrollment: Labeled, Selector: func() (p Policy) {
		p, _, _ = (&reader{}).understand(MeshSpec{NamespaceSelector: prod})
		return p
	}().Selector}
	for name, tt := range map[string]struct {
		spec   MeshSpec
		want   string
		faults int
	}{
		"names and labels": {spec: MeshSpec{Namespaces: []string{"named"}, NamespaceSelector: prod}, want: "[named prod]"},
		"labels alone":     {spec: MeshSpec{NamespaceSelector: prod}, want: "[prod]"},
		"all":              {spec: MeshSpec{NamespaceSelector: &metav1.LabelSelector{}}, want: "[named prod test]"},
		"nobody":           {spec: MeshSpec{Enrollment: None, Namespaces: []string{"named"}, NamespaceSelector: prod}, want: "[]"},
		"every one":        {spec: MeshSpec{Enrollment: All, NamespaceSelector: prod}, want: "[named prod test]", faults: 1},
		"odd":              {spec: MeshSpec{NamespaceSelector: odd}, want: "[prod]", faults: 1},
	} {
		o.Meshes = []*Mesh{{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: tt.spec}}
		built := Build(o, BuildConfig{TrustDomain: "lab", Namespace: "tacit-system", Before: before})
		var enrolled []string
		for _, p := range built.Pods {
			if p.Enroll {
				enrolled = append(enrolled, p.Namespace)
			}
		}
		slices.Sort(enrolled)
		if got := fmt.Sprint(enrolled); got != tt.want || len(built.Mesh.Faults) != tt.faults {
			t.Errorf("%s: enrolled %s, want %s; faults %q, want %d", name, got, tt.want, built.Mesh.Faults, tt.faults)
		}
	}
}
