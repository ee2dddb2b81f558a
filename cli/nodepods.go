package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"tacit.dev/pause"
	"tacit.dev/wire/finding"
)

const (
	// atOnce bounds how many nodes are visited at a time.
	atOnce = 50
	// visitLimit is how long one node may take, with a pull of the image.
	visitLimit = 2 * time.Minute
	// stuckAfter is how long a container may be in the making before the events of
	// its pod are read for a reason.
	stuckAfter = 4 * time.Second
	visitLabel = "tacit.dev/visit"
)

// visit is a short-lived pod on a node: the agent's container with another role. It
// has what the agent has, so what it cannot do the agent could not.
type visit struct {
	role string
	// more are changes to the pod, if any.
	more func(*corev1.Pod)
}

// folders are those volumes of the agent that a visitor has, and the flags by which it
// is told of them. None of them is made by a mount.
var folders = map[string]string{"proc": "--proc=", "cni-conf": "--cni-dir=", "cni-bin": "--cni-bin-dir="}

// examination changes nothing on the node.
var examination = visit{role: "check"}

// sweeping has the folder above the agent's, to remove that one.
func sweeping(ds *appsv1.DaemonSet) visit {
	run := ""
	for _, v := range ds.Spec.Template.Spec.Volumes {
		if v.Name == "run" && v.HostPath != nil {
			run = v.HostPath.Path
		}
	}
	return visit{role: "sweep", more: func(p *corev1.Pod) {
		directory := corev1.HostPathDirectory
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "above-run", VolumeSource: corev1.VolumeSource{
			HostPath: &corev1.HostPathVolumeSource{Path: path.Dir(run), Type: &directory}}})
		c := &p.Spec.Containers[0]
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "above-run", MountPath: "/host/run"})
		c.Args = append(c.Args, "--run=/host/run/"+path.Base(run))
	}}
}

// pod makes the visitor of a node from the DaemonSet. It is on the node's network,
// so it needs no plugin to start, and its own namespace is none of a pod.
func (v visit) pod(ds *appsv1.DaemonSet, node string) (*corev1.Pod, error) {
	from := ds.Spec.Template.Spec
	i := slices.IndexFunc(from.Containers, func(c corev1.Container) bool { return c.Name == "agent" })
	if i < 0 {
		return nil, fmt.Errorf("DaemonSet %s has no container agent", ds.Name)
	}
	agent := from.Containers[i]
	no, soon := false, int64(0)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "tacit-" + v.role + "-", Namespace: namespace,
			Labels: map[string]string{visitLabel: v.role, "app.kubernetes.io/part-of": program}},
		Spec: corev1.PodSpec{
			NodeName: node, RestartPolicy: corev1.RestartPolicyNever, HostNetwork: true,
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no, TerminationGracePeriodSeconds: &soon,
			Tolerations: from.Tolerations, ImagePullSecrets: from.ImagePullSecrets, SecurityContext: from.SecurityContext,
			Containers: []corev1.Container{{
				Name: v.role, Image: agent.Image, ImagePullPolicy: agent.ImagePullPolicy,
				Command:                  []string{agent.Command[0], v.role},
				Args:                     []string{"--report=" + finding.Path},
				SecurityContext:          agent.SecurityContext,
				TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
			}},
		},
	}
	c := &p.Spec.Containers[0]
	for _, m := range agent.VolumeMounts {
		if f := folders[m.Name]; f != "" {
			c.VolumeMounts = append(c.VolumeMounts, m)
			c.Args = append(c.Args, f+m.MountPath)
		}
	}
	for _, volume := range from.Volumes {
		if folders[volume.Name] != "" {
			p.Spec.Volumes = append(p.Spec.Volumes, volume)
		}
	}
	if v.more != nil {
		v.more(p)
	}
	return p, nil
}

// visitNodes sends a visitor to every node, and returns by node what it found. No
// visitor is left, whatever happens.
func (c *cluster) visitNodes(ctx context.Context, ds *appsv1.DaemonSet, v visit, nodes []string) (map[string][]finding.Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, visitLimit*time.Duration(1+len(nodes)/atOnce))
	defer cancel()
	found := make([][]finding.Finding, len(nodes))
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(atOnce)
	for i, node := range nodes {
		all.Go(func() (err error) {
			found[i], err = c.visitNode(ctx, ds, v, node)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	byNode := make(map[string][]finding.Finding, len(nodes))
	for i, node := range nodes {
		byNode[node] = found[i]
	}
	return byNode, nil
}

// visitNode returns an error only if nothing can be said of the node.
func (c *cluster) visitNode(ctx context.Context, ds *appsv1.DaemonSet, v visit, node string) (found []finding.Finding, err error) {
	pod, err := v.pod(ds, node)
	if err != nil {
		return nil, err
	}
	pods := c.client.CoreV1().Pods(namespace)
	pod, err = createSoon(ctx, func() (*corev1.Pod, error) { return pods.Create(ctx, pod, metav1.CreateOptions{}) })
	if err != nil {
		return []finding.Finding{{What: "pods", Lacks: fmt.Sprintf("start a privileged pod: %v", err),
			Remedy: "let this user create privileged pods in namespace " + namespace}}, nil
	}
	defer func() { err = errors.Join(err, c.dismiss(context.WithoutCancel(ctx), pod.Name)) }()
	return c.hear(ctx, pod.Name)
}

// createSoon tries again while a namespace that has just been made has no service
// account yet.
func createSoon(ctx context.Context, create func() (*corev1.Pod, error)) (*corev1.Pod, error) {
	for {
		pod, err := create()
		if err == nil || !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "serviceaccount") {
			return pod, err
		}
		if !pause.For(ctx, pollEvery) {
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

// dismiss removes a visitor, and waits until it is gone: nothing is left of it.
func (c *cluster) dismiss(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	now := int64(0)
	pods := c.client.CoreV1().Pods(namespace)
	for {
		err := pods.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("remove pod %s/%s: %w", namespace, name, err)
		}
	}
}

// hear waits for a visitor's report, or for the reason why there will be none.
func (c *cluster) hear(ctx context.Context, name string) ([]finding.Finding, error) {
	began := time.Now()
	for {
		pod, err := c.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, fmt.Errorf("watch pod %s/%s: %w", namespace, name, err)
		}
		if found, ended := reportOf(pod); ended {
			return found, nil
		}
		why := waitingFor(pod)
		if why == "" && time.Since(began) > stuckAfter {
			why = c.warningOf(ctx, pod)
		}
		if why != "" {
			return []finding.Finding{{What: "pods", Lacks: why, Remedy: remedyOf(why)}}, nil
		}
		if !pause.For(ctx, pollEvery) {
			return []finding.Finding{{What: "pods", Lacks: fmt.Sprintf("a pod that looks at the node did not end in time (%s)", pod.Status.Phase),
				Remedy: "see why pods do not start on this node"}}, nil
		}
	}
}

// reportOf reads what an ended visitor said.
func reportOf(p *corev1.Pod) (found []finding.Finding, ended bool) {
	for _, s := range p.Status.ContainerStatuses {
		t := s.State.Terminated
		if t == nil {
			continue
		}
		found, err := finding.Read(t.Message)
		if err != nil {
			found = []finding.Finding{{What: "pods", Lacks: fmt.Sprintf("exit code %d: %v", t.ExitCode, err), Remedy: "use the image tacit-node of this version"}}
		}
		return found, true
	}
	if p.Status.Phase == corev1.PodFailed { // never started: refused by the kubelet
		return []finding.Finding{{What: "pods", Lacks: p.Status.Reason + ": " + p.Status.Message, Remedy: "see why the node refuses pods"}}, true
	}
	return nil, false
}

// waitingFor is why a container will not start, "" if it may.
func waitingFor(p *corev1.Pod) string {
	for _, s := range p.Status.ContainerStatuses {
		w := s.State.Waiting
		if w == nil {
			continue
		}
		switch w.Reason {
		case "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError":
			return strings.TrimSuffix(w.Reason+": "+w.Message, ": ")
		}
	}
	return ""
}

// warningOf is the last warning about a pod that does not get on.
func (c *cluster) warningOf(ctx context.Context, p *corev1.Pod) string {
	events, err := c.client.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.Set{"involvedObject.uid": string(p.UID), "type": corev1.EventTypeWarning}.String(),
	})
	if err != nil || len(events.Items) == 0 {
		return ""
	}
	last := slices.MaxFunc(events.Items, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return last.Reason + ": " + last.Message
}

func remedyOf(why string) string {
	switch {
	case strings.Contains(why, "cni-conf"):
		return "install the network of the cluster first, or name the runtime's folder by --set node.cni.confDir=FOLDER"
	case strings.Contains(why, "cni-bin"):
		return "name the folder of the runtime's plugins by --set node.cni.binDir=FOLDER"
	case strings.Contains(why, "Image"):
		return "push the images where the nodes can pull them, and name the place by --set image.registry=REGISTRY"
	}
	return "see why pods do not start on this node"
}

// sortedNodes are the keys of a map by node.
func sortedNodes[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
