package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// mostQuiets bounds how long changes may put off the next word, as a multiple
// of Quiet.
const mostQuiets = 5

// APIConfig is what NewAPI needs.
type APIConfig struct {
	// Client talks to the API server. It needs list and watch for namespaces,
	// pods, services, endpointslices, nodes, servicecidrs, meshes, authorizationpolicies and peerauthentications:
	// docs/rights.md.
	Client Client
	// Quiet is how long nothing must have changed before the objects are told,
	// at most five times as long after the first change. 0 means 10 ms.
	Quiet time.Duration
	// Registerer gets the metrics. nil means nowhere.
	Registerer prometheus.Registerer
	// Log gets watches that fail. nil means nowhere.
	Log *slog.Logger
}

// API is a source of objects: an API server, watched. While it is away the objects
// stay as they were last. Of each object only what Build reads is kept, and an update of
// anything else tells nobody.
type API struct {
	cfg      APIConfig
	failures prometheus.Counter
	// changed has room for one: something is different since the last word.
	changed chan struct{}
	// mu guards pending. Each informer has a goroutine that puts events there.
	mu      sync.Mutex
	pending Pending
	alike   alike
}

// NewAPI starts nothing.
func NewAPI(cfg APIConfig) *API {
	if cfg.Quiet == 0 {
		cfg.Quiet = 10 * time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &API{cfg: cfg, changed: make(chan struct{}, 1), failures: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_control_source_watch_failures_total",
		Help: "Lists and watches of the API server that failed; they are tried again.",
	})}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(a.failures)
	}
	return a
}

// Run calls apply with all objects as soon as all are known, and after that with what has
// changed, never twice at the same time. It returns nil when ctx ended. It is
// called once.
func (a *API) Run(ctx context.Context, apply func([]Event)) error {
	factory := informers.NewSharedInformerFactoryWithOptions(a.cfg.Client, 0, informers.WithTransform(a.keep))
	known, err := a.watch(factory)
	if err != nil {
		return fmt.Errorf("watch the API server: %w", err)
	}
	// Shutdown waits for what Start has started.
	defer factory.Shutdown()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	meshes, err := a.watchMeshes()
	if err != nil {
		return fmt.Errorf("watch the API server: %w", err)
	}
	ranges, err := a.watchServiceCIDRs()
	if err != nil {
		return fmt.Errorf("watch the API server: %w", err)
	}
	policies, err := a.watchPolicies()
	if err != nil {
		return fmt.Errorf("watch the API server: %w", err)
	}
	peers, err := a.watchPeers()
	if err != nil {
		return fmt.Errorf("watch the API server: %w", err)
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { meshes.informer.RunWithContext(ctx) })
	watching.Go(func() { ranges.informer.RunWithContext(ctx) })
	watching.Go(func() { policies.informer.RunWithContext(ctx) })
	watching.Go(func() { peers.informer.RunWithContext(ctx) })
	factory.Start(ctx.Done())
	cache.WaitForCacheSync(ctx.Done(), append(known, meshes.known, ranges.known, policies.known, peers.known)...)
	for first := true; ctx.Err() == nil; first = false {
		if events := a.take(); first || len(events) > 0 {
			apply(events)
		}
		a.await(ctx)
	}
	return nil
}

// watch makes the informers, and returns how to ask them whether all they found at first is
// pending.
func (a *API) watch(f informers.SharedInformerFactory) (known []cache.InformerSynced, err error) {
	for _, i := range []cache.SharedIndexInformer{
		f.Core().V1().Namespaces().Informer(), f.Core().V1().Pods().Informer(), f.Core().V1().Services().Informer(),
		f.Discovery().V1().EndpointSlices().Informer(), f.Core().V1().Nodes().Informer(),
	} {
		if err := i.SetWatchErrorHandlerWithContext(a.failed); err != nil {
			return nil, err
		}
		told, err := a.listen(i)
		if err != nil {
			return nil, err
		}
		known = append(known, told.HasSynced)
	}
	return known, nil
}

// failed is told why a watch ended; client-go begins another one.
func (a *API) failed(ctx context.Context, r *cache.Reflector, err error) {
	if ctx.Err() != nil || errors.Is(err, io.EOF) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // as watches end
	}
	a.failures.Inc()
	a.cfg.Log.Warn("watch of the API server failed, trying again", "objects", r.TypeDescription(), "error", err)
}

func (a *API) listen(i cache.SharedIndexInformer) (cache.ResourceEventHandlerRegistration, error) {
	return i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(v any) { a.put(nil, v) },
		UpdateFunc: func(before, after any) {
			x, isObject := before.(metav1.Object)
			y, areObjects := after.(metav1.Object)
			if isObject && areObjects && !same(x, y) {
				a.put(before, after)
			}
		},
		DeleteFunc: func(v any) {
			if lost, is := v.(cache.DeletedFinalStateUnknown); is {
				v = lost.Obj
			}
			a.put(v, nil)
		},
	})
}

// put takes note of how an object was, and how it is; nil is that it was, or is, not there.
func (a *API) put(before, after any) {
	object, _ := cmp.Or(after, before).(metav1.Object)
	key, ok := keyOf(object)
	if !ok {
		return
	}
	if after == nil {
		object = nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending.Put(Event{key, object}, before != nil)
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

func (a *API) take() []Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pending.Take()
}

// await blocks until something has changed and then nothing more for a while.
func (a *API) await(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-a.changed:
	}
	most := time.NewTimer(mostQuiets * a.cfg.Quiet)
	defer most.Stop()
	quiet := time.NewTimer(a.cfg.Quiet)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-most.C:
			return
		case <-quiet.C:
			return
		case <-a.changed:
			quiet.Reset(a.cfg.Quiet)
		}
	}
}

// keep is keepRead of what the API server sends.
func (a *API) keep(v any) (any, error) {
	kept, err := keepRead(v)
	if p, is := kept.(*PodObject); is {
		a.alike.share(p)
	}
	return kept, err
}

// keepRead leaves of an object what Build reads: of a pod that is a tenth, and a
// cluster has many. It runs before anybody else has the object.
func keepRead(v any) (any, error) {
	switch o := v.(type) {
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: keepMeta(o.ObjectMeta)}, nil
	case *corev1.Pod:
		return KeepPod(o), nil
	case *corev1.Service:
		return &corev1.Service{ObjectMeta: keepMeta(o.ObjectMeta), Spec: o.Spec, Status: corev1.ServiceStatus{LoadBalancer: o.Status.LoadBalancer}}, nil
	case *discoveryv1.EndpointSlice:
		return keepSlice(o), nil
	case *networkingv1.ServiceCIDR:
		return &networkingv1.ServiceCIDR{ObjectMeta: keepMeta(o.ObjectMeta), Spec: o.Spec}, nil
	case *Mesh:
		// How it was managed is long, and changes with each status.
		return &Mesh{ObjectMeta: keepMesh(o.ObjectMeta), Spec: o.Spec, Status: o.Status}, nil
	case *AuthorizationPolicy:
		return keepPolicy(o), nil
	case *PeerAuthentication:
		return keepPeer(o), nil
	case *corev1.Node:
		return &corev1.Node{
			ObjectMeta: keepMeta(o.ObjectMeta),
			Spec:       corev1.NodeSpec{Taints: o.Spec.Taints, PodCIDR: o.Spec.PodCIDR, PodCIDRs: o.Spec.PodCIDRs},
			Status:     corev1.NodeStatus{Addresses: o.Status.Addresses},
		}, nil
	}
	return v, nil
}

// keepSlice leaves out what is a hint only, and who wrote it.
func keepSlice(s *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	kept := &discoveryv1.EndpointSlice{ObjectMeta: keepMeta(s.ObjectMeta), AddressType: s.AddressType, Ports: s.Ports}
	for _, e := range s.Endpoints {
		k := discoveryv1.Endpoint{Addresses: e.Addresses, Conditions: e.Conditions, NodeName: e.NodeName, Zone: e.Zone}
		if r := e.TargetRef; r != nil {
			k.TargetRef = &corev1.ObjectReference{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, UID: r.UID}
		}
		kept.Endpoints = append(kept.Endpoints, k)
	}
	return kept
}
