package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// Pods that began before us, or while no plugin was installed, no runtime tells of.
// They are found by their processes.

const (
	firstSearch = 200 * time.Millisecond
	lastSearch  = 10 * time.Second
)

// searching is when the missing pods were and will be looked for. It belongs to
// the loop.
type searching struct {
	busy  bool
	next  time.Time
	pause time.Duration
}

// search looks for pods that are missing, if it is time, and says when to look
// again: soon at first, then more rarely. Nobody may ever find some of them: a pod
// that is just being made is missing too, until its runtime tells of it.
func (a *Agent) search(ctx context.Context, now time.Time) time.Time {
	s := &a.searching
	if a.cfg.Proc == "" || len(a.missing) == 0 {
		*s = searching{busy: s.busy}
		return now.Add(time.Hour)
	}
	if s.busy || s.next.After(now) {
		return s.next
	}
	s.busy = true
	s.pause = min(max(2*s.pause, firstSearch), lastSearch)
	s.next = now.Add(s.pause)
	words := make(map[string]mesh.Pod, len(a.missing))
	for uid := range a.missing {
		words[uid] = a.words[uid]
	}
	var found []record
	a.aside(ctx, func(ctx context.Context) (err error) {
		found, err = findPods(ctx, a.cfg.Proc, words)
		return err
	}, func(err error) {
		s.busy = false
		if err != nil {
			a.cfg.Log.Warn("search for running pods", "error", err)
		}
		for _, rec := range found {
			a.takeFound(rec)
		}
	})
	return s.next
}

// takeFound takes a pod in as if its runtime had told of it, unless it has
// meanwhile, or control does not want it any more.
func (a *Agent) takeFound(rec record) {
	if w, ok := a.words[rec.UID]; !ok || !w.Enroll || a.has(w) || rec.Container != "" && a.left[rec.UID] == rec.Container {
		return
	}
	a.cfg.Log.Info("running pod found", "uid", rec.UID, "namespace", rec.Namespace, "pod", rec.Name, "netns", rec.Netns)
	a.added(rec, make(chan struct{}))
}

// findPods makes the records of those pods of words that run, also beside an error.
func findPods(ctx context.Context, proc string, words map[string]mesh.Pod) ([]record, error) {
	found, err := netns.Find(ctx, proc, func(uid string) bool { _, ok := words[uid]; return ok })
	var list []record
	for uid, f := range found {
		rec, rerr := recordOf(words[uid], f)
		if rerr != nil {
			err = errors.Join(err, fmt.Errorf("pod %s/%s: %w", words[uid].Namespace, words[uid].Name, rerr))
			continue
		}
		list = append(list, rec)
	}
	return list, err
}

// recordOf is what the runtime would have told of a pod.
func recordOf(w mesh.Pod, f netns.Found) (record, error) {
	ns, err := netns.Open(f.Path)
	if err != nil {
		return record{}, err
	}
	defer ns.Close()
	rec := record{UID: w.UID, Namespace: w.Namespace, Name: w.Name, Container: f.Container, Netns: f.Path, Key: ns.Key(), Found: true}
	err = ns.Do(func() (err error) {
		rec.Addresses, err = globalAddresses()
		return err
	})
	return rec, err
}

// globalAddresses are those of the calling thread's namespace by which others reach it.
func globalAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var list []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			list = append(list, p.Addr().Unmap())
		}
	}
	return list, nil
}
