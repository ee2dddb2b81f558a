package kube

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
)

// What serves the mesh is not deleted while a pod is in it.
func TestNothingIsDeletedWhilePodsAreInTheMesh(t *testing.T) {
	mesh := func(enrollment string, observed, enrolled, leaving int64) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": MeshResource().GroupVersion().String(), "kind": "Mesh",
			"metadata": map[string]any{"name": MeshName, "generation": int64(2)},
			"spec":     map[string]any{"enrollment": enrollment},
			"status":   map[string]any{"observedGeneration": observed, "pods": map[string]any{"enrolled": enrolled, "leaving": leaving}},
		}}
	}
	for name, tt := range map[string]struct {
		mesh  *unstructured.Unstructured
		later *unstructured.Unstructured // what it is two seconds later
		want  string                     // of the error, "" for none
	}{
		"no Mesh":           {},
		"nobody":            {mesh: mesh(Labeled, 2, 0, 0)},
		"somebody":          {mesh: mesh(Labeled, 2, 3, 0), want: "3 pods are in the mesh"},
		"somebody leaves":   {mesh: mesh(Labeled, 2, 0, 1), want: "1 pods are in the mesh"},
		"all leave":         {mesh: mesh(None, 2, 0, 3), later: mesh(None, 2, 0, 0)},
		"not noticed yet":   {mesh: mesh(None, 1, 0, 0), later: mesh(None, 2, 0, 0)},
		"never noticed":     {mesh: mesh(None, 1, 0, 0), want: "have not left the mesh yet"},
		"some do not leave": {mesh: mesh(None, 2, 0, 2), want: "2 pods have not left the mesh yet"},
		"spec not heeded":   {mesh: mesh(All, 1, 0, 0), want: "control has not noticed"},
	} {
		t.Run(name, func(t *testing.T) {
			client := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{MeshResource(): "MeshList"})
			meshes := client.Resource(MeshResource())
			if tt.mesh != nil {
				if _, err := meshes.Create(t.Context(), tt.mesh, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if tt.later != nil {
					change := time.AfterFunc(1500*time.Millisecond, func() { meshes.Update(ctx, tt.later, metav1.UpdateOptions{}) })
					defer change.Stop()
				}
				err := AwaitEmpty(ctx, Client{Meshes: meshes})
				if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
					t.Errorf("error %v, want %q", err, tt.want)
				}
			})
		})
	}
}
