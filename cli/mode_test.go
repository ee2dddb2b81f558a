package cli

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"tacit.dev/control/kube"
)

// modeCluster has a namespace shop with the Deployment db and a Mesh, and knows
// PeerAuthentications.
func modeCluster(t *testing.T) *cluster {
	t.Helper()
	at := kube.PeerResources()[0]
	mesh := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"outbound": map[string]any{"outside": "Listed"}}}}
	mesh.SetGroupVersionKind(kube.MeshResource().GroupVersion().WithKind("Mesh"))
	mesh.SetName(kube.MeshName)
	kinds := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		kube.MeshResource(): "MeshList", at: "PeerAuthenticationList",
	})
	if _, err := kinds.Resource(kube.MeshResource()).Create(t.Context(), mesh, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{at.GroupVersion()})
	mapper.Add(at.GroupVersion().WithKind(kube.PeerKind), meta.RESTScopeNamespace)
	return &cluster{
		client: fake.NewClientset(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"}, Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}},
		}),
		meshes: kinds.Resource(kube.MeshResource()), dynamic: kinds, mapper: mapper,
	}
}

// said is what the objects say of modes.
func (c *cluster) said(t *testing.T) string {
	t.Helper()
	m, err := c.mesh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	said := "mesh=" + m.Spec.Mode
	if o := m.Spec.Outbound; o != nil {
		said += "," + o.Mode + "," + o.Outside
	}
	n, err := c.client.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	said += " shop=" + n.Annotations[kube.AnnotationOutboundMode]
	list, err := c.dynamic.Resource(kube.PeerResources()[0]).Namespace("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range list.Items {
		said += fmt.Sprintf(" %s=%v", o.GetName(), o.Object["spec"])
	}
	return said
}

func TestSetMode(t *testing.T) {
	c := modeCluster(t)
	both := modeChange{kube.StrictMode, true, true}
	for _, step := range []struct {
		of     string
		change modeChange
		want   string
	}{
		{"", both, "mesh=Strict,Strict,Listed shop="},
		{"", modeChange{kube.PermissiveMode, true, false}, "mesh=Permissive,Strict,Listed shop="},
		{"shop", both, "mesh=Permissive,Strict,Listed shop=Strict default=map[mtls:map[mode:STRICT]]"},
		{"shop/db", modeChange{kube.PermissiveMode, true, false}, "mesh=Permissive,Strict,Listed shop=Strict db=map[mtls:map[mode:PERMISSIVE] selector:map[matchLabels:map[app:db]]] default=map[mtls:map[mode:STRICT]]"},
		{"shop", modeChange{kube.PermissiveMode, true, false}, "mesh=Permissive,Strict,Listed shop=Strict db=map[mtls:map[mode:PERMISSIVE] selector:map[matchLabels:map[app:db]]] default=map[mtls:map[mode:PERMISSIVE]]"},
		{"shop/db", modeChange{kube.StrictMode, true, false}, "mesh=Permissive,Strict,Listed shop=Strict db=map[mtls:map[mode:STRICT] selector:map[matchLabels:map[app:db]]] default=map[mtls:map[mode:PERMISSIVE]]"},
	} {
		var of modeTarget
		if step.of != "" {
			var err error
			if of, err = parseModeTarget([]string{step.of}); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		if err := c.setMode(t.Context(), of, step.change, &out); err != nil || !strings.Contains(out.String(), of.String()+": "+step.change.mode) {
			t.Errorf("%s: error %v, printed %q", of, err, &out)
		}
		if got := c.said(t); got != step.want {
			t.Errorf("%s: %s: want %s", of, got, step.want)
		}
	}
	if err := c.setMode(t.Context(), modeTarget{"shop", "web"}, both, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), "want a Deployment") {
		t.Errorf("a workload that is not there: %v", err)
	}
	for _, arg := range []string{"", "/", "shop/", "/db", "a/b/c"} {
		if of, err := parseModeTarget([]string{arg}); err == nil {
			t.Errorf("%q is %+v: want an error", arg, of)
		}
	}
}
