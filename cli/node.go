package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tacit.dev/control/kube"
	"tacit.dev/pause"
)

func nodeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Manage nodes of the mesh"}
	cmd.AddCommand(forgetCommand())
	return cmd
}

func forgetCommand() *cobra.Command {
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "forget NODE",
		Short: "Mark a node as lost: nothing waits for it any more",
		Long: `Names a node as lost. Pods that leave the mesh, and pods that start, no longer wait for the node. The command sets the
annotation tacit.dev/lost of the Node object, so the next leader of control knows it, too. When the node connects again,
control removes the annotation.

Use it only for a node that is down or cut off. A node that still runs may keep dialing a pod that has left the mesh with
TLS. These connections fail.

Exit codes: 0: nothing waits for the node. 1: the node is connected to control, or unknown, or control did not answer.`,
		Args: cobra.ExactArgs(1),
	}
	t := newTarget(cmd.Flags())
	cmd.Flags().DurationVar(&limit, "timeout", 30*time.Second, "wait this long for an answer of control")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := t.connect()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), limit)
		defer cancel()
		return c.forgetNode(ctx, args[0], cmd.OutOrStdout())
	}
	return cmd
}

// forgetNode marks the node, and waits for control's answer: it lists the node as lost, or takes
// the mark away.
func (c *cluster) forgetNode(ctx context.Context, node string, out io.Writer) error {
	mark := time.Now().UTC().Format(time.RFC3339Nano)
	if err := c.markLost(ctx, node, mark); err != nil {
		return err
	}
	for {
		n, err := c.node(ctx, node)
		if err != nil {
			return err
		}
		m, err := c.mesh(ctx)
		switch {
		case err != nil:
			return err
		case n.Annotations[kube.AnnotationLost] != mark:
			return fmt.Errorf("node %s is connected to control: it is not lost, and is waited for. See: tacit status", node)
		case m != nil && slices.Contains(m.Status.Lost, node):
			_, err := fmt.Fprintf(out, "node %s is lost: nothing waits for it until it connects again\n", node)
			return err
		}
		if !pause.For(ctx, pollEvery) {
			return fmt.Errorf("wait for control to take note that node %s is lost: %w: the annotation %s stays. See: tacit status", node, ctx.Err(), kube.AnnotationLost)
		}
	}
}

func (c *cluster) node(ctx context.Context, name string) (*corev1.Node, error) {
	n, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	return n, aboutNode(name, err)
}

func (c *cluster) markLost(ctx context.Context, node, mark string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{kube.AnnotationLost: mark}}})
	if err == nil {
		_, err = c.client.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	return aboutNode(node, err)
}

func aboutNode(name string, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return errors.New("the cluster has no node " + name + ". See: kubectl get nodes")
	case err != nil:
		return fmt.Errorf("forget node %s: %w", name, err)
	}
	return nil
}
