package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

const (
	// firstBackoff and lastBackoff bound the time between two tries of a job.
	firstBackoff = 250 * time.Millisecond
	lastBackoff  = 15 * time.Second
	// restless is how often rules are read back if somebody keeps changing them.
	restless = 250 * time.Millisecond
)

// turn does for every pod what has to be done now, and says when to look again.
func (a *Agent) turn(ctx context.Context, now time.Time) time.Duration {
	if a.duty != acting {
		return a.standBy(ctx, now)
	}
	next := now.Add(a.cfg.CheckInterval)
	for _, p := range a.pods {
		a.attend(ctx, p, now)
		if t := p.nextLook(now, a.cfg.ProtectWithin); t.Before(next) {
			next = t
		}
	}
	a.seeMissing(now)
	if t := a.search(ctx, now); t.Before(next) {
		next = t
	}
	if a.expected != nil && a.recovering == 0 && a.servesAll() {
		a.expected = nil
		close(a.served)
	}
	a.metrics.count(a)
	return max(next.Sub(now), time.Millisecond)
}

// standBy is the turn of an agent that does not act.
func (a *Agent) standBy(ctx context.Context, now time.Time) time.Duration {
	for _, p := range a.pods {
		a.give(ctx, p)
	}
	if a.duty == resting {
		if a.isStill() {
			a.still = closeEach(a.still)
		}
		return a.cfg.CheckInterval
	}
	if now.Sub(a.swept) >= a.cfg.CheckInterval {
		a.swept = now
		a.dropEnded()
	}
	return min(max(a.warmUp(now).Sub(now), time.Millisecond), a.cfg.CheckInterval)
}

// nextLook is when something about p may change by time alone.
func (p *pod) nextLook(now time.Time, protectWithin time.Duration) time.Time {
	t := p.check
	if p.busy {
		t = now.Add(time.Hour) // its end is an event
	} else if p.retry.After(now) {
		t = p.retry
	}
	if p.enrolled() && p.reported == "" {
		if due := p.since.Add(protectWithin); due.After(now) && due.Before(t) {
			t = due
		}
	}
	return t
}

// attend brings one pod further.
func (a *Agent) attend(ctx context.Context, p *pod, now time.Time) {
	if w, ok := a.word(p); ok && !p.gone && p.hear(w, now) {
		p.fail(a.save(p), now)
	}
	a.give(ctx, p)
	for !p.busy && (p.gone || !p.retry.After(now)) {
		s := next(p.facts(a.proxy != nil))
		if s == wait {
			break
		}
		a.take(ctx, p, s)
	}
	if !p.busy && !p.gone && !p.check.After(now) {
		a.check(ctx, p)
	}
	if p.isSettled() {
		p.settled = closeEach(p.settled)
	}
	if p.isKnown() {
		p.known = closeEach(p.known)
	}
	a.report(p, now)
}

// word is control's last about p. Without a UID the name has to do.
func (a *Agent) word(p *pod) (mesh.Pod, bool) {
	if p.rec.UID != "" {
		w, ok := a.words[p.rec.UID]
		return w, ok
	}
	for _, w := range a.words {
		if w.Namespace == p.rec.Namespace && w.Name == p.rec.Name {
			return w, true
		}
	}
	return mesh.Pod{}, false
}

// take takes one step: at once, or by beginning a job.
func (a *Agent) take(ctx context.Context, p *pod, s step) {
	switch s {
	case open:
		a.open(ctx, p)
	case tell:
		a.tell(p)
	case capture:
		a.capture(ctx, p)
	case drain:
		a.drain(ctx, p)
	case tellDrain:
		a.proxy.send(handle.Message{Kind: handle.Drain, UID: p.key}, nil)
		p.proxy = saidDrain
	case release:
		a.release(ctx, p)
	case forget:
		a.forget(ctx, p)
	}
}

// tell has the proxy serve p, with copies of the listeners.
func (a *Agent) tell(p *pod) {
	if _, err := mesh.ParseID(p.rec.Word.ID.String()); err != nil {
		p.fail(fmt.Errorf("control's word about the pod: %w", err), time.Now())
		return
	}
	m := handle.Message{Kind: handle.Pod, UID: p.key, Pod: p.info()}
	var files []int
	for _, l := range p.listeners {
		fd, err := duplicate(l.file)
		if err != nil {
			closeFDs(files)
			p.fail(fmt.Errorf("listener %s: %w", l.role, err), time.Now())
			return
		}
		files = append(files, fd)
		m.Roles = append(m.Roles, l.role)
	}
	a.proxy.send(m, files)
	p.proxy, p.reason, p.ports = saidServe, "", [2]uint16{}
}

// fail notes that a job did not succeed, and when it may be tried again; a nil
// error that it did.
func (p *pod) fail(err error, now time.Time) {
	p.err = err
	if err == nil {
		p.backoff, p.retry = 0, time.Time{}
		return
	}
	p.backoff = min(max(2*p.backoff, firstBackoff), lastBackoff)
	p.retry = now.Add(p.backoff/2 + rand.N(p.backoff/2+1))
}

// heard takes a message of the proxy's. What does not answer the last that it was
// told has crossed with it, and counts no more.
func (a *Agent) heard(d *door, m handle.Message) {
	p := a.pods[m.UID]
	if w := a.warm[m.UID]; d == a.proxy && w != nil {
		w.heard(m)
		return
	}
	if d != a.proxy || p == nil || p.gone {
		return
	}
	switch {
	case m.Kind == handle.Ready && p.proxy == saidServe:
		p.proxy, p.reason = saysReady, ""
	case m.Kind == handle.Failed && p.proxy == saidServe:
		p.reason = m.Reason
		a.cfg.Log.Warn("proxy is not ready for a pod", append(p.attrs(), "reason", m.Reason)...)
	case m.Kind == handle.Drained && p.proxy == saidDrain:
		p.proxy = saysDrained
	case m.Kind == handle.Need:
		if p.needs == nil {
			p.needs, p.giving = make(map[int]int), make(map[int]bool)
		}
		p.needs[m.Family] = min(p.needs[m.Family]+m.Count, handle.MaxCount)
	case m.Kind == handle.Bind:
		a.askBind(p, m.Source)
	}
}

// report tells control, the log and the metrics what has become of p.
func (a *Agent) report(p *pod, now time.Time) {
	state, reason := p.reported, ""
	switch {
	case p.isRestless() && !p.gone:
		state, reason = xds.Unprotected, p.restlessReason()
	case p.rules == capturing && !p.gone:
		state, reason = xds.Captured, p.guard.partly(now)
	case p.unprotected(now, a.cfg.ProtectWithin):
		state, reason = xds.Unprotected, p.waitsFor(a.proxy != nil)
	case p.reported != "" && !p.enrolled() && p.rules == noRules && len(p.listeners) == 0:
		state = xds.Released
	}
	ports := state == xds.Captured && p.markedPorts
	var others []netip.Addr
	if state == xds.Captured {
		others = p.others
	}
	same := reason == p.logged || reason == "" && p.rules != capturing
	if state == p.reported && ports == p.reportedPorts && slices.Equal(others, p.reportedOthers) && same {
		return
	}
	p.reported, p.reportedPorts, p.reportedOthers, p.logged = state, ports, others, reason
	a.cfg.Log.Log(context.Background(), levelOf(state), "pod "+string(state), append(p.attrs(), "reason", reason, "marked_ports", ports, "other_addresses", others)...)
	said := xds.Report{UID: p.uid(), Namespace: p.rec.Namespace, Name: p.rec.Name, State: state, Reason: reason}
	if state == xds.Captured {
		said.Addresses, said.MarkedPorts, said.Others = p.reached(), ports, others
	}
	a.tellControl(said)
	if state == xds.Released {
		p.reported = ""
	}
}

// unprotected reports whether p should be captured and is not: it could not be done, which
// is told at once, or it takes too long on its way.
func (p *pod) unprotected(now time.Time, within time.Duration) bool {
	if !p.enrolled() || p.recovering || p.rules == capturing {
		return false
	}
	return p.err != nil || !now.Before(p.since.Add(within))
}

func (a *Agent) tellControl(r xds.Report) {
	if a.cfg.Reporter != nil {
		a.cfg.Reporter.Report(r)
	}
}

// seeMissing finds the pods that should be enrolled and that no runtime has told
// of: they were there before us.
func (a *Agent) seeMissing(now time.Time) {
	for uid, since := range a.missing {
		w, ok := a.words[uid]
		if ok && w.Enroll && !a.has(w) {
			continue
		}
		if since.IsZero() && !a.has(w) {
			a.tellControl(xds.Report{UID: uid, Namespace: w.Namespace, Name: w.Name, State: xds.Released})
		}
		delete(a.missing, uid)
	}
	for uid := range a.left {
		if _, ok := a.words[uid]; !ok {
			delete(a.left, uid)
		}
	}
	for uid, w := range a.words {
		if !w.Enroll || a.has(w) {
			continue
		}
		since, ok := a.missing[uid]
		if !ok {
			a.missing[uid] = now
		}
		if ok && !since.IsZero() && now.Sub(since) >= a.cfg.UnknownGrace {
			a.missing[uid] = time.Time{} // told once
			const reason = "no network namespace is known, and no process was found in the pod's cgroup: restart the pod"
			a.cfg.Log.Warn("pod unprotected", "uid", uid, "namespace", w.Namespace, "pod", w.Name, "reason", reason)
			a.tellControl(xds.Report{UID: uid, Namespace: w.Namespace, Name: w.Name, State: xds.Unprotected, Reason: reason})
		}
	}
}

// has reports whether a runtime has told of w.
func (a *Agent) has(w mesh.Pod) bool {
	if a.pods[w.UID] != nil {
		return true
	}
	for _, p := range a.pods {
		if p.rec.UID == "" && p.rec.Namespace == w.Namespace && p.rec.Name == w.Name {
			return true
		}
	}
	return false
}

func closeEach(cs []chan struct{}) []chan struct{} {
	for _, c := range cs {
		close(c)
	}
	return nil
}
