package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

// confirmLabeled asks before a first installation enrolls what has a label of another mesh:
// nobody may remember that it is there.
func (c *cluster) confirmLabeled(ctx context.Context, cmd *cobra.Command, yes bool) error {
	left, err := c.labeledForIstio(ctx)
	if err != nil || len(left) == 0 {
		return err
	}
	return confirm(cmd, yes, fmt.Sprintf("%d objects have the label %s=ambient, which Tacit heeds: their pods are enrolled at once: %s",
		len(left), kube.LabelIstio, some(left)))
}

// labeledForIstio are namespaces and pods that only the label of Istio's ambient mesh enrolls.
func (c *cluster) labeledForIstio(ctx context.Context) (list []string, err error) {
	only := metav1.ListOptions{LabelSelector: kube.LabelIstio + "=ambient,!" + kube.LabelMesh}
	spaces, err := c.client.CoreV1().Namespaces().List(ctx, only)
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	for _, n := range spaces.Items {
		list = append(list, "namespace "+n.Name)
	}
	pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, only)
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	for _, p := range pods.Items {
		list = append(list, "pod "+p.Namespace+"/"+p.Name)
	}
	return list, nil
}
