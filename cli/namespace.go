package cli

import (
	"context"
	"encoding/json"
	"fmt"

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

// ensureNamespace makes the namespace, and says whether it was not there. One that is
// there gets the labels of Pod Security, and stays somebody else's.
func (c *cluster) ensureNamespace(ctx context.Context) (made bool, err error) {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{
		managedBy: program, "app.kubernetes.io/part-of": program,
	}}}
	for k, v := range security {
		n.Labels[k] = v
	}
	_, err = c.client.CoreV1().Namespaces().Create(ctx, n, metav1.CreateOptions{})
	if err == nil {
		return true, nil
	}
	if apierrors.IsAlreadyExists(err) {
		patch, merr := json.Marshal(map[string]any{"metadata": map[string]any{"labels": security}})
		if merr != nil {
			return false, merr
		}
		_, err = c.client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil {
		return false, fmt.Errorf("make namespace %s: %w", namespace, err)
	}
	return false, nil
}

// removeNamespace removes the namespace and waits for its end, if this program has
// made it.
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
		return nil
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
