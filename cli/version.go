package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// versions are those of this program and, if it was asked, of a cluster.
type versions struct {
	Client string `json:"client"`
	// Mesh is the version that is installed, "" for none.
	Mesh       string `json:"mesh,omitempty"`
	Kubernetes string `json:"kubernetes,omitempty"`
}

func versionCommand(version string) *cobra.Command {
	var o output
	var server bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program, and of a cluster",
		Long: `Prints the version of this program. With --server it also prints the version of Tacit on the cluster, and that of Kubernetes.

Exit codes: 0: printed. 1: the cluster did not answer.`,
		Args: cobra.NoArgs,
	}
	t := newTarget(cmd.Flags())
	o.add(cmd.Flags())
	cmd.Flags().BoolVar(&server, "server", false, "ask the cluster, too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v := versions{Client: version}
		if server {
			c, err := t.connect()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			if err := c.versions(ctx, &v); err != nil {
				return err
			}
		}
		return v.print(cmd.OutOrStdout(), o, server)
	}
	return cmd
}

func (c *cluster) versions(ctx context.Context, v *versions) error {
	there, err := c.installed(ctx)
	if err != nil {
		return err
	}
	info, err := c.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask the API server for its version: %w", err)
	}
	v.Mesh, v.Kubernetes = there.version(), info.GitVersion
	return nil
}

func (v versions) print(out io.Writer, o output, server bool) error {
	if o != "" {
		return o.print(out, v)
	}
	fmt.Fprintln(out, v.Client)
	if server && v.Mesh == "" {
		v.Mesh = "not installed"
	}
	if server {
		fmt.Fprintf(out, "mesh %s\nKubernetes %s\n", v.Mesh, v.Kubernetes)
	}
	return nil
}

func imagesCommand(version string) *cobra.Command {
	var vals valueFlags
	cmd := &cobra.Command{
		Use:   "images",
		Short: "Print the images that an installation with these values uses",
		Long: `Prints the images that an installation with these values uses, one a line, to copy them to a registry of your own or to
load them on nodes. It needs no cluster.`,
		Example: `  tacit images --set image.registry=registry.example.org/tacit`,
		Args:    cobra.NoArgs,
	}
	vals.add(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := images(cmd.Context(), version, &vals)
		for _, image := range list {
			fmt.Fprintln(cmd.OutOrStdout(), image)
		}
		return err
	}
	return cmd
}

// images are those of all pods of the chart.
func images(ctx context.Context, version string, v *valueFlags) (list []string, err error) {
	vals, err := v.merge()
	if err != nil {
		return nil, err
	}
	charted, err := openChart(version)
	if err != nil {
		return nil, err
	}
	manifest, err := render(ctx, charted, vals)
	if err != nil {
		return nil, err
	}
	objects, err := decode(manifest)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		if kind := o.GetKind(); kind != "DaemonSet" && kind != "Deployment" {
			continue
		}
		var d appsv1.Deployment // what is read is the same of a DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(map[string]any{"spec": map[string]any{"template": o.Object["spec"].(map[string]any)["template"]}}, &d); err != nil {
			return nil, fmt.Errorf("read %s %s: %w", o.GetKind(), o.GetName(), err)
		}
		for _, c := range d.Spec.Template.Spec.Containers {
			list = append(list, c.Image)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}
