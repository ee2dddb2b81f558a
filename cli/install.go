package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	release "helm.sh/helm/v4/pkg/release/v1"
	"sigs.k8s.io/yaml"

	"tacit.dev/control/kube"
)

// lacking is the exit code for: what was looked at is not as it has to be.
const lacking = exit(2)

// setup are the flags of install and upgrade.
type setup struct {
	version string
	target  *target
	values  valueFlags
	dryRun  bool
	yes     bool
	wait    bool
	limit   time.Duration
}

func installCommand(version string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install Tacit, or update the installation to match the flags",
		Long: `Installs the Helm chart that this program contains, as release "tacit" in namespace tacit-system. The requirements
of the cluster are checked first. If a check fails, install changes nothing. A second install is safe: values that
were given before stay.

Exit codes: 0: ready. 1: the command failed. 2: a requirement is not met, or not everything was ready in time.`,
		Example: `  tacit install
  tacit install --set image.registry=registry.example.org/tacit
  tacit install -f values.yaml --dry-run`,
		Args: cobra.NoArgs,
	}
	s := newSetup(cmd, version)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return s.run(cmd, false) }
	return cmd
}

func upgradeCommand(version string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Upgrade the installation to the version of this program",
		Long: `Upgrades the installation to the version of this program. Values that were given before stay. Defaults are those of
this version. The next agent and proxy of a node are ready before the last ones stop. Connections that the last proxy
carries end with it.

Exit codes: those of install. 1 also if nothing is installed.`,
		Args: cobra.NoArgs,
	}
	s := newSetup(cmd, version)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return s.run(cmd, true) }
	return cmd
}

func newSetup(cmd *cobra.Command, version string) *setup {
	s := &setup{version: version, target: newTarget(cmd.Flags())}
	s.values.add(cmd.Flags())
	cmd.Flags().BoolVar(&s.dryRun, "dry-run", false, "print the manifests that would be applied, without changes to the cluster")
	cmd.Flags().BoolVar(&s.yes, "yes", false, "do not ask whether pods that still have a label of Istio's ambient mesh are to be enrolled")
	cmd.Flags().BoolVar(&s.wait, "wait", true, "wait until everything is ready, and every enrolled pod protected")
	cmd.Flags().DurationVar(&s.limit, "timeout", 5*time.Minute, "stop after this time")
	return s
}

func (s *setup) run(cmd *cobra.Command, upgrade bool) error {
	vals, err := s.values.merge()
	if err != nil {
		return err
	}
	charted, err := openChart(s.version)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), s.limit)
	defer cancel()
	c, err := s.target.connect()
	if err != nil {
		return err
	}
	last, err := s.before(ctx, c)
	if err != nil {
		return err
	}
	if vals, err = effective(last, charted, vals, upgrade); err != nil {
		return err
	}
	if s.dryRun {
		return printManifests(ctx, cmd.OutOrStdout(), charted, vals)
	}
	if last == nil {
		if err := c.confirmLabeled(ctx, cmd, s.yes); err != nil {
			return err
		}
	}
	p := newProgress(cmd.OutOrStdout())
	if err := s.prepare(ctx, c, p, charted, vals); err != nil {
		return err
	}
	return s.apply(ctx, c, p, charted, vals)
}

// before is the release that is installed, nil if none is. It refuses what another tool has
// installed, and would change back; but to print manifests for that tool changes nothing.
func (s *setup) before(ctx context.Context, c *cluster) (*release.Release, error) {
	r, err := c.releases()
	if err != nil {
		return nil, err
	}
	last, err := r.last()
	if err != nil || s.dryRun {
		return last, err
	}
	there, err := c.installed(ctx)
	if err != nil {
		return nil, err
	}
	if there.foreign(last) {
		return nil, fmt.Errorf("%s has installed Tacit on this cluster: change it there", there.owner())
	}
	return last, nil
}

// printManifests prints what would be applied, the namespace first.
func printManifests(ctx context.Context, out io.Writer, charted *chart.Chart, vals map[string]any) error {
	manifest, err := render(ctx, charted, vals)
	if err != nil {
		return err
	}
	ns, err := yaml.Marshal(namespaceObject())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s%s", ns, manifest)
	return err
}

// effective are the values that were given before, and those that are given now.
func effective(last *release.Release, charted *chart.Chart, vals map[string]any, upgrade bool) (map[string]any, error) {
	switch {
	case last != nil:
		vals = loader.MergeMaps(last.Config, vals)
		return vals, sameTrustDomain(loader.MergeMaps(last.Chart.Values, last.Config), loader.MergeMaps(charted.Values, vals))
	case upgrade:
		return nil, fmt.Errorf("upgrade: no release %s in namespace %s: tacit install makes one", releaseName, namespace)
	}
	return vals, nil
}

// sameTrustDomain refuses another trust domain for a mesh that is installed: the root of the
// CA is for the one it was made for, and no identity could be signed any more.
func sameTrustDomain(before, now map[string]any) error {
	const key = "trustDomain"
	if before[key] == now[key] {
		return nil
	}
	return fmt.Errorf("trustDomain: the mesh has %q, and cannot change to %q while it is installed: give --set trustDomain=%s, or run tacit uninstall before", before[key], now[key], before[key])
}

// prepare looks whether the cluster has what is needed, and makes the namespace.
func (s *setup) prepare(ctx context.Context, c *cluster, p *progress, charted *chart.Chart, vals map[string]any) error {
	manifest, err := render(ctx, charted, vals)
	if err != nil {
		return err
	}
	p.say("checking the requirements of the cluster")
	found, err := c.examine(ctx, manifest, true)
	if err != nil {
		return err
	}
	if n := found.lacking(); n > 0 {
		found.print(p.out)
		p.say("nothing was changed")
		return lacking
	}
	_, err = c.ensureNamespace(ctx)
	return err
}

// apply brings the release about, and waits.
func (s *setup) apply(ctx context.Context, c *cluster, p *progress, charted *chart.Chart, vals map[string]any) error {
	r, err := c.releases()
	if err != nil {
		return err
	}
	p.say("applying release %s %s", releaseName, s.version)
	made, err := r.apply(ctx, charted, vals, s.limit)
	if err != nil {
		return err
	}
	if err := c.ensureMesh(ctx, p, map[string]any{"enrollment": kube.Labeled}); err != nil {
		return err
	}
	if !s.wait {
		p.say("release %s, revision %d, is applied; tacit check --wait waits for it", made.Name, made.Version)
		return nil
	}
	return c.awaitHealth(ctx, p)
}

// awaitHealth waits until everything is ready and every enrolled pod protected.
func (c *cluster) awaitHealth(ctx context.Context, p *progress) error {
	var last *health
	err := p.await(ctx, func(ctx context.Context) (string, error) {
		h, err := c.health(ctx)
		if err != nil {
			return "", err
		}
		last = h
		return h.missing(), nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		p.say("not ready in time: %v", err)
		return lacking
	}
	if err != nil {
		return err
	}
	p.say("ready: control, %d nodes, %d of %d enrolled pods protected", len(last.nodes), len(last.pods), len(last.pods))
	return nil
}
