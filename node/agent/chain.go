package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"tacit.dev/pod/cni"
)

// chainInterval is how often the node's network configuration is looked at: a few
// small files, and another plugin may replace them at any time.
const chainInterval = 500 * time.Millisecond

// keepChain keeps the plugin in the node's chain of CNI plugins until ctx ends. It
// stays there afterwards: pods that begin while no agent is there must wait for the
// next one.
func (a *Agent) keepChain(ctx context.Context) error {
	if a.cfg.Chain.Dir == "" {
		return nil
	}
	tick := time.NewTicker(chainInterval)
	defer tick.Stop()
	said := ""
	for {
		err := a.chain()
		a.metrics.chained.Set(boolean(err == nil))
		if err != nil && err.Error() != said {
			a.cfg.Log.Error("plugin not in the chain of CNI plugins: new pods are not protected before they begin", "error", err)
		}
		said = text(err)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// chain puts the plugin's program and configuration where they belong. The program
// comes first: a chain that names a program that is not there starts no pod at all.
func (a *Agent) chain() error {
	if err := a.install(); err != nil {
		_, rerr := a.cfg.Chain.Remove()
		return errors.Join(err, rerr)
	}
	base, changed, err := a.cfg.Chain.Sync()
	if changed {
		a.metrics.chainChanges.Inc()
		a.cfg.Log.Info("chain of CNI plugins changed", "dir", a.cfg.Chain.Dir, "follows", base)
	}
	return err
}

// install copies the program once, and again if somebody has taken it away.
func (a *Agent) install() error {
	if a.cfg.ProgramDir == "" {
		return nil
	}
	if _, err := os.Stat(filepath.Join(a.cfg.ProgramDir, cni.PluginType)); a.installed && err == nil {
		return nil
	}
	changed, err := cni.Install(a.cfg.Program, a.cfg.ProgramDir)
	if changed {
		a.cfg.Log.Info("plugin installed", "dir", a.cfg.ProgramDir)
	}
	a.installed = err == nil
	return err
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
