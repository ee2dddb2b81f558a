package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
)

func checkCommand(version string) *cobra.Command {
	var vals valueFlags
	var wait bool
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check cluster requirements before install, and pod protection after it",
		Long: `Before Tacit is installed, checks the requirements: version, permissions, network, other meshes, and the kernel of
every node. A short-lived pod checks each node. After Tacit is installed, checks that control and nodes are ready, and
that every enrolled pod is protected.

Exit codes: 0: all checks passed. 1: the check itself failed. 2: a requirement is not met.`,
		Args: cobra.NoArgs,
	}
	t := newTarget(cmd.Flags())
	var o output
	o.add(cmd.Flags())
	vals.add(cmd.Flags())
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until everything is ready, and every enrolled pod protected")
	cmd.Flags().DurationVar(&limit, "timeout", 5*time.Minute, "stop after this time")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), limit)
		defer cancel()
		c, err := t.connect()
		if err != nil {
			return err
		}
		p := newProgress(cmd.OutOrStdout())
		there, err := c.installed(ctx)
		if err != nil {
			return err
		}
		if !there.any() {
			return c.checkBefore(ctx, p, version, &vals, o)
		}
		if wait {
			if o != "" { // what is waited for is for people
				p = newProgress(cmd.ErrOrStderr())
			}
			if err := c.awaitHealth(ctx, p); err != nil || o == "" {
				return err
			}
			p = newProgress(cmd.OutOrStdout())
		}
		return c.checkAfter(ctx, p, o)
	}
	return cmd
}

func (c *cluster) checkBefore(ctx context.Context, p *progress, version string, v *valueFlags, o output) error {
	vals, err := v.merge()
	if err != nil {
		return err
	}
	charted, err := openChart(version)
	if err != nil {
		return err
	}
	manifest, err := render(ctx, charted, vals)
	if err != nil {
		return err
	}
	found, err := c.examine(ctx, manifest, false)
	if err != nil {
		return err
	}
	if o != "" {
		if err := o.print(p.out, found.requirements()); err != nil || found.lacking() == 0 {
			return err
		}
		return lacking
	}
	found.print(p.out)
	if n := found.lacking(); n > 0 {
		fmt.Fprintf(p.out, "%d of %d are lacking: tacit install would change nothing\n", n, len(found.all))
		return lacking
	}
	fmt.Fprintln(p.out, "tacit is not installed, and can be: tacit install")
	return nil
}

// examine is preflight. What had to be done to the namespace for it is undone, unless all
// is well and keep says that it is about to be used.
func (c *cluster) examine(ctx context.Context, manifest string, keep bool) (*report, error) {
	objects, err := decode(manifest)
	if err != nil {
		return nil, err
	}
	r, err := c.preflight(ctx, objects)
	if r == nil || keep && err == nil && r.lacking() == 0 {
		return r, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	switch r.namespace {
	case namespaceMade:
		err = errors.Join(err, c.removeNamespace(ctx, newProgress(io.Discard)))
	case namespaceLabeled:
		err = errors.Join(err, c.restoreNamespace(ctx))
	}
	return r, err
}

func (c *cluster) checkAfter(ctx context.Context, p *progress, o output) error {
	h, err := c.health(ctx)
	if err != nil {
		return err
	}
	if o != "" {
		r := h.report()
		if err := o.print(p.out, struct {
			Installed bool `json:"installed"`
			*healthReport
		}{true, r}); err != nil || r.Well {
			return err
		}
		return lacking
	}
	h.print(p.out)
	if missing := h.missing(); missing != "" {
		fmt.Fprintf(p.out, "not all is well: %s\n", missing)
		return lacking
	}
	fmt.Fprintf(p.out, "all is well: %d of %d enrolled pods are protected\n", len(h.pods), len(h.pods))
	return nil
}
