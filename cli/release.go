package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"helm.sh/helm/v4/pkg/action"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/kube"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage/driver"
)

// releases is Helm's record of what is installed, in Secrets of the namespace.
type releases struct{ cfg *action.Configuration }

func (c *cluster) releases() (*releases, error) {
	if c.records != nil {
		return c.records, nil
	}
	cfg := action.NewConfiguration(action.ConfigurationSetLogger(slog.DiscardHandler))
	if err := cfg.Init(c.getter, namespace, "secrets"); err != nil {
		return nil, fmt.Errorf("prepare Helm: %w", err)
	}
	return &releases{cfg: cfg}, nil
}

// last is nil, and no error, if nothing is installed.
func (r *releases) last() (*release.Release, error) {
	last, err := r.record()
	if last != nil && last.Info.Status == common.StatusUninstalled {
		return nil, err
	}
	return last, err
}

// record is the last release, also if it is not installed any more, nil if there is none.
func (r *releases) record() (*release.Release, error) {
	found, err := r.cfg.Releases.Last(releaseName)
	if errors.Is(err, driver.ErrReleaseNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read release %s: %w", releaseName, err)
	}
	last, ok := found.(*release.Release)
	if !ok {
		return nil, fmt.Errorf("read release %s: Helm has a %T", releaseName, found)
	}
	return last, nil
}

// apply installs the chart, or makes the release that is there what it says. It waits
// for nothing. Helm's own validation is left out: it reads the schema of everything
// that the cluster knows, and the API server validates as well.
func (r *releases) apply(ctx context.Context, c *chart.Chart, vals map[string]any, limit time.Duration) (*release.Release, error) {
	last, err := r.last()
	if err != nil {
		return nil, err
	}
	if last != nil && last.Info.Status.IsPending() {
		return nil, fmt.Errorf("release %s is %s: another tacit is at work, or was interrupted: wait, or run tacit uninstall", releaseName, last.Info.Status)
	}
	if last == nil {
		err = r.install(ctx, c, vals, limit)
	} else {
		err = r.upgrade(ctx, c, vals, limit)
	}
	if err != nil {
		return nil, err
	}
	return r.last()
}

func (r *releases) install(ctx context.Context, c *chart.Chart, vals map[string]any, limit time.Duration) error {
	a := action.NewInstall(r.cfg)
	a.ReleaseName, a.Namespace, a.Timeout = releaseName, namespace, limit
	a.WaitStrategy, a.DisableOpenAPIValidation = kube.HookOnlyStrategy, true
	a.Replace = true // the record of one that was uninstalled
	if _, err := a.RunWithContext(ctx, c, vals); err != nil {
		return fmt.Errorf("install release %s: %w", releaseName, err)
	}
	return nil
}

func (r *releases) upgrade(ctx context.Context, c *chart.Chart, vals map[string]any, limit time.Duration) error {
	a := action.NewUpgrade(r.cfg)
	a.Namespace, a.Timeout, a.MaxHistory = namespace, limit, 10
	a.WaitStrategy, a.DisableOpenAPIValidation = kube.HookOnlyStrategy, true
	a.ResetValues = true
	if _, err := a.RunWithContext(ctx, releaseName, c, vals); err != nil {
		return fmt.Errorf("upgrade release %s: %w", releaseName, err)
	}
	return nil
}

// remove deletes what the release made, and, unless it is to stay, the record of it.
func (r *releases) remove(limit time.Duration, keepRecord bool) error {
	if last, err := r.last(); err != nil || last == nil && keepRecord {
		return err
	}
	a := action.NewUninstall(r.cfg)
	a.Timeout, a.IgnoreNotFound, a.KeepHistory = limit, true, keepRecord
	a.WaitStrategy = kube.StatusWatcherStrategy
	a.DisableHooks = true // they look whether every pod has left, which by now is so
	if _, err := a.Run(releaseName); err != nil {
		return fmt.Errorf("uninstall release %s: %w", releaseName, err)
	}
	return nil
}
