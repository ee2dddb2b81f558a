package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"tacit.dev/pause"
)

// emptyEvery is how often the Mesh is looked at.
const emptyEvery = time.Second

// AwaitEmpty returns nil when no pod is in the mesh: then what serves the mesh can be deleted, and
// no pod is left with rules that lead to no proxy. It waits only where the Mesh says that all are
// released.
func AwaitEmpty(ctx context.Context, client Client) error {
	for {
		m, err := soleMesh(ctx, client)
		if err != nil {
			return err
		}
		if m == nil {
			return nil
		}
		left := m.Status.Pods.Enrolled + m.Status.Pods.Leaving
		known := m.Status.ObservedGeneration >= m.Generation
		switch {
		case left == 0 && known:
			return nil
		case known && m.Spec.Enrollment != None:
			return fmt.Errorf("%d pods are in the mesh, and would be left without a proxy: nothing is deleted. Set enrollment: None in the Mesh, "+
				`with kubectl patch mesh %s --type=merge --patch '{"spec":{"enrollment":"None"}}', and delete again; or run tacit uninstall`, left, MeshName)
		}
		if !pause.For(ctx, emptyEvery) {
			return fmt.Errorf("%d pods have not left the mesh yet, or control has not noticed the Mesh: nothing is deleted. See: tacit status: %w", left, ctx.Err())
		}
	}
}

// soleMesh is the Mesh of the cluster, nil if there is none, or no such kind.
func soleMesh(ctx context.Context, client Client) (*Mesh, error) {
	// list is a right that control has.
	list, err := client.Meshes.List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list Meshes: %w", err)
	}
	var errs []error
	for _, o := range list.Items {
		m := &Mesh{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, m); err != nil {
			errs = append(errs, fmt.Errorf("read Mesh %s: %w", o.GetName(), err))
		} else if m.Name == MeshName {
			return m, nil
		}
	}
	return nil, errors.Join(errs...)
}
