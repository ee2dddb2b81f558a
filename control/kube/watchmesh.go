package kube

import (
	"context"
	"log/slog"
	"sync/atomic"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// meshWatch watches the kind Mesh. Where it is not installed nobody is waited for:
// the defaults hold until it is.
type meshWatch struct {
	informer cache.SharedIndexInformer
	missing  atomic.Bool // the API server does not know the kind
}

func (a *API) watchMeshes() (*meshWatch, error) {
	meshes := a.cfg.Client.Meshes
	w := &meshWatch{}
	w.informer = cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return meshes.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			return meshes.Watch(ctx, o)
		},
	}, &unstructured.Unstructured{}, 0, cache.Indexers{})
	err := w.informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		if apierrors.IsNotFound(err) {
			if !w.missing.Swap(true) {
				a.cfg.Log.Warn("the kind Mesh is not installed, defaults hold", "error", err)
			}
			return
		}
		a.failed(ctx, r, err)
	})
	if err != nil {
		return nil, err
	}
	return w, a.ringOn(w.informer)
}

// known tells whether there is nothing more to wait for.
func (w *meshWatch) known() bool { return w.informer.HasSynced() || w.missing.Load() }

func (w *meshWatch) read(log *slog.Logger) (list []*Mesh) {
	for _, v := range w.informer.GetStore().List() {
		var m Mesh
		u, ok := v.(*unstructured.Unstructured)
		if !ok {
			continue
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &m); err != nil {
			// The schema of the kind keeps this from happening. Without a spec that
			// can be read what held before holds.
			log.Error("Mesh not understood", "name", u.GetName(), "error", err)
			m = Mesh{ObjectMeta: metav1.ObjectMeta{Name: u.GetName(), Generation: u.GetGeneration()}, Spec: MeshSpec{Enrolment: "?"}}
		}
		list = append(list, &m)
	}
	return list
}
