package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"tacit.dev/pod/cni"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/finding"
)

// Sweep removes what agents with the same Config have left on this node: the plugin
// and its place in the chain, rules in namespaces of pods, the agent's folder. No
// agent may run. It goes on after an error, and may be called again. The chain
// comes first: while it names the plugin, and nobody answers it, no pod begins.
func Sweep(ctx context.Context, cfg Config) []finding.Finding {
	unlock, err := lockToSweep(ctx, cfg.RunDir)
	if err != nil {
		return []finding.Finding{{What: "agent", Lacks: err.Error(), Remedy: "end the agent of this node first"}}
	}
	defer unlock()
	return []finding.Finding{sweepChain(cfg), sweepRules(ctx, cfg.Proc), sweepFolder(cfg.RunDir)}
}

// sweepPatience is how long an agent that was told to end may go on for its proxy.
const sweepPatience = 45 * time.Second

// lockToSweep keeps agents away, when the one that may be there has ended. Without a
// folder there was none.
func lockToSweep(ctx context.Context, dir string) (unlock func(), err error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	a := Agent{cfg: Config{RunDir: dir}}
	var f *os.File
	err = poll(ctx, sweepPatience, func() (err error) {
		if f, err = a.lock(); f == nil && err == nil {
			err = fmt.Errorf("an agent has the lock of %s", dir)
		}
		return err
	})
	return func() { f.Close() }, err
}

func sweepChain(cfg Config) finding.Finding {
	f := finding.Finding{What: "plugin", Found: "nothing"}
	changed, err := cfg.Chain.Remove()
	if changed {
		f.Found = "removed from the chain"
	}
	for _, name := range []string{cni.PluginType, "." + cni.PluginType + ".new"} {
		rerr := os.Remove(filepath.Join(cfg.ProgramDir, name))
		if !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	if rerr := os.Remove(filepath.Join(cfg.Chain.Dir, cni.NamespacesName)); !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	f.Lacks = text(err)
	return f
}

func sweepRules(ctx context.Context, proc string) finding.Finding {
	f := finding.Finding{What: "rules"}
	k, err := redirect.NewKernel()
	if err != nil {
		f.Lacks = err.Error()
		return f
	}
	defer k.Close()
	found, err := netns.Find(ctx, proc, func(string) bool { return true })
	swept := 0
	for _, pod := range found {
		did, serr := sweepPod(ctx, k, pod.Path)
		err = errors.Join(err, serr)
		if did {
			swept++
		}
	}
	f.Found = fmt.Sprintf("removed from %d of %d pods", swept, len(found))
	f.Lacks = text(err)
	return f
}

// sweepPod removes the rules of a pod, if it has any. A pod that has ended has none.
func sweepPod(ctx context.Context, k *redirect.Kernel, path string) (did bool, err error) {
	ns, err := netns.Open(path)
	if errors.Is(err, netns.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer ns.Close()
	has, err := redirect.Present(ns)
	if err != nil || !has {
		return false, err
	}
	return true, k.Remove(ctx, ns)
}

func sweepFolder(dir string) finding.Finding {
	f := finding.Finding{What: "folder", Found: dir + " removed"}
	f.Lacks = text(os.RemoveAll(dir))
	return f
}
