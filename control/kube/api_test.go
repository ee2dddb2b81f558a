package kube

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// What API drops of an object is nothing that Build reads.
func TestBuildMissesNothingThatAPIDrops(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("%d files, %v", len(paths), err)
	}
	for _, path := range paths {
		a, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		whole, _ := archive(t, a)
		want := text(Build(whole, labConfig))
		kept, _ := archive(t, a)
		keepAll(t, kept.Namespaces)
		keepAll(t, kept.Pods)
		keepAll(t, kept.Services)
		keepAll(t, kept.EndpointSlices)
		keepAll(t, kept.Nodes)
		keepAll(t, kept.ServiceCIDRs)
		keepAll(t, kept.Meshes)
		keepAll(t, kept.Policies)
		if diff := cmp.Diff(want, text(Build(kept, labConfig))); diff != "" {
			t.Errorf("%s: (-whole +kept)\n%s", path, diff)
		}
	}
}

func keepAll[T any](t *testing.T, list []T) {
	t.Helper()
	for i, v := range list {
		kept, err := keepRead(v)
		if err != nil {
			t.Fatal(err)
		}
		list[i] = kept.(T)
	}
}

// What is told is what has changed of what Build reads: another's field, or one that nobody
// reads, is no news.
func TestAPITellsOfChanges(t *testing.T) {
	pod := func(name, version string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, ResourceVersion: version}, Spec: corev1.PodSpec{NodeName: "n1"}}
		if change != nil {
			change(p)
		}
		return p
	}
	client := fake.NewClientset(pod("a", "1", nil), pod("b", "2", nil), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default", ResourceVersion: "3"}})
	mesh := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"enrollment": "All"}}}
	mesh.SetGroupVersionKind(MeshResource().GroupVersion().WithKind("Mesh"))
	mesh.SetName(MeshName)
	older := PolicyResources()[1]
	meshes := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		MeshResource(): "MeshList", PolicyResources()[0]: "AuthorizationPolicyList", older: "AuthorizationPolicyList",
		PeerResources()[0]: "PeerAuthenticationList", PeerResources()[1]: "PeerAuthenticationList",
	})
	// The newer version is not there, as before Istio 1.22.
	meshes.PrependReactor("*", older.Resource, func(a clienttesting.Action) (bool, runtime.Object, error) {
		return a.GetResource() != older, nil, apierrors.NewNotFound(older.GroupResource(), "")
	})
	policy := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"action": "DENY"}, "status": map[string]any{"conditions": "odd"}}}
	policy.SetGroupVersionKind(older.GroupVersion().WithKind("AuthorizationPolicy"))
	policy.SetNamespace("default")
	policy.SetName("p")
	if err := meshes.Tracker().Create(older, policy, "default"); err != nil {
		t.Fatal(err)
	}
	if err := meshes.Tracker().Create(MeshResource(), mesh, ""); err != nil {
		t.Fatal(err)
	}
	peer := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"mtls": map[string]any{"mode": "STRICT"}}}}
	peer.SetGroupVersionKind(PeerResources()[0].GroupVersion().WithKind(PeerKind))
	peer.SetNamespace("default")
	peer.SetName("strict")
	if err := meshes.Tracker().Create(PeerResources()[0], peer, "default"); err != nil {
		t.Fatal(err)
	}
	client.PrependWatchReactor("*", noWatchList)
	meshes.PrependWatchReactor("*", noWatchList)
	api := NewAPI(APIConfig{Client: Client{Interface: client, Meshes: meshes.Resource(MeshResource()), Policies: Policies(meshes), Peers: Peers(meshes)}, Quiet: time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	told, ended := make(chan string, 100), make(chan error, 1)
	go func() {
		ended <- api.Run(ctx, func(events []Event) { told <- eventNames(events) })
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	await := func(want string) {
		t.Helper()
		select {
		case got := <-told:
			if got != want {
				t.Errorf("told %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing told, want %q", want)
		}
	}
	update := func(p *corev1.Pod) {
		t.Helper()
		if _, err := client.CoreV1().Pods(p.Namespace).Update(ctx, p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	await("default default default/a default/b default/p default/strict")
	update(pod("a", "4", func(p *corev1.Pod) {
		p.Status.Message, p.Finalizers = "nobody reads this", []string{"nor.this/x"}
	}))
	update(pod("b", "5", func(p *corev1.Pod) { p.Status.PodIP = "10.0.0.1" }))
	await("default/b")
	update(pod("b", "6", func(p *corev1.Pod) {
		p.Status.PodIP = "10.0.0.1"
		p.Status.Conditions = []corev1.PodCondition{{Type: ConditionProtected, Status: "True"}}
	}))
	await("default/b")
	if err := client.CoreV1().Pods("default").Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await("-default/a")
}

// noWatchList refuses a watch that begins with a list, which the fakes have not learned: the
// client then lists first.
func noWatchList(a clienttesting.Action) (bool, apiwatch.Interface, error) {
	w, is := a.(clienttesting.WatchActionImpl)
	return is && w.ListOptions.SendInitialEvents != nil, nil, errors.New("no such watch")
}
