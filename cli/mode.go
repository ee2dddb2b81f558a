package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"tacit.dev/control/kube"
)

// modeTarget is of what a mode is set: the mesh, a namespace, or a workload.
type modeTarget struct{ namespace, workload string }

func parseModeTarget(args []string) (t modeTarget, err error) {
	if len(args) == 0 {
		return t, nil
	}
	var named bool
	t.namespace, t.workload, named = strings.Cut(args[0], "/")
	if t.namespace == "" || named && t.workload == "" || strings.Contains(t.workload, "/") {
		return t, fmt.Errorf("%q: want NAMESPACE or NAMESPACE/WORKLOAD", args[0])
	}
	return t, nil
}

func (t modeTarget) String() string {
	switch {
	case t.namespace == "":
		return "the mesh"
	case t.workload == "":
		return "namespace " + t.namespace
	}
	return "workload " + t.namespace + "/" + t.workload
}

// modeChange is what is set: kube.PermissiveMode or kube.StrictMode, of plaintext that comes in, or
// leaves, or both.
type modeChange struct {
	mode              string
	inbound, outbound bool
}

// modeCommand is strict or permissive. What before says decides whether the mode is set; nil is yes.
func modeCommand(use, mode, short, long string, before func(*cobra.Command, *cluster, modeTarget, modeChange) (goOn bool, err error)) *cobra.Command {
	m := modeChange{mode: mode}
	cmd := &cobra.Command{
		Use: use + " [NAMESPACE[/WORKLOAD]]", Short: short, Args: cobra.MaximumNArgs(1),
		Long: long + `

Without an argument it is for the whole mesh, and set in the Mesh. For a namespace or a workload (a Deployment,
StatefulSet or DaemonSet) it is set in a PeerAuthentication; plaintext that a namespace sends, in an annotation of the
Namespace. With neither --inbound nor --outbound both are set. What a workload sends is said by the annotation
tacit.dev/outbound-mode of its pods, which this command does not write.`,
	}
	t := newTarget(cmd.Flags())
	cmd.Flags().BoolVar(&m.inbound, "inbound", false, "set only what becomes of plaintext that comes in")
	cmd.Flags().BoolVar(&m.outbound, "outbound", false, "set only what becomes of plaintext that leaves")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		of, err := parseModeTarget(args)
		if err != nil {
			return err
		}
		if of.workload != "" && m.outbound {
			return errors.New("--outbound of a workload: set the annotation " + kube.AnnotationOutboundMode + " in the template of its pods")
		}
		if !m.inbound && !m.outbound {
			m.inbound, m.outbound = true, of.workload == ""
		}
		c, err := t.connect()
		if err != nil {
			return err
		}
		if before != nil {
			if goOn, err := before(cmd, c, of, m); err != nil || !goOn {
				return err
			}
		}
		return c.setMode(cmd.Context(), of, m, cmd.OutOrStdout())
	}
	return cmd
}

func permissiveCommand() *cobra.Command {
	return modeCommand("permissive", kube.PermissiveMode, "let plaintext pass again", "Lets plaintext pass again, at once.", nil)
}

// setMode sets it, and says so. Control brings it to all nodes within seconds.
func (c *cluster) setMode(ctx context.Context, of modeTarget, m modeChange, out io.Writer) error {
	var err error
	switch {
	case of.namespace == "":
		err = c.setMeshMode(ctx, m)
	default:
		if m.inbound {
			err = c.setPeerMode(ctx, of, m.mode)
		}
		if m.outbound && err == nil {
			err = c.setNamespaceMode(ctx, of.namespace, m.mode)
		}
	}
	if err != nil {
		return err
	}
	for _, x := range []struct {
		is   bool
		what string
	}{{m.inbound, "inbound"}, {m.outbound, "outbound"}} {
		if x.is {
			fmt.Fprintf(out, "%s of %s: %s\n", x.what, of, m.mode)
		}
	}
	return nil
}

func (c *cluster) setMeshMode(ctx context.Context, m modeChange) error {
	spec := map[string]any{}
	if m.inbound {
		spec["mode"] = m.mode
	}
	if m.outbound {
		spec["outbound"] = map[string]any{"mode": m.mode}
	}
	return c.changeMesh(ctx, spec)
}

func (c *cluster) setNamespaceMode(ctx context.Context, name, mode string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{kube.AnnotationOutboundMode: mode}}})
	if err != nil {
		return err
	}
	if _, err := c.client.CoreV1().Namespaces().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("annotate Namespace %s: %w", name, err)
	}
	return nil
}

// setPeerMode changes the PeerAuthentication that counts, or makes one.
func (c *cluster) setPeerMode(ctx context.Context, of modeTarget, mode string) error {
	peers, version, err := c.peers(of.namespace)
	if err != nil {
		return err
	}
	list, err := peers.List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list PeerAuthentications of %s: %w", of.namespace, err)
	}
	var selector map[string]string
	if of.workload != "" {
		if selector, err = c.selectorOf(ctx, of); err != nil {
			return err
		}
	}
	mtls := map[string]any{"mtls": map[string]any{"mode": strings.ToUpper(mode)}}
	if name := peerFor(list.Items, selector); name != "" {
		patch, err := json.Marshal(map[string]any{"spec": mtls})
		if err == nil {
			_, err = peers.Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
		}
		if err != nil {
			return fmt.Errorf("change PeerAuthentication %s/%s: %w", of.namespace, name, err)
		}
		return nil
	}
	name := "default"
	if of.workload != "" {
		name = of.workload
		labels := make(map[string]any, len(selector))
		for k, v := range selector {
			labels[k] = v
		}
		mtls["selector"] = map[string]any{"matchLabels": labels}
	}
	o := &unstructured.Unstructured{Object: map[string]any{"spec": mtls}}
	o.SetName(name)
	o.SetNamespace(of.namespace)
	o.SetAPIVersion(version)
	o.SetKind(kube.PeerKind)
	if _, err := peers.Create(ctx, o, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("make PeerAuthentication %s/%s: %w", of.namespace, name, err)
	}
	return nil
}

// peers are the PeerAuthentications of a namespace, in the version that the cluster prefers.
func (c *cluster) peers(namespace string) (peers dynamic.ResourceInterface, version string, err error) {
	at := kube.PeerResources()[0]
	m, err := c.mapper.RESTMapping(schema.GroupKind{Group: at.Group, Kind: kube.PeerKind})
	if err != nil {
		return nil, "", fmt.Errorf("find the kind PeerAuthentication: %w: it comes with tacit install (crd.install)", err)
	}
	return c.dynamic.Resource(m.Resource).Namespace(namespace), m.GroupVersionKind.GroupVersion().String(), nil
}

// peerFor is the oldest one with exactly that selector, "" for none.
func peerFor(list []unstructured.Unstructured, selector map[string]string) string {
	list = slices.SortedFunc(slices.Values(list), func(a, b unstructured.Unstructured) int {
		x, y := a.GetCreationTimestamp(), b.GetCreationTimestamp()
		if c := x.Time.Compare(y.Time); c != 0 {
			return c
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	i := slices.IndexFunc(list, func(o unstructured.Unstructured) bool {
		labels, _, err := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
		return err == nil && sameLabels(labels, selector)
	})
	if i < 0 {
		return ""
	}
	return list[i].GetName()
}

func sameLabels(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, is := b[k]; !is || w != v {
			return false
		}
	}
	return true
}

// selectorOf are the labels by which a workload has its pods.
func (c *cluster) selectorOf(ctx context.Context, of modeTarget) (map[string]string, error) {
	apps := c.client.AppsV1()
	var found *metav1.LabelSelector
	for _, get := range []func() (*metav1.LabelSelector, error){
		func() (*metav1.LabelSelector, error) {
			o, err := apps.Deployments(of.namespace).Get(ctx, of.workload, metav1.GetOptions{})
			return o.Spec.Selector, err
		},
		func() (*metav1.LabelSelector, error) {
			o, err := apps.StatefulSets(of.namespace).Get(ctx, of.workload, metav1.GetOptions{})
			return o.Spec.Selector, err
		},
		func() (*metav1.LabelSelector, error) {
			o, err := apps.DaemonSets(of.namespace).Get(ctx, of.workload, metav1.GetOptions{})
			return o.Spec.Selector, err
		},
	} {
		s, err := get()
		if err == nil {
			found = s
			break
		}
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("read workload %s/%s: %w", of.namespace, of.workload, err)
		}
	}
	if found == nil || len(found.MatchLabels) == 0 || len(found.MatchExpressions) > 0 {
		return nil, fmt.Errorf("%s: want a Deployment, StatefulSet or DaemonSet that selects its pods by labels alone; else write a PeerAuthentication", of)
	}
	return found.MatchLabels, nil
}
