package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

// health is how an installed mesh is.
type health struct {
	control string              // what is missing, "" for nothing
	nodes   map[string]string   // why a node is not served, "" if it is
	away    map[string]string   // nodes that are not ready, and why: nothing can be asked of them
	unseen  bool                // this user may not list nodes, so that both are empty
	pods    map[string]podState // enrolled pods by NAMESPACE/NAME
	mesh    *kube.Mesh          // nil if there is none
}

// podState is an enrolled pod.
type podState struct {
	protected bool
	// partly: protected, and some of what it would send is refused.
	partly bool
	why    string
}

// missing says what is not as it should be, in the order in which it comes to be.
func (h *health) missing() string {
	if h.control != "" {
		return "control: " + h.control
	}
	var waiting []string
	for _, node := range sortedNodes(h.nodes) {
		if h.nodes[node] != "" {
			waiting = append(waiting, node+" ("+h.nodes[node]+")")
		}
	}
	if served, total := h.served(); served < total || served == 0 {
		return strings.TrimSuffix(fmt.Sprintf("nodes, %d of %d are ready: %s", served, total, some(waiting)), ": ")
	}
	return h.unprotected()
}

func (h *health) unprotected() string {
	var open []string
	for _, name := range sortedNodes(h.pods) {
		if p := h.pods[name]; !p.protected {
			open = append(open, strings.TrimSuffix(name+": "+p.why, ": "))
		}
	}
	if len(open) == 0 {
		return ""
	}
	return fmt.Sprintf("pods, %d of %d are protected: %s", len(h.pods)-len(open), len(h.pods), some(open))
}

// print lists all, for people.
func (h *health) print(out io.Writer) {
	tell := func(what, problem, fine string) {
		if problem == "" {
			fmt.Fprintf(out, "  ok      %s: %s\n", what, fine)
		} else {
			fmt.Fprintf(out, "  LACKING %s: %s\n", what, problem)
		}
	}
	tell("control", h.control, "ready")
	for _, node := range sortedNodes(h.nodes) {
		tell("node "+node, h.nodes[node], "agent and proxy ready")
	}
	for _, node := range sortedNodes(h.away) {
		fmt.Fprintf(out, "  note    node %s: not ready (%s): neither it nor its pods are looked at\n", node, h.away[node])
	}
	for _, name := range sortedNodes(h.pods) {
		p, problem := h.pods[name], ""
		if !p.protected {
			problem = "not protected: " + p.why
		}
		tell("pod "+name, problem, "protected")
		if p.partly {
			fmt.Fprintf(out, "  note    pod %s: partly protected: %s\n", name, p.why)
		}
	}
}

// some is a list that a person reads.
func some(list []string) string {
	const most = 3
	if len(list) > most {
		return strings.Join(list[:most], "; ") + fmt.Sprintf("; and %d more", len(list)-most)
	}
	return strings.Join(list, "; ")
}

// health asks the cluster.
func (c *cluster) health(ctx context.Context) (*health, error) {
	h := &health{nodes: map[string]string{}, pods: map[string]podState{}}
	var err error
	if h.control, err = c.controlHealth(ctx); err != nil {
		return nil, err
	}
	ds, err := c.client.AppsV1().DaemonSets(namespace).Get(ctx, nodesName, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read DaemonSet %s: %w", nodesName, err)
	}
	if h.mesh, err = c.mesh(ctx); err != nil {
		return nil, err
	}
	if err := c.nodeHealth(ctx, ds, h); apierrors.IsForbidden(err) {
		h.unseen = true
	} else if err != nil {
		return nil, err
	}
	if h.control == "" {
		h.control = unready(h.mesh)
	}
	return h, c.podHealth(ctx, h)
}

// unready is what control itself says is wrong, "" for nothing.
func unready(m *kube.Mesh) string {
	if m == nil {
		return ""
	}
	c := meta.FindStatusCondition(m.Status.Conditions, kube.MeshReady)
	if c == nil || c.Status != metav1.ConditionFalse {
		return ""
	}
	return c.Reason + ": " + c.Message
}

func (c *cluster) controlHealth(ctx context.Context) (string, error) {
	d, err := c.client.AppsV1().Deployments(namespace).Get(ctx, controlName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "there is no Deployment " + controlName, nil
	}
	if err != nil {
		return "", fmt.Errorf("read Deployment %s: %w", controlName, err)
	}
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	s := d.Status
	if s.ObservedGeneration < d.Generation || s.UpdatedReplicas < want || s.ReadyReplicas < want || s.Replicas > want {
		return fmt.Sprintf("%d of %d replicas are ready and up to date", min(s.UpdatedReplicas, s.ReadyReplicas), want), nil
	}
	return "", nil
}

// nodeHealth looks for a pod on every node that is ready and of the newest kind.
func (c *cluster) nodeHealth(ctx context.Context, ds *appsv1.DaemonSet, h *health) error {
	ready, away, err := c.nodes(ctx, ds)
	if err != nil {
		return err
	}
	h.away = away
	nodes := h.nodes
	for _, node := range ready {
		nodes[node] = "no pod yet"
	}
	pods, err := c.podsOf(ctx, nodesName)
	if err != nil {
		return err
	}
	// The DaemonSet's controller numbers its templates, and labels pods with it.
	newest := ds.Annotations[appsv1.DeprecatedTemplateGeneration]
	for _, p := range pods {
		old, counts := nodes[p.Spec.NodeName]
		if !counts || old == "" || newest != p.Labels[appsv1.DeprecatedTemplateGeneration] && newest != p.Labels["pod-template-generation"] {
			continue
		}
		nodes[p.Spec.NodeName] = podProblem(&p)
	}
	return nil
}

// podsOf are those of the DaemonSet, or of control.
func (c *cluster) podsOf(ctx context.Context, name string) ([]corev1.Pod, error) {
	pods, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + name})
	if err != nil {
		return nil, fmt.Errorf("list pods of %s: %w", name, err)
	}
	return pods.Items, nil
}

// podProblem is why a pod is not ready, "" if it is.
func podProblem(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil {
			return ""
		}
	}
	var not []string
	for _, s := range p.Status.ContainerStatuses {
		switch {
		case s.State.Waiting != nil:
			not = append(not, s.Name+" "+s.State.Waiting.Reason)
		case s.State.Terminated != nil:
			not = append(not, s.Name+" ended")
		case !s.Ready:
			not = append(not, s.Name+" is not ready")
		}
	}
	if len(not) == 0 {
		return strings.ToLower(string(p.Status.Phase))
	}
	return strings.Join(not, ", ")
}

// podHealth finds the pods that are to be in the mesh, as control does, and what
// control says of each. Of those on nodes that are away nobody can say anything.
func (c *cluster) podHealth(ctx context.Context, h *health) error {
	var o kube.Objects
	spaces, err := c.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	for i := range spaces.Items {
		o.Namespaces = append(o.Namespaces, &spaces.Items[i])
	}
	pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	byName := map[string]*corev1.Pod{}
	for i := range pods.Items {
		p := &pods.Items[i]
		o.Pods = append(o.Pods, kube.KeepPod(p))
		byName[p.Namespace+"/"+p.Name] = p
	}
	if h.mesh != nil {
		o.Meshes = append(o.Meshes, h.mesh)
	}
	// Identities are of no interest here, only who is enrolled.
	for _, p := range kube.Build(o, kube.BuildConfig{TrustDomain: "cluster.local", Namespace: namespace}).Pods {
		name := p.Namespace + "/" + p.Name
		if pod := byName[name]; p.Enroll && counts(pod) && h.away[pod.Spec.NodeName] == "" {
			h.pods[name] = stateOf(pod)
		}
	}
	return nil
}

// counts leaves out pods that are at their end, or not on a node yet.
func counts(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Spec.NodeName != "" &&
		p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

func stateOf(p *corev1.Pod) podState {
	i := slices.IndexFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == kube.ConditionProtected })
	if i < 0 {
		return podState{why: "no status reported by tacit-control yet"}
	}
	c := p.Status.Conditions[i]
	if c.Status == corev1.ConditionTrue && c.Reason == kube.PartlyProtected {
		return podState{protected: true, partly: true, why: c.Message}
	}
	return podState{protected: c.Status == corev1.ConditionTrue, why: strings.TrimSuffix(c.Reason+": "+c.Message, ": ")}
}
