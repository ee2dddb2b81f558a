package cli

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"

	"github.com/spf13/pflag"
	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/cli/values"
	"helm.sh/helm/v4/pkg/getter"
	release "helm.sh/helm/v4/pkg/release/v1"
	"k8s.io/apimachinery/pkg/util/version"

	"tacit.dev/deploy"
)

// openChart is the chart inside of this program, as of this version.
func openChart(built string) (*chart.Chart, error) {
	var files []*archive.BufferedFile
	const root = "helm/tacit"
	err := fs.WalkDir(deploy.Chart, root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := deploy.Chart.ReadFile(name)
		files = append(files, &archive.BufferedFile{Name: strings.TrimPrefix(name, root+"/"), Data: text})
		return err
	})
	if err != nil {
		return nil, err
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		return nil, fmt.Errorf("open the chart: %w", err)
	}
	c.Metadata.AppVersion = built
	c.Metadata.Version = chartVersion(built)
	return c, nil
}

// chartVersion is a version as charts have to have one: a build that is none of a
// release is told by its metadata.
func chartVersion(built string) string {
	if v, err := version.ParseSemantic(built); err == nil {
		return v.String()
	}
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, built)
	return "0.0.0+" + plain
}

// valueFlags are values of the chart, as Helm takes them.
type valueFlags struct{ options values.Options }

func (v *valueFlags) add(f *pflag.FlagSet) {
	f.StringSliceVarP(&v.options.ValueFiles, "values", "f", nil, "`file` with values of the chart, or - for standard input; may be repeated")
	f.StringArrayVar(&v.options.Values, "set", nil, "a value, as `KEY=VALUE`; may be repeated")
	f.StringArrayVar(&v.options.StringValues, "set-string", nil, "a value that is text, as `KEY=VALUE`")
	f.StringArrayVar(&v.options.JSONValues, "set-json", nil, "a value, as `KEY=JSON`")
	f.StringArrayVar(&v.options.FileValues, "set-file", nil, "a value that a file has, as `KEY=FILE`")
}

func (v *valueFlags) merge() (map[string]any, error) {
	// No getters: values come from files, not over a network.
	merged, err := v.options.MergeValues(getter.Providers{})
	if err != nil {
		return nil, fmt.Errorf("read values: %w", err)
	}
	return merged, nil
}

// render is what the chart makes of values, without a cluster. The chart's schema
// refuses what it does not know.
func render(ctx context.Context, c *chart.Chart, vals map[string]any) (string, error) {
	r, err := dryRun(ctx, c, vals)
	if err != nil {
		return "", err
	}
	return r.Manifest, nil
}

// dryRun is the release that the chart would be, with its hooks.
func dryRun(ctx context.Context, c *chart.Chart, vals map[string]any) (*release.Release, error) {
	install := action.NewInstall(action.NewConfiguration(action.ConfigurationSetLogger(slog.DiscardHandler)))
	install.DryRunStrategy = action.DryRunClient
	install.ReleaseName, install.Namespace = releaseName, namespace
	install.DisableOpenAPIValidation = true
	// Any that the chart takes: which one the cluster has, preflight asks.
	install.KubeVersion = &common.KubeVersion{Version: "v" + oldest}
	made, err := install.RunWithContext(ctx, c, vals)
	if err != nil {
		return nil, fmt.Errorf("render the chart: %w", err)
	}
	r, ok := made.(*release.Release)
	if !ok {
		return nil, fmt.Errorf("render the chart: Helm made a %T", made)
	}
	return r, nil
}
