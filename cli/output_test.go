package cli

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"tacit.dev/control/kube"
	"tacit.dev/wire/finding"
)

// installedCluster has a mesh of one node, with one protected pod.
func installedCluster(t *testing.T) *cluster {
	t.Helper()
	one := int32(1)
	control := controlOf("meta.helm.sh/release-name=tacit", "app.kubernetes.io/version=v1")
	control.Spec.Replicas = &one
	control.Status = appsv1.DeploymentStatus{Replicas: 1, UpdatedReplicas: 1, ReadyReplicas: 1}
	ready := corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
	c := clusterWith(t, true, control, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: nodesName, Namespace: namespace}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "tacit-node-1", Namespace: namespace, UID: "u1", Labels: map[string]string{"app.kubernetes.io/name": nodesName}}, Spec: corev1.PodSpec{NodeName: "n1"}, Status: ready},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{kube.LabelMesh: "on"}}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "u2"}, Spec: corev1.PodSpec{NodeName: "n1"},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: kube.ConditionProtected, Status: corev1.ConditionTrue, Reason: kube.Captured}}}})
	mesh := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": kube.MeshResource().GroupVersion().String(), "kind": "Mesh", "metadata": map[string]any{"name": kube.MeshName},
		"spec": map[string]any{}, "status": map[string]any{"nodes": map[string]any{"ready": int64(1), "total": int64(1)}},
	}}
	if _, err := c.meshes.Create(t.Context(), mesh, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return c
}

// Programs read what people do, as JSON or YAML.
func TestStatusForPrograms(t *testing.T) {
	for _, format := range []output{"json", "yaml"} {
		var out bytes.Buffer
		if err := installedCluster(t).status(t.Context(), &out, format); err != nil {
			t.Fatal(err)
		}
		var got statusReport
		if err := yaml.UnmarshalStrict(out.Bytes(), &got); err != nil {
			t.Fatalf("%v:\n%s", err, out.String())
		}
		h := got.Health
		if !got.Installed || got.Version != "v1" || got.InstalledBy != "Helm (release tacit)" || !h.Well || len(h.Nodes) != 1 || len(h.Pods) != 1 || !h.Pods[0].Protected || got.Mesh.Nodes.Total != 1 {
			t.Errorf("%s", out.String())
		}
		if isJSON := json.Valid(out.Bytes()); isJSON != (format == "json") {
			t.Errorf("-o %s prints\n%s", format, out.String())
		}
	}
	var out bytes.Buffer
	if err := clusterWith(t, false).status(t.Context(), &out, "json"); err != nil || strings.TrimSpace(out.String()) != "{\n  \"installed\": false\n}" {
		t.Errorf("not installed: %v, %s", err, out.String())
	}
}

func TestCheckForPrograms(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out)
	if err := installedCluster(t).checkAfter(t.Context(), p, "json"); err != nil || !strings.Contains(out.String(), `"well": true`) || !json.Valid(out.Bytes()) {
		t.Errorf("%v:\n%s", err, out.String())
	}
	out.Reset()
	c := installedCluster(t)
	if err := c.client.CoreV1().Pods(namespace).Delete(t.Context(), "tacit-node-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.checkAfter(t.Context(), p, "json"); err != lacking || !strings.Contains(out.String(), `"missing": "nodes, 0 of 1 are ready: n1 (no pod yet)"`) {
		t.Errorf("%v:\n%s", err, out.String())
	}
	r := &report{}
	r.add("n1", finding.Finding{What: "rules", Lacks: "no nft", Remedy: "load it"})
	if got := r.requirements(); got.Met || len(got.Requirements) != 1 || got.Requirements[0] != (requirementReport{Node: "n1", What: "rules", Lacks: "no nft", Remedy: "load it"}) {
		t.Errorf("%+v", got)
	}
	if o := new(output); o.Set("table") == nil {
		t.Error("-o table is taken")
	}
}

// Whoever has the rights of view, which has no nodes and no Secrets, sees the status.
func TestStatusTakesNoSecrets(t *testing.T) {
	c := installedCluster(t)
	c.records = nil
	c.client.(*fake.Clientset).PrependReactor("*", "*", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if r := a.GetResource(); r.Resource == "nodes" || r.Resource == "secrets" {
			return true, nil, apierrors.NewForbidden(r.GroupResource(), "", nil)
		}
		return false, nil, nil
	})
	var out bytes.Buffer
	if err := c.status(t.Context(), &out, ""); err != nil || !strings.Contains(out.String(), "1 of 1 ready") || !strings.Contains(out.String(), "1 of 1 enrolled pods protected") {
		t.Errorf("%v:\n%s", err, out.String())
	}
}

func TestVersions(t *testing.T) {
	c := installedCluster(t)
	v := versions{Client: "v2"}
	if err := c.versions(t.Context(), &v); err != nil || v.Mesh != "v1" || v.Kubernetes == "" {
		t.Errorf("%+v, %v", v, err)
	}
	v.Kubernetes = "v1.36.0"
	for server, want := range map[bool]string{false: "v2\n", true: "v2\nmesh v1\nKubernetes v1.36.0\n"} {
		var out bytes.Buffer
		if err := v.print(&out, "", server); err != nil || out.String() != want {
			t.Errorf("%q, %v, want %q", out.String(), err, want)
		}
	}
}

func TestImages(t *testing.T) {
	v := &valueFlags{}
	v.options.Values = []string{"image.registry=r.example/t"}
	got, err := images(t.Context(), "v1", v)
	if want := []string{"r.example/t/tacit-control:v1", "r.example/t/tacit-node:v1"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

// Flags that kubectl's users know are those of each verb that speaks with a cluster.
func TestFlagsOfKubectl(t *testing.T) {
	for _, cmd := range []*cobra.Command{installCommand("v1"), uninstallCommand("v1"), checkCommand("v1"), statusCommand(), versionCommand("v1")} {
		for _, name := range []string{"kubeconfig", "context", "as", "as-group", "request-timeout"} {
			if cmd.Flags().Lookup(name) == nil {
				t.Errorf("tacit %s has no --%s", cmd.Name(), name)
			}
		}
	}
}
