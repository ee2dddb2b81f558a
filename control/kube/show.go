package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/util/flowcontrol"

	"tacit.dev/mesh"
)

const (
	// fieldManager owns what control writes into the objects of others.
	fieldManager = "tacit-control"
	// DefaultStatusWrites is how many conditions of pods are written per second at most, writers
	// how many at once.
	DefaultStatusWrites = 100
	writers             = 8
	// echo is how long a write is taken to be on its way back to us.
	echo = 5 * time.Second
	// makeEvery is how often a Mesh is tried to be made at most.
	makeEvery = 30 * time.Second
)

// View is what people should see, where it differs from what they see.
type View struct {
	// Pods whose condition has to change.
	Pods []PodView
	// Mesh is the status of the Mesh; nil if there is none, or it shows it already.
	Mesh *MeshStatus
	// Policies whose conditions have to change.
	Policies []PolicyView
	// NoMesh: there is none, and so no place for a status.
	NoMesh bool
	// Untaint are nodes that are ready, and still tainted with TaintNotReady.
	Untaint []Node
	// Returned are nodes that have AnnotationLost, and are connected.
	Returned []Node
}

// PodView is one pod's condition, as it is and as it should be.
type PodView struct {
	UID, Namespace, Name string
	Is, Want             Condition
}

// Display shows people how far the mesh is, where they look for it: in a condition
// of each pod, in the status of the Mesh, and in events. It writes nothing twice. One
// goroutine uses it.
type Display struct {
	client  Client
	log     *slog.Logger
	limit   flowcontrol.RateLimiter
	mu      sync.Mutex // guards written; workers write several pods at once
	written map[string]written
	// policies are the conditions of policies that were written, by NAMESPACE/NAME.
	policies map[string]writtenPolicy
	// tried is when a Mesh was last made, or not: see makeMesh.
	tried time.Time
}

type written struct {
	c  Condition
	at time.Time
}

// NewDisplay writes nothing. It needs patch of pods/status, meshes/status,
// authorizationpolicies/status and nodes, and create of events and meshes. It writes conditions of
// pods so many times per second at most; 0 means DefaultStatusWrites. A nil log means nowhere.
func NewDisplay(c Client, perSecond int, log *slog.Logger) *Display {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if c.Shows == nil {
		c.Shows = c.Interface
	}
	perSecond = cmp.Or(perSecond, DefaultStatusWrites)
	return &Display{client: c, log: log, limit: flowcontrol.NewTokenBucketRateLimiter(float32(perSecond), perSecond), written: make(map[string]written), policies: make(map[string]writtenPolicy)}
}

// Show writes what differs. What fails is in the error, and not written; the caller
// comes again with what then still differs.
func (d *Display) Show(ctx context.Context, v View) error {
	d.forget(time.Now())
	errs := []error{d.showPods(ctx, v.Pods), d.showMesh(ctx, v.Mesh), d.showPolicies(ctx, v.Policies)}
	if v.NoMesh && time.Since(d.tried) > makeEvery {
		d.tried = time.Now()
		errs = append(errs, d.makeMesh(ctx))
	}
	for _, node := range v.Untaint {
		errs = append(errs, d.untaint(ctx, node))
	}
	for _, node := range v.Returned {
		errs = append(errs, d.unmark(ctx, node))
	}
	return errors.Join(errs...)
}

// forget drops writes whose echo must have come. d.written is not shared here.
func (d *Display) forget(now time.Time) {
	for uid, w := range d.written {
		if now.Sub(w.at) > echo {
			delete(d.written, uid)
		}
	}
	for key, w := range d.policies {
		if now.Sub(w.at) > echo {
			delete(d.policies, key)
		}
	}
}

// showPods tells one of the errors: a server that refuses one refuses many.
func (d *Display) showPods(ctx context.Context, pods []PodView) error {
	queue := make(chan PodView)
	failed := make(chan error, writers)
	var running sync.WaitGroup
	for range min(writers, len(pods)) {
		running.Go(func() { failed <- d.work(ctx, queue) })
	}
	for _, p := range pods {
		if w, ok := d.wrote(p.UID); ok && w.Same(p.Want) {
			continue
		}
		queue <- p
	}
	close(queue)
	running.Wait()
	close(failed)
	var err error
	for e := range failed {
		err = errors.Join(err, e)
	}
	return err
}

func (d *Display) wrote(uid string) (Condition, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w, ok := d.written[uid]
	return w.c, ok
}

// work empties the queue, and returns the first error.
func (d *Display) work(ctx context.Context, queue <-chan PodView) (first error) {
	for p := range queue {
		err := d.limit.Wait(ctx)
		if err == nil {
			err = d.showPod(ctx, p)
		}
		if err == nil {
			d.mu.Lock()
			d.written[p.UID] = written{p.Want, time.Now()}
			d.mu.Unlock()
		} else if first == nil {
			first = fmt.Errorf("show condition of pod %s/%s: %w", p.Namespace, p.Name, err)
		}
	}
	return first
}

// showPod applies the condition, or its absence: the server removes what we owned
// and do not mention any more. The kubelet leaves conditions alone that are not its own.
func (d *Display) showPod(ctx context.Context, p PodView) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	status := applycorev1.PodStatus()
	if p.Want.Status != "" {
		since := metav1.Now()
		if p.Want.Status == p.Is.Status {
			since = metav1.NewTime(p.Is.Since)
		}
		status = status.WithConditions(applycorev1.PodCondition().WithType(ConditionProtected).
			WithStatus(corev1.ConditionStatus(p.Want.Status)).WithReason(p.Want.Reason).WithMessage(p.Want.Message).WithLastTransitionTime(since))
	}
	pod := applycorev1.Pod(p.Name, p.Namespace).WithUID(types.UID(p.UID)).WithStatus(status)
	_, err := d.client.Shows.CoreV1().Pods(p.Namespace).ApplyStatus(ctx, pod, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // the pod is gone, or another one of that name is there
	}
	if reason := warnings[p.Want.Reason]; err == nil && reason != "" && p.Is.Reason != p.Want.Reason {
		d.event(ctx, p, reason)
	}
	return err
}

// warnings are the reasons of events, by those of conditions.
var warnings = map[string]string{NotCaptured: "NotProtected", PartlyProtected: PartlyProtected}

// event is a courtesy: the condition says the same, and one that is lost is lost.
func (d *Display) event(ctx context.Context, p PodView, reason string) {
	now := metav1.Now()
	_, err := d.client.Shows.CoreV1().Events(p.Namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: p.Namespace, GenerateName: p.Name + "."},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)},
		Type:           corev1.EventTypeWarning, Reason: reason, Message: p.Want.Message,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: corev1.EventSource{Component: fieldManager}, ReportingController: fieldManager,
	}, metav1.CreateOptions{})
	if err != nil {
		d.log.Debug("event not written", "pod", p.Namespace+"/"+p.Name, "error", err)
	}
}

// makeMesh makes the Mesh with all its defaults, which changes nothing but that there
// is a status to look at. Who has taken the right away, or not installed the kind,
// does without.
func (d *Display) makeMesh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{}}}
	u.SetGroupVersionKind(MeshResource().GroupVersion().WithKind("Mesh"))
	u.SetName(MeshName)
	_, err := d.client.Meshes.Create(ctx, u, metav1.CreateOptions{FieldManager: fieldManager})
	switch {
	case err == nil:
		d.log.Info("Mesh made", "name", MeshName)
	case apierrors.IsForbidden(err):
		d.log.Warn("no Mesh, and no right to make one: its status is shown nowhere", "error", err)
	case apierrors.IsNotFound(err):
		d.tried = time.Time{} // the kind may be installed at any moment
	case !apierrors.IsAlreadyExists(err):
		return fmt.Errorf("make the Mesh: %w", err)
	}
	return nil
}

func (d *Display) showMesh(ctx context.Context, s *MeshStatus) error {
	if s == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(s)
	if err != nil {
		return fmt.Errorf("show status of the Mesh: %w", err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": content}}
	u.SetGroupVersionKind(MeshResource().GroupVersion().WithKind("Mesh"))
	u.SetName(MeshName)
	_, err = d.client.Meshes.ApplyStatus(ctx, MeshName, u, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("show status of the Mesh: %w", err)
	}
	return nil
}

// untaint removes the taint if the node's taints are still those that we know: they
// cannot be patched one by one.
func (d *Display) untaint(ctx context.Context, n Node) error {
	left := slices.DeleteFunc(slices.Clone(n.Taints), isNotReady)
	err := d.patchNode(ctx, n.Name, []map[string]any{
		{"op": "test", "path": "/spec/taints", "value": n.Taints},
		{"op": "replace", "path": "/spec/taints", "value": left},
	})
	if err != nil {
		return fmt.Errorf("remove taint %s of node %s: %w", TaintNotReady, n.Name, err)
	}
	d.log.Info("startup taint removed", "node", n.Name)
	return nil
}

// unmark removes AnnotationLost if it is still the one that we know.
func (d *Display) unmark(ctx context.Context, n Node) error {
	path := "/metadata/annotations/" + strings.ReplaceAll(AnnotationLost, "/", "~1")
	err := d.patchNode(ctx, n.Name, []map[string]any{
		{"op": "test", "path": path, "value": n.Lost},
		{"op": "remove", "path": path},
	})
	if err != nil {
		return fmt.Errorf("remove annotation %s of node %s: %w", AnnotationLost, n.Name, err)
	}
	return nil
}

// patchNode does nothing to a node that is not there any more.
func (d *Display) patchNode(ctx context.Context, name string, operations []map[string]any) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	patch, err := json.Marshal(operations)
	if err == nil {
		_, err = d.client.CoreV1().Nodes().Patch(ctx, name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Summary is what a MeshStatus is made of.
type Summary struct {
	Facts       MeshFacts
	TrustDomain string
	Pods        PodCounts
	Nodes       NodeCounts
	// Waiting, Behind and Lost are ordered by name.
	Waiting    []WaitedNode
	Behind     []BehindNode
	Lost       []string
	Exceptions []Exception
	// Unsaved is why not everything is saved that must be remembered, nil if it is.
	Unsaved error
	// Unprotected are ordered by name.
	Unprotected []UnprotectedPod
}

// Status is what the Mesh should show, and whether it does not. Times of conditions
// that stay as they are stay, too.
func (s Summary) Status(now time.Time) (status MeshStatus, differs bool) {
	status = MeshStatus{
		ObservedGeneration: s.Facts.Generation, TrustDomain: s.TrustDomain,
		Mode: modeName(s.Facts.Effective.Inbound), OutboundMode: modeName(s.Facts.Effective.Outbound), Pods: s.Pods, Nodes: s.Nodes,
		Waiting: s.Waiting[:min(len(s.Waiting), MostListed)], Behind: s.Behind[:min(len(s.Behind), MostListed)], Lost: s.Lost[:min(len(s.Lost), mostLost)],
		Exceptions: Count(s.Exceptions), Unprotected: s.Unprotected[:min(len(s.Unprotected), MostListed)],
		Conditions: slices.Clone(s.Facts.Shown.Conditions),
	}
	status.Pods.Exceptions = int32(len(s.Exceptions))
	for _, c := range []metav1.Condition{s.ready(), s.protected()} {
		c.ObservedGeneration, c.LastTransitionTime = s.Facts.Generation, metav1.NewTime(now)
		meta.SetStatusCondition(&status.Conditions, c)
	}
	is, _ := json.Marshal(s.Facts.Shown)
	want, _ := json.Marshal(status)
	return status, string(is) != string(want)
}

func modeName(l mesh.Level) string {
	if l == mesh.Strict {
		return StrictMode
	}
	return PermissiveMode
}

func (s Summary) ready() metav1.Condition {
	c := metav1.Condition{Type: MeshReady, Status: metav1.ConditionTrue, Reason: "Serving", Message: "control serves nodes"}
	if s.Unsaved != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "NotSaved", fmt.Sprintf("pods that are captured are not announced: %.4000s", s.Unsaved)
	} else if len(s.Facts.Faults) > 0 {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "NotUnderstood", fmt.Sprintf("%.4000s", fmt.Sprint(s.Facts.Faults))
	}
	return c
}

func (s Summary) protected() metav1.Condition {
	c := metav1.Condition{Type: MeshProtected, Status: metav1.ConditionFalse}
	switch p := s.Pods; {
	case p.Enrolled == 0:
		c.Reason, c.Message = "NobodyEnrolled", "no pod is enrolled: label a namespace tacit.dev/mesh=on"
	case p.Unprotected > 0:
		c.Reason, c.Message = "SomeUnprotected", fmt.Sprintf("%d of %d enrolled pods are not protected", p.Unprotected, p.Enrolled)
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, "AllProtected", fmt.Sprintf("all %d enrolled pods are protected", p.Enrolled)
	}
	return c
}
