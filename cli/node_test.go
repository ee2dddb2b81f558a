package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"tacit.dev/control/kube"
)

// testCluster has one node and a Mesh of that status. answer is control's to what the node's
// object has become.
func testCluster(t *testing.T, status kube.MeshStatus, answer func(n *corev1.Node)) *cluster {
	t.Helper()
	client := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
	if answer != nil {
		client.PrependReactor("get", "nodes", func(a k8stesting.Action) (bool, runtime.Object, error) {
			o, err := client.Tracker().Get(a.GetResource(), "", a.(k8stesting.GetAction).GetName())
			if err == nil {
				answer(o.(*corev1.Node))
			}
			return true, o, err
		})
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&status)
	if err != nil {
		t.Fatal(err)
	}
	mesh := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": kube.MeshResource().GroupVersion().String(), "kind": "Mesh",
		"metadata": map[string]any{"name": kube.MeshName}, "status": content,
	}}
	meshes := dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()).Resource(kube.MeshResource())
	if _, err := meshes.Create(t.Context(), mesh, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return &cluster{client: client, meshes: meshes}
}

// A node is forgotten when control says so. It refuses one that is connected, and one that
// nobody knows is told apart.
func TestForgetNode(t *testing.T) {
	connected := func(n *corev1.Node) { delete(n.Annotations, kube.AnnotationLost) }
	for name, c := range map[string]struct {
		node   string
		status kube.MeshStatus
		answer func(*corev1.Node)
		want   string
	}{
		"lost":            {node: "n1", status: kube.MeshStatus{Lost: []string{"n0", "n1"}}, want: "node n1 is lost"},
		"connected":       {node: "n1", answer: connected, want: "node n1 is connected to control"},
		"returned":        {node: "n1", status: kube.MeshStatus{Lost: []string{"n1"}}, answer: connected, want: "node n1 is connected to control"},
		"unknown":         {node: "n9", want: "the cluster has no node n9"},
		"control is away": {node: "n1", want: "wait for control"},
	} {
		t.Run(name, func(t *testing.T) {
			k := testCluster(t, c.status, c.answer)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			var out bytes.Buffer
			err := k.forgetNode(ctx, c.node, &out)
			if err != nil {
				out.WriteString(err.Error())
			}
			if (err == nil) != (name == "lost") || !strings.Contains(out.String(), c.want) {
				t.Errorf("%q, error %v: want %q", out.String(), err, c.want)
			}
		})
	}
	k := testCluster(t, kube.MeshStatus{Lost: []string{"n1"}}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := k.forgetNode(ctx, "n1", &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	if n, err := k.node(t.Context(), "n1"); err != nil || n.Annotations[kube.AnnotationLost] == "" {
		t.Errorf("annotations %v, error %v: want the mark, for the next leader", n.Annotations, err)
	}
}

// The status says which nodes are waited for, since when, and what to do about each.
func TestStatusTellsWhoIsWaitedFor(t *testing.T) {
	since := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	k := testCluster(t, kube.MeshStatus{
		Waiting: []kube.WaitedNode{{Node: "n1", Since: since}, {Node: "n2", Since: since, Connected: true}}, Lost: []string{"n3"},
	}, nil)
	m, err := k.mesh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	tellNodes(&out, m)
	want := "waiting for\tnode n1, since 2026-01-02T03:04:05Z, to release pods: it is not connected. If it is lost: tacit node forget n1\n" +
		"waiting for\tnode n2, since 2026-01-02T03:04:05Z, to release pods: it is connected and has not acknowledged. Delete its pod: " +
		"kubectl --namespace tacit-system delete pod --selector app.kubernetes.io/name=tacit-node --field-selector spec.nodeName=n2\n" +
		"lost\tnode n3: nothing waits for it until it connects again\n"
	if out.String() != want {
		t.Errorf("%s\nwant\n%s", out.String(), want)
	}
}

// What control cannot save is no health.
func TestHealthIsThatOfTheMesh(t *testing.T) {
	status := kube.MeshStatus{Conditions: []metav1.Condition{{Type: kube.MeshReady, Status: metav1.ConditionFalse, Reason: "NotSaved", Message: "1 of 64 shards"}}}
	k := testCluster(t, status, nil)
	m, err := k.mesh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := (&health{control: unready(m), nodes: map[string]string{"n1": ""}}).missing(); got != "control: NotSaved: 1 of 64 shards" {
		t.Errorf("missing: %q", got)
	}
	m.Status.Conditions[0].Status = metav1.ConditionTrue
	if got := unready(m) + unready(nil) + unready(&kube.Mesh{}); got != "" {
		t.Errorf("missing: %q, want nothing", got)
	}
}
