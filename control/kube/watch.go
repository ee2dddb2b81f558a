package kube

import (
	"context"
	"log/slog"
	"sync/atomic"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// optionalWatch watches a kind that an API server may not know. Nobody waits for it there:
// it is as if there were none of it, until there are.
type optionalWatch struct {
	informer cache.SharedIndexInformer
	missing  atomic.Bool // the API server does not know the kind
}

// known tells whether there is nothing more to wait for.
func (w *optionalWatch) known() bool { return w.informer.HasSynced() || w.missing.Load() }

// watchOptional makes the watch of objects like kind. Where the error is a lack of it, that is
// logged once, as told.
func (a *API) watchOptional(list *cache.ListWatch, kind runtime.Object, isLack func(error) bool, told string) (*optionalWatch, error) {
	w := &optionalWatch{informer: cache.NewSharedIndexInformer(list, kind, 0, cache.Indexers{})}
	err := w.informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		if !isLack(err) {
			a.failed(ctx, r, err)
		} else if !w.missing.Swap(true) {
			a.cfg.Log.Warn(told, "error", err)
		}
	})
	if err != nil {
		return nil, err
	}
	return w, a.ringOn(w.informer)
}

// watchServiceCIDRs watches the ranges of services, which older clusters have no objects for.
func (a *API) watchServiceCIDRs() (*optionalWatch, error) {
	// Without the right to read them the mesh works as on an older cluster.
	isLack := func(err error) bool { return apierrors.IsNotFound(err) || apierrors.IsForbidden(err) }
	ranges := a.cfg.Client.NetworkingV1().ServiceCIDRs()
	return a.watchOptional(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return ranges.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			return ranges.Watch(ctx, o)
		},
	}, &networkingv1.ServiceCIDR{}, isLack, "no objects of the kind ServiceCIDR, --cluster-cidr has to name the ranges of services")
}

func (w *optionalWatch) serviceCIDRs() (list []*networkingv1.ServiceCIDR) {
	for _, v := range w.informer.GetStore().List() {
		if c, ok := v.(*networkingv1.ServiceCIDR); ok {
			list = append(list, c)
		}
	}
	return list
}

// meshWatch watches the kind Mesh. Where it is not installed the defaults hold until it is.
type meshWatch struct{ *optionalWatch }

func (a *API) watchMeshes() (*meshWatch, error) {
	meshes := a.cfg.Client.Meshes
	w, err := a.watchOptional(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return meshes.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			return meshes.Watch(ctx, o)
		},
	}, &unstructured.Unstructured{}, apierrors.IsNotFound, "the kind Mesh is not installed, defaults hold")
	return &meshWatch{w}, err
}

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
