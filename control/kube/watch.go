package kube

import (
	"context"
	"encoding/json"
	"sync/atomic"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
)

// optionalWatch watches a kind that an API server may not know. Nobody waits for it there:
// it is as if there were none of it, until there are.
type optionalWatch struct {
	informer cache.SharedIndexInformer
	told     cache.ResourceEventHandlerRegistration
	missing  atomic.Bool // the API server does not know the kind
}

// known tells whether there is nothing more to wait for.
func (w *optionalWatch) known() bool { return w.told.HasSynced() || w.missing.Load() }

// watchOptional makes the watch of objects like kind. Where the error is a lack of it, that is
// logged once, as told. keep is keepRead, or begins with something else.
func (a *API) watchOptional(list *cache.ListWatch, kind runtime.Object, keep cache.TransformFunc, isLack func(error) bool, told string) (*optionalWatch, error) {
	w := &optionalWatch{informer: cache.NewSharedIndexInformer(list, kind, 0, cache.Indexers{})}
	err := w.informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		if !isLack(err) {
			a.failed(ctx, r, err)
		} else if !w.missing.Swap(true) {
			a.cfg.Log.Warn(told, "error", err)
		}
	})
	if err == nil {
		err = w.informer.SetTransform(keep)
	}
	if err == nil {
		w.told, err = a.listen(w.informer)
	}
	return w, err
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
	}, &networkingv1.ServiceCIDR{}, keepRead, isLack, "no objects of the kind ServiceCIDR, --cluster-cidr has to name the ranges of services")
}

// watchMeshes watches the kind Mesh. Where it is not installed the defaults hold until it is.
func (a *API) watchMeshes() (*optionalWatch, error) {
	meshes := a.cfg.Client.Meshes
	return a.watchOptional(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return meshes.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			return meshes.Watch(ctx, o)
		},
	}, &unstructured.Unstructured{}, a.readMesh, apierrors.IsNotFound, "the kind Mesh is not installed, defaults hold")
}

// readMesh makes a Mesh of what the API server sends.
func (a *API) readMesh(v any) (any, error) {
	u, is := v.(*unstructured.Unstructured)
	if !is {
		return keepRead(v)
	}
	var m Mesh
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &m); err != nil {
		// The schema of the kind keeps this from happening. Without a spec that
		// can be read what held before holds.
		a.cfg.Log.Error("Mesh not understood", "name", u.GetName(), "error", err)
		m = Mesh{ObjectMeta: metav1.ObjectMeta{Name: u.GetName(), ResourceVersion: u.GetResourceVersion(), Generation: u.GetGeneration()}, Spec: MeshSpec{Enrollment: "?", Mode: "?", Outbound: &MeshOutbound{Mode: "?", Outside: "?"}}}
	}
	return keepRead(&m)
}

// watchPolicies watches the kind AuthorizationPolicy, in the first version that there is.
// Where it is not installed, as before Istio 1.22 the first version, there are no policies.
func (a *API) watchPolicies() (*optionalWatch, error) {
	return a.watchVersions(a.cfg.Client.Policies, a.readPolicy, "the kind AuthorizationPolicy is not installed, there are no policies")
}

// watchPeers watches the kind PeerAuthentication in the same way.
func (a *API) watchPeers() (*optionalWatch, error) {
	return a.watchVersions(a.cfg.Client.Peers, a.readPeer, "the kind PeerAuthentication is not installed, the Mesh says all modes")
}

func (a *API) watchVersions(versions []dynamic.NamespaceableResourceInterface, read cache.TransformFunc, told string) (*optionalWatch, error) {
	return a.watchOptional(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return firstFound(versions, func(r dynamic.NamespaceableResourceInterface) (runtime.Object, error) { return r.List(ctx, o) })
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			return firstFound(versions, func(r dynamic.NamespaceableResourceInterface) (apiwatch.Interface, error) { return r.Watch(ctx, o) })
		},
	}, &unstructured.Unstructured{}, read, apierrors.IsNotFound, told)
}

// firstFound asks for each version of a kind until the API server knows one.
func firstFound[T any](versions []dynamic.NamespaceableResourceInterface, ask func(dynamic.NamespaceableResourceInterface) (T, error)) (found T, err error) {
	for _, v := range versions {
		if found, err = ask(v); !apierrors.IsNotFound(err) {
			return found, err
		}
	}
	return found, err
}

// readPolicy makes an AuthorizationPolicy of what the API server sends. One that cannot be
// read denies.
func (a *API) readPolicy(v any) (any, error) {
	u, is := v.(*unstructured.Unstructured)
	if !is {
		return keepRead(v)
	}
	p := AuthorizationPolicy{ObjectMeta: metaOf(u)}
	p.Spec, p.Status = a.rawOf(u)
	return keepRead(&p)
}

// readPeer makes a PeerAuthentication of it. One that cannot be read is strict.
func (a *API) readPeer(v any) (any, error) {
	u, is := v.(*unstructured.Unstructured)
	if !is {
		return keepRead(v)
	}
	p := PeerAuthentication{ObjectMeta: metaOf(u)}
	p.Spec, p.Status = a.rawOf(u)
	return keepRead(&p)
}

func metaOf(u *unstructured.Unstructured) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: u.GetNamespace(), Name: u.GetName(), UID: u.GetUID(), ResourceVersion: u.GetResourceVersion(), Generation: u.GetGeneration(),
		Annotations: u.GetAnnotations(), CreationTimestamp: u.GetCreationTimestamp(),
	}
}

// rawOf are the spec and the status as they came. A spec that cannot be read is nobody's.
func (a *API) rawOf(u *unstructured.Unstructured) (spec json.RawMessage, s PolicyStatus) {
	spec, err := json.Marshal(u.Object["spec"])
	if err != nil {
		a.cfg.Log.Error("object not understood", "kind", u.GetKind(), "namespace", u.GetNamespace(), "name", u.GetName(), "error", err)
		spec = json.RawMessage(`"?"`)
	}
	if status, err := json.Marshal(u.Object["status"]); err == nil && len(status) <= maxPolicyStatus {
		_ = s.UnmarshalJSON(status) // never fails
	}
	return spec, s
}
