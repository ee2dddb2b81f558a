package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tacit.dev/control/kube"
)

func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is in the mesh, and what is not",
		Long: `Tells how far the mesh of a cluster is: control, nodes, enrolled pods by namespace, and the exceptions.

Exit codes: 0 it could be told, whatever it is; 1 otherwise. To act on it, use tacit check.`,
		Args: cobra.NoArgs,
	}
	t := newTarget(cmd.Flags())
	var o output
	o.add(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		c, err := t.connect()
		if err != nil {
			return err
		}
		return c.status(ctx, cmd.OutOrStdout(), o)
	}
	return cmd
}

func (c *cluster) status(ctx context.Context, out io.Writer, o output) error {
	there, err := c.installed(ctx)
	if err != nil {
		return err
	}
	if !there.any() {
		if o != "" {
			return o.print(out, statusReport{})
		}
		_, err := fmt.Fprintln(out, "tacit is not installed")
		return err
	}
	h, err := c.health(ctx)
	if err != nil {
		return err
	}
	if o != "" {
		r := statusReport{Installed: true, Version: there.version(), InstalledBy: there.owner().String(), Health: h.report()}
		if h.mesh != nil {
			r.Mesh = &h.mesh.Status
		}
		return o.print(out, r)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "version\t%s, installed by %s\n", cmp.Or(there.version(), "unknown"), there.owner())
	fmt.Fprintf(w, "control\t%s\n", orWell(h.control))
	ready, total := h.served()
	fmt.Fprintf(w, "nodes\t%d of %d ready\n", ready, total)
	tellNodes(w, h.mesh)
	h.tellPods(w)
	tellExceptions(w, h.mesh)
	return w.Flush()
}

func orWell(problem string) string {
	if problem == "" {
		return "ready"
	}
	return problem
}

// served counts nodes that are ready, and all. Whoever may not list nodes is told what control counts.
func (h *health) served() (ready, total int) {
	if h.unseen {
		if h.mesh == nil {
			return 0, 0
		}
		return int(h.mesh.Status.Nodes.Ready), int(h.mesh.Status.Nodes.Total)
	}
	for _, why := range h.nodes {
		if why == "" {
			ready++
		}
	}
	return ready, len(h.nodes)
}

// tellPods counts by namespace, and names what is not protected.
func (h *health) tellPods(w io.Writer) {
	type count struct{ all, protected int }
	spaces := map[string]count{}
	for name, p := range h.pods {
		space, _, _ := strings.Cut(name, "/")
		n := spaces[space]
		n.all++
		if p.protected {
			n.protected++
		}
		spaces[space] = n
	}
	for _, space := range slices.Sorted(maps.Keys(spaces)) {
		fmt.Fprintf(w, "namespace %s\t%d of %d enrolled pods protected\n", space, spaces[space].protected, spaces[space].all)
	}
	if len(spaces) == 0 {
		fmt.Fprintln(w, "pods\tnone is enrolled: kubectl label namespace NAME tacit.dev/mesh=on")
	}
	for _, name := range sortedNodes(h.pods) {
		switch p := h.pods[name]; {
		case !p.protected:
			fmt.Fprintf(w, "unprotected\t%s: %s\n", name, p.why)
		case p.partly:
			fmt.Fprintf(w, "partly protected\t%s: %s\n", name, p.why)
		}
	}
}

// tellNodes names those for which a withdrawal waits, those that are behind, and those that are lost.
func tellNodes(w io.Writer, m *kube.Mesh) {
	if m == nil {
		return
	}
	for _, n := range m.Status.Waiting {
		why := "it is not connected. If it is lost: tacit node forget " + n.Node
		if n.Connected {
			why = "it is connected and has not acknowledged. Delete its pod: kubectl --namespace " + namespace +
				" delete pod --selector app.kubernetes.io/name=" + nodesName + " --field-selector spec.nodeName=" + n.Node
		}
		fmt.Fprintf(w, "waiting for\tnode %s, since %s, to release pods: %s\n", n.Node, n.Since.UTC().Format(time.RFC3339), why)
	}
	for _, n := range m.Status.Behind {
		why := "it is not connected"
		if n.Connected {
			why = "it is connected and has not acknowledged"
		}
		fmt.Fprintf(w, "behind\tnode %s, since %s, with version %d: it may still enforce older policies: %s\n", n.Node, n.Since.UTC().Format(time.RFC3339), n.Version, why)
	}
	for _, node := range m.Status.Lost {
		fmt.Fprintf(w, "lost\tnode %s: nothing waits for it until it connects again\n", node)
	}
}

// tellExceptions names what control has left out, and why.
func tellExceptions(w io.Writer, m *kube.Mesh) {
	if m == nil {
		return
	}
	for _, e := range m.Status.Exceptions {
		fmt.Fprintf(w, "exception\t%d pods: %s: %s\n", e.Count, e.Reason, some(e.Pods))
	}
}
