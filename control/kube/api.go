package kube

import (
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
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// mostQuiets bounds how long changes may put off the next word, as a multiple
// of Quiet.
const mostQuiets = 5

// APIConfig is what NewAPI needs.
type APIConfig struct {
	// Client talks to the API server. It needs list and watch for namespaces,
	// pods, services, endpointslices, nodes, servicecidrs and meshes: docs/rights.md.
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
// stay as they were last. Of each object only what Build reads is kept.
type API struct {
	cfg      APIConfig
	failures prometheus.Counter
	// changed has room for one: something is different since the last word.
	changed chan struct{}
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

// Run calls apply with all objects as soon as all are known, and again after each
// change, never twice at the same time. It returns nil when ctx ended. It is
// called once.
func (a *API) Run(ctx context.Context, apply func(Objects)) error {
	factory := informers.NewSharedInformerFactoryWithOptions(a.cfg.Client, 0, informers.WithTransform(keepRead))
	read, err := a.watch(factory)
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
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { meshes.informer.RunWithContext(ctx) })
	watching.Go(func() { ranges.informer.RunWithContext(ctx) })
	factory.Start(ctx.Done())
	for kind, synced := range factory.WaitForCacheSync(ctx.Done()) {
		if !synced && ctx.Err() == nil {
			return fmt.Errorf("watch the API server: no %v", kind)
		}
	}
	cache.WaitForCacheSync(ctx.Done(), meshes.known, ranges.known)
	for ctx.Err() == nil {
		objects, err := read()
		if err != nil {
			return fmt.Errorf("read the objects of the API server: %w", err)
		}
		objects.Meshes, objects.ServiceCIDRs = meshes.read(a.cfg.Log), ranges.serviceCIDRs()
		apply(objects)
		a.await(ctx)
	}
	return nil
}

// watch makes the informers, and returns how to read what they know.
func (a *API) watch(f informers.SharedInformerFactory) (read func() (Objects, error), err error) {
	namespaces, pods := f.Core().V1().Namespaces(), f.Core().V1().Pods()
	services, slices := f.Core().V1().Services(), f.Discovery().V1().EndpointSlices()
	nodes := f.Core().V1().Nodes()
	for _, i := range []cache.SharedIndexInformer{namespaces.Informer(), pods.Informer(), services.Informer(), slices.Informer(), nodes.Informer()} {
		if err := a.listen(i); err != nil {
			return nil, err
		}
	}
	return func() (o Objects, err error) {
		if o.Namespaces, err = namespaces.Lister().List(labels.Everything()); err != nil {
			return o, err
		}
		if o.Pods, err = pods.Lister().List(labels.Everything()); err != nil {
			return o, err
		}
		if o.Services, err = services.Lister().List(labels.Everything()); err != nil {
			return o, err
		}
		if o.Nodes, err = nodes.Lister().List(labels.Everything()); err != nil {
			return o, err
		}
		o.EndpointSlices, err = slices.Lister().List(labels.Everything())
		return o, err
	}, nil
}

func (a *API) listen(i cache.SharedIndexInformer) error {
	if err := i.SetWatchErrorHandlerWithContext(a.failed); err != nil {
		return err
	}
	return a.ringOn(i)
}

// failed is told why a watch ended; client-go begins another one.
func (a *API) failed(ctx context.Context, r *cache.Reflector, err error) {
	if ctx.Err() != nil || errors.Is(err, io.EOF) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // as watches end
	}
	a.failures.Inc()
	a.cfg.Log.Warn("watch of the API server failed, trying again", "objects", r.TypeDescription(), "error", err)
}

func (a *API) ringOn(i cache.SharedIndexInformer) error {
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { a.ring() },
		DeleteFunc: func(any) { a.ring() },
		UpdateFunc: func(before, after any) {
			if version(before) != version(after) {
				a.ring()
			}
		},
	})
	return err
}

func version(v any) string {
	m, ok := v.(metav1.Object)
	if !ok {
		return ""
	}
	return m.GetResourceVersion()
}

func (a *API) ring() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
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

// keepRead leaves of an object what Build reads: of a pod that is a tenth, and a
// cluster has many. It runs before anybody else has the object.
func keepRead(v any) (any, error) {
	switch o := v.(type) {
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: keepMeta(o.ObjectMeta)}, nil
	case *corev1.Pod:
		return keepPod(o), nil
	case *corev1.Service:
		o.ObjectMeta = keepMeta(o.ObjectMeta)
		o.Status = corev1.ServiceStatus{LoadBalancer: o.Status.LoadBalancer}
	case *discoveryv1.EndpointSlice:
		o.ObjectMeta = keepMeta(o.ObjectMeta)
	case *corev1.Node:
		return &corev1.Node{
			ObjectMeta: keepMeta(o.ObjectMeta),
			Spec:       corev1.NodeSpec{Taints: o.Spec.Taints, PodCIDR: o.Spec.PodCIDR, PodCIDRs: o.Spec.PodCIDRs},
			Status:     corev1.NodeStatus{Addresses: o.Status.Addresses},
		}, nil
	}
	return v, nil
}

func keepPod(p *corev1.Pod) *corev1.Pod {
	kept := &corev1.Pod{
		ObjectMeta: keepMeta(p.ObjectMeta),
		Spec: corev1.PodSpec{
			NodeName: p.Spec.NodeName, ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork,
			InitContainers: keepCalled(p.Spec.InitContainers), Containers: keepCalled(p.Spec.Containers),
		},
		Status: corev1.PodStatus{Phase: p.Status.Phase, StartTime: p.Status.StartTime, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs},
	}
	for _, c := range p.Status.Conditions {
		switch c.Type {
		case corev1.PodReady:
			kept.Status.Conditions = append(kept.Status.Conditions, corev1.PodCondition{Type: c.Type, Status: c.Status})
		case ConditionProtected:
			kept.Status.Conditions = append(kept.Status.Conditions, c)
		}
	}
	return kept
}
