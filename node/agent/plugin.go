package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tacit.dev/pod/cni"
)

// answer answers the CNI plugin. It is called by many goroutines at once.
func (a *Agent) answer(ctx context.Context, r cni.Request) error {
	var err error
	switch r.Command {
	case cni.Add:
		err = a.add(ctx, r)
	case cni.Del:
		err = a.del(ctx, r)
	case cni.Check:
		err = a.checkFor(ctx, r)
	}
	a.metrics.requests.WithLabelValues(string(r.Command), result(err)).Inc()
	if err != nil {
		a.cfg.Log.Warn("plugin refused", "command", string(r.Command), "namespace", r.Namespace, "pod", r.Name, "uid", r.UID, "error", err)
	}
	return err
}

// add takes a pod in and waits until it is as control wants it, and known. If the first
// does not happen in time the pod is refused; it stays known until its DEL.
func (a *Agent) add(ctx context.Context, r cni.Request) error {
	told, err := a.protect(ctx, r)
	if err == nil && told {
		err = a.awaitKnown(ctx, r)
	}
	return err
}

// awaitKnown waits until every node knows the pod that begins now: its addresses are soon
// known to others, by DNS for one, and who is told of them by those must not take it for
// something outside of the mesh. A node that is slow or away does not hold it up for long:
// it is waited for in vain until control gives it up.
func (a *Agent) awaitKnown(ctx context.Context, r cni.Request) error {
	known := make(chan struct{})
	a.post(func() {
		p := a.sandbox(r.ContainerID)
		if p == nil { // it has ended already
			close(known)
			return
		}
		p.known = append(p.known, known)
	})
	ctx, cancel := context.WithTimeout(ctx, a.cfg.KnownPatience)
	defer cancel()
	select {
	case <-known:
		return nil
	case <-a.ended:
		return errEnding
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return errEnding
	}
	a.cfg.Log.Warn("pod begins though not every node knows it", "namespace", r.Namespace, "pod", r.Name, "uid", r.UID)
	return nil
}

// protect takes a pod in and waits until it is as control wants it. It reports whether
// that is so, or the pod begins without a word of control's.
func (a *Agent) protect(ctx context.Context, r cni.Request) (told bool, err error) {
	rec := record{
		UID: r.UID, Namespace: r.Namespace, Name: r.Name, Container: r.ContainerID,
		Netns: r.Netns, Addresses: r.Addresses,
	}
	if rec.Key, err = keyAt(r.Netns); err != nil {
		return false, fmt.Errorf("pod %s/%s: %w", r.Namespace, r.Name, err)
	}
	settled := make(chan struct{})
	if !a.post(func() { a.added(rec, settled) }) {
		return false, errEnding
	}
	select {
	case <-settled:
		return true, nil
	case <-ctx.Done():
	case <-time.After(a.cfg.WordPatience):
		if a.mayBegin(rec) {
			a.cfg.Log.Warn("pod begins though control is silent: its namespace is not enrolled", "namespace", r.Namespace, "pod", r.Name, "uid", r.UID)
			return false, nil
		}
	}
	select {
	case <-settled:
		return true, nil
	case <-a.ended:
		return false, errEnding
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return false, errEnding
	}
	why := a.ask(func() string { return a.why(rec.Container) })
	if why == "" { // at the last moment
		return true, nil
	}
	return false, fmt.Errorf("pod %s/%s is not protected in time: %s", r.Namespace, r.Name, why)
}

// errEnding has the plugin ask again at once: another agent, which takes over or
// begins, answers.
var errEnding error = &cni.Error{Code: cni.CodeEnding, Msg: "the tacit agent of this node is ending", Details: "ask again"}

// added is add on the loop. A runtime that asks again about the same sandbox gets
// the same answer; another sandbox of the same pod takes the place of the first.
func (a *Agent) added(rec record, settled chan struct{}) {
	key := rec.UID
	if key == "" {
		key = rec.Container
	}
	old := a.pods[key]
	if old != nil && !old.gone && old.rec.Container == rec.Container && old.rec.Key == rec.Key {
		old.settled = append(old.settled, settled)
		return
	}
	p := &pod{key: key, rec: rec, since: time.Now(), check: time.Now().Add(a.cfg.CheckInterval), settled: []chan struct{}{settled}}
	if old != nil {
		old.gone = true
		old.successor = p
		return
	}
	a.pods[key] = p
	p.fail(a.save(p), time.Now())
}

// del ends a pod, and waits until nothing of it is left. One that nobody knows
// has ended already.
func (a *Agent) del(ctx context.Context, r cni.Request) error {
	forgotten := make(chan struct{})
	if !a.post(func() { a.deleted(r.ContainerID, forgotten) }) {
		return errEnding
	}
	select {
	case <-forgotten:
	case <-a.ended:
		return errEnding
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return errEnding
		}
	}
	return nil // the agent sees that the namespace is gone
}

func (a *Agent) deleted(container string, forgotten chan struct{}) {
	p := a.sandbox(container)
	if p == nil {
		close(forgotten)
		return
	}
	a.left[p.rec.UID] = container
	if old := a.pods[p.key]; old != p { // p waits for the place of old
		old.successor = nil
		close(forgotten)
		return
	}
	p.gone = true
	p.forgotten = append(p.forgotten, forgotten)
}

// mayBegin reports whether a pod of which control has not told is one of a namespace
// without enrolled pods. Should control want it nevertheless, it is enrolled then.
func (a *Agent) mayBegin(rec record) bool {
	told := a.ask(func() string {
		if p := a.sandbox(rec.Container); p != nil && p.rec.Word == nil {
			return ""
		}
		return "told"
	})
	return told == "" && !cni.MayEnroll(a.namespacesFile(), rec.Namespace)
}

// checkFor answers a CHECK: is the pod still as its ADD left it?
func (a *Agent) checkFor(ctx context.Context, r cni.Request) error {
	why := a.ask(func() string {
		// One that has begun without us, and has nothing to do with us.
		if w, known := a.words[r.UID]; a.sandbox(r.ContainerID) == nil && !(known && w.Enroll) {
			return ""
		}
		return a.why(r.ContainerID)
	})
	if why != "" {
		return fmt.Errorf("pod %s/%s: %s", r.Namespace, r.Name, why)
	}
	return nil
}

// why says why a sandbox is not as control wants it, "" if it is.
func (a *Agent) why(container string) string {
	p := a.sandbox(container)
	switch {
	case p == nil:
		return "the agent does not know this sandbox"
	case p.isSettled():
		return ""
	}
	return p.waitsFor(a.proxy != nil)
}

// sandbox finds a pod by the sandbox, also one that waits for its place.
func (a *Agent) sandbox(container string) *pod {
	for _, p := range a.pods {
		if p.rec.Container == container {
			return p
		}
		if p.successor != nil && p.successor.rec.Container == container {
			return p.successor
		}
	}
	return nil
}

// ask runs f on the loop and returns its answer.
func (a *Agent) ask(f func() string) string {
	answer := make(chan string, 1)
	if !a.post(func() { answer <- f() }) {
		return errEnding.Error()
	}
	select {
	case s := <-answer:
		return s
	case <-a.ended:
		return errEnding.Error()
	}
}
