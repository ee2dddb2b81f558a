package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pause"
	"tacit.dev/pod/cni"
)

const (
	// chainInterval is how often the node's network configuration is looked at when
	// the kernel tells of no change: a few small files.
	chainInterval = 500 * time.Millisecond
	// chainPatience is how long the network configuration that is followed may be away, or
	// half written, before another one of the folder is followed: a CNI that writes its own
	// anew must not have pods begin in another network.
	chainPatience = 2 * time.Second
	// chainPause is kept after each look, should another plugin's keeper answer every
	// change of ours with one of its own.
	chainPause = 20 * time.Millisecond
)

// keepChain keeps the plugin in the node's chain of CNI plugins until ctx ends. It
// stays there afterwards: pods that begin while no agent is there must wait for the
// next one.
func (a *Agent) keepChain(ctx context.Context) error {
	if a.cfg.Chain.Dir == "" {
		return nil
	}
	tick := time.NewTicker(chainInterval)
	defer tick.Stop()
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() { a.watchChain(ctx) })
	said := ""
	var away time.Time // since when what was followed is away; zero if it is there
	for {
		err := a.chain(!away.IsZero() && time.Since(away) > chainPatience)
		stays := errors.Is(err, cni.ErrAway)
		switch {
		case !stays:
			away = time.Time{}
		case away.IsZero():
			away = time.Now()
		}
		a.metrics.chained.Set(boolean(err == nil || stays))
		switch {
		case err == nil || err.Error() == said:
		case stays:
			a.cfg.Log.Warn("network configuration of the node is away: new pods may not begin", "error", err)
		default:
			a.cfg.Log.Error("plugin not in the chain of CNI plugins: new pods are not protected before they begin", "error", err)
		}
		said = text(err)
		if !pause.For(ctx, chainPause) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-a.rechain:
		}
	}
}

// watchChain tells the chain's keeper of changes in the folder until ctx ends.
func (a *Agent) watchChain(ctx context.Context) {
	err := watchDir(ctx, a.cfg.Chain.Dir, a.rechain)
	if ctx.Err() == nil {
		a.cfg.Log.Warn("network configurations are looked at twice a second only", "dir", a.cfg.Chain.Dir, "error", err)
	}
}

// watchDir tells of changes in a folder until ctx ends, or until it cannot.
func watchDir(ctx context.Context, dir string, changed chan<- struct{}) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("inotify_init", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	const events = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO
	if _, err := unix.InotifyAddWatch(fd, dir, events|unix.IN_ONLYDIR); err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	defer context.AfterFunc(ctx, func() { f.Close() })()
	buf := make([]byte, 4096)
	for {
		if _, err := f.Read(buf); err != nil {
			return err
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}

// chain puts the plugin's program and configuration where they belong. The program
// comes first: a chain that names a program that is not there starts no pod at all.
// For settled see cni.Chain.Sync.
func (a *Agent) chain(settled bool) error {
	if err := a.install(); err != nil {
		_, rerr := a.cfg.Chain.Remove()
		return errors.Join(err, rerr)
	}
	if names := a.namespaces.Load(); names != nil {
		changed, err := cni.WriteNamespaces(a.namespacesFile(), *names)
		if err != nil {
			return err
		}
		if changed {
			a.cfg.Log.Info("enrolled namespaces", "namespaces", *names)
		}
	}
	base, changed, err := a.cfg.Chain.Sync(settled)
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

// ApplyNamespaces takes control's list of the namespaces in which a pod may have to
// be enrolled. It is kept for the plugin, which reads it while no agent is there.
func (a *Agent) ApplyNamespaces(names []string) {
	a.namespaces.Store(&names)
	select {
	case a.rechain <- struct{}{}:
	default:
	}
}

// namespacesFile is "" if there is no folder for it.
func (a *Agent) namespacesFile() string {
	if a.cfg.Chain.Dir == "" {
		return ""
	}
	return filepath.Join(a.cfg.Chain.Dir, cni.NamespacesName)
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
