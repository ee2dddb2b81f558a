package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// managedBy tells that a namespace was made by this program, which then removes it.
const managedBy = "app.kubernetes.io/managed-by"

// security lets the agents be what they are where Pod Security admission is strict.
var security = map[string]string{
	"pod-security.kubernetes.io/enforce": "privileged",
	"pod-security.kubernetes.io/audit":   "privileged",
	"pod-security.kubernetes.io/warn":    "privileged",
}

// securityBefore is the annotation by which a namespace that was there remembers what its
// labels of Pod Security were: a JSON object whose values are null where there was none.
const securityBefore = "tacit.dev/pod-security-before"

// namespaceChange is what ensureNamespace did.
type namespaceChange int

const (
	namespaceAsItWas namespaceChange = iota
	namespaceMade
	namespaceLabeled
)

func namespaceObject() *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{
		managedBy: program, "app.kubernetes.io/part-of": program,
	}}}
	n.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	maps.Copy(n.Labels, security)
	return n
}

// ensureNamespace makes the namespace. One that is there gets the labels of Pod Security,
// and stays somebody else's.
func (c *cluster) ensureNamespace(ctx context.Context) (namespaceChange, error) {
	n := namespaceObject()
	namespaces := c.client.CoreV1().Namespaces()
	_, err := namespaces.Create(ctx, n, metav1.CreateOptions{})
	if err == nil {
		return namespaceMade, nil
	}
	var changed bool
	if apierrors.IsAlreadyExists(err) {
		if n, err = namespaces.Get(ctx, namespace, metav1.GetOptions{}); err == nil {
			changed, err = c.labelNamespace(ctx, n)
		}
	}
	switch {
	case err != nil:
		return namespaceAsItWas, fmt.Errorf("make namespace %s: %w", namespace, err)
	case changed:
		return namespaceLabeled, nil
	}
	return namespaceAsItWas, nil
}

// labelNamespace gives a namespace the labels of Pod Security where it has others, and
// reports whether it had.
func (c *cluster) labelNamespace(ctx context.Context, n *corev1.Namespace) (changed bool, err error) {
	before := map[string]any{}
	for k, v := range security {
		was, ok := n.Labels[k]
		switch {
		case !ok:
			before[k] = nil
		case was != v:
			before[k] = was
		}
	}
	if len(before) == 0 {
		return false, nil
	}
	meta := map[string]any{"labels": security}
	if n.Annotations[securityBefore] == "" {
		text, err := json.Marshal(before)
		if err != nil {
			return false, err
		}
		meta["annotations"] = map[string]any{securityBefore: string(text)}
	}
	return true, c.patchNamespace(ctx, meta)
}

func (c *cluster) patchNamespace(ctx context.Context, meta map[string]any) error {
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err == nil {
		_, err = c.client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	return err
}

// restoreNamespace gives a namespace of somebody else the labels back that it had.
func (c *cluster) restoreNamespace(ctx context.Context) error {
	n, err := c.client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err == nil && n.Annotations[securityBefore] != "" {
		before := map[string]any{}
		if err = json.Unmarshal([]byte(n.Annotations[securityBefore]), &before); err == nil {
			err = c.patchNamespace(ctx, map[string]any{"labels": before, "annotations": map[string]any{securityBefore: nil}})
		}
	}
	if err != nil {
		return fmt.Errorf("restore the labels of namespace %s: %w", namespace, err)
	}
	return nil
}

// removeNamespace removes the namespace and waits for its end, if this program has
// made it. Another one gets the labels back that it had.
func (c *cluster) removeNamespace(ctx context.Context, p *progress) error {
	namespaces := c.client.CoreV1().Namespaces()
	n, err := namespaces.Get(ctx, namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	if n.Labels[managedBy] != program {
		p.say("namespace %s stays: it was there before", namespace)
		return c.restoreNamespace(ctx)
	}
	if err := namespaces.Delete(ctx, namespace, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	return p.await(ctx, func(ctx context.Context) (string, error) {
		_, err := namespaces.Get(ctx, namespace, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return "", nil
		}
		return "the end of namespace " + namespace, err
	})
}
