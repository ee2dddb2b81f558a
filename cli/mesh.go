package cli

import (
	"context"
	"encoding/json"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"tacit.dev/control/kube"
)

// kindResource is where kinds themselves are served.
var kindResource = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// mesh is the Mesh of the cluster, nil if there is none, or no such kind.
func (c *cluster) mesh(ctx context.Context) (*kube.Mesh, error) {
	o, err := c.meshes.Get(ctx, kube.MeshName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	m := &kube.Mesh{}
	if err == nil {
		err = runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, m)
	}
	if err != nil {
		return nil, fmt.Errorf("read Mesh %s: %w", kube.MeshName, err)
	}
	return m, nil
}

// ensureMesh makes the Mesh if there is none. The kind may be a moment old, and not
// served yet.
func (c *cluster) ensureMesh(ctx context.Context, p *progress, spec map[string]any) error {
	m := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": kube.MeshResource().GroupVersion().String(), "kind": "Mesh",
		"metadata": map[string]any{"name": kube.MeshName}, "spec": spec,
	}}
	return p.await(ctx, func(ctx context.Context) (string, error) {
		_, err := c.meshes.Create(ctx, m, metav1.CreateOptions{})
		if err == nil || apierrors.IsAlreadyExists(err) {
			return "", nil
		}
		if apierrors.IsNotFound(err) {
			return "the kind Mesh", nil
		}
		return "", err
	})
}

// enrollNobody tells control to release every pod, and returns what the Mesh said
// before, nil if it was not there.
func (c *cluster) enrollNobody(ctx context.Context, p *progress) (before *kube.MeshSpec, err error) {
	m, err := c.mesh(ctx)
	if err != nil {
		return nil, err
	}
	if m != nil {
		before = &m.Spec
	} else if err := c.ensureMesh(ctx, p, map[string]any{"enrollment": kube.None}); err != nil {
		return nil, err
	}
	// Said also of a Mesh that was not there: control may have made it in between.
	return before, c.setEnrollment(ctx, kube.None)
}

func (c *cluster) setEnrollment(ctx context.Context, enrollment string) error {
	return c.changeMesh(ctx, map[string]any{"enrollment": enrollment})
}

// changeMesh merges spec into that of the Mesh.
func (c *cluster) changeMesh(ctx context.Context, spec any) error {
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		return err
	}
	if _, err := c.meshes.Patch(ctx, kube.MeshName, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("change Mesh %s: %w", kube.MeshName, err)
	}
	return nil
}

// inMesh says which pods are still in the mesh, or on their way out, "" if none is.
// enrolled counts only the first, and is positive while it is not known.
func (c *cluster) inMesh(ctx context.Context) (enrolled int32, missing string, err error) {
	m, err := c.mesh(ctx)
	if err != nil || m == nil {
		return 1, "the Mesh", err
	}
	s := m.Status
	switch {
	case s.ObservedGeneration < m.Generation:
		return 1, "control to take notice", nil
	case s.Pods.Enrolled+s.Pods.Leaving > 0:
		return s.Pods.Enrolled, fmt.Sprintf("pods to leave the mesh: %d enrolled, %d leaving", s.Pods.Enrolled, s.Pods.Leaving), nil
	}
	return 0, "", nil
}

// removeKinds removes the kinds that the chart has brought, with all objects of them, and waits for
// their end. One that somebody else has taken over, as Istio may, stays.
func (c *cluster) removeKinds(ctx context.Context, p *progress) error {
	kinds := c.dynamic.Resource(kindResource)
	list, err := kinds.List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=" + program})
	if err != nil {
		return fmt.Errorf("list the kinds of the mesh: %w", err)
	}
	for _, k := range list.Items {
		if by := k.GetAnnotations()[helmMark]; by != "" && by != releaseName {
			p.say("kind %s stays: release %s has it now", k.GetName(), by)
			continue
		}
		if err := kinds.Delete(ctx, k.GetName(), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove kind %s: %w", k.GetName(), err)
		}
		err := p.await(ctx, func(ctx context.Context) (string, error) {
			_, err := kinds.Get(ctx, k.GetName(), metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return "", nil
			}
			return "the end of kind " + k.GetName(), err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
