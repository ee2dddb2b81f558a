package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pause"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/handle"
)

// jobLimit bounds one job: the kernel answers in milliseconds.
const jobLimit = 15 * time.Second

const (
	// freeLimit bounds how long a released pod may wait for the proxy to close
	// its listeners, overLimit how long for its peers to end connections; pollPause is
	// how often that is looked at.
	freeLimit = 2 * time.Second
	overLimit = time.Second
	pollPause = 5 * time.Millisecond
)

// job has work run beside the loop, and done, with work's error, on it.
func (a *Agent) job(ctx context.Context, p *pod, work func(context.Context) error, done func(error)) {
	p.busy = true
	a.aside(ctx, work, func(err error) {
		p.busy = false
		if errors.Is(err, netns.ErrGone) {
			a.vanish(p)
		}
		done(err)
		if p.recovering {
			p.recovering = false
			if ctx.Err() == nil { // what the agent's end cut short says nothing of the pod
				a.report(p, time.Now())
			}
			if a.recovering--; a.recovering == 0 {
				a.looked()
			}
		}
	})
}

// aside runs work when there is a place for it. done runs on the loop, or after
// its end.
func (a *Agent) aside(ctx context.Context, work func(context.Context) error, done func(error)) {
	a.running.Go(func() {
		a.jobs <- struct{}{}
		defer func() { <-a.jobs }()
		ctx, cancel := context.WithTimeout(ctx, jobLimit)
		defer cancel()
		err := work(ctx)
		if !a.post(func() { done(err) }) {
			a.late(func() { done(err) })
		}
	})
}

// late runs what the loop has not lived to run: what a job has opened has to
// reach its pod, to be closed with it.
func (a *Agent) late(f func()) {
	a.lateMu.Lock()
	defer a.lateMu.Unlock()
	f()
}

// vanish notes that the namespace of p is no more.
func (a *Agent) vanish(p *pod) {
	if !p.gone {
		p.gone = true
		a.cfg.Log.Info("network namespace is gone", p.attrs()...)
	}
}

// open opens namespace and listeners.
func (a *Agent) open(ctx context.Context, p *pod) {
	rec, ns := p.rec, p.ns
	held, err := a.copyHeld(p.key)
	if err != nil {
		p.fail(err, time.Now())
		return
	}
	var listeners []listener
	a.job(ctx, p, func(context.Context) (err error) {
		defer closeHeld(held)
		if ns == nil {
			if ns, err = openSame(rec); err != nil {
				return err
			}
		}
		listeners, err = openListeners(ns, held)
		for _, l := range listeners {
			a.boundListener(l.file)
		}
		return err
	}, func(err error) {
		p.ns, p.listeners = ns, listeners
		if err == nil {
			a.dropHeld(p.key)
		}
		p.fail(err, time.Now())
	})
}

// copyHeld copies the listeners that another process has given back for a pod: our
// proxy, or the agent before us.
func (a *Agent) copyHeld(key string) (map[handle.Role]*os.File, error) {
	held := a.legacy[key]
	if a.proxy != nil && len(a.proxy.held[key]) > 0 {
		held = a.proxy.held[key]
	}
	return copyEach(held)
}

func (a *Agent) dropHeld(key string) {
	closeHeld(a.legacy[key])
	delete(a.legacy, key)
	if a.proxy != nil {
		closeHeld(a.proxy.takeHeld(key))
	}
}

// openListeners makes the listeners of a pod, or takes those that the proxy held.
func openListeners(ns *netns.NS, held map[handle.Role]*os.File) (ls []listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				closeShared(l.file)
			}
			ls = nil
		}
	}()
	six, err := ns.HasIPv6()
	if err != nil {
		return nil, err
	}
	want := addresses()
	for _, role := range []handle.Role{handle.Outbound4, handle.Outbound6, handle.Inbound4, handle.Inbound6} {
		if want[role].Addr().Is6() && !six {
			continue
		}
		f, err := openListener(ns, held[role], want[role])
		if err != nil {
			return ls, err
		}
		if f == held[role] {
			delete(held, role)
		}
		ls = append(ls, listener{role, f})
	}
	return ls, nil
}

// openListener returns the held file if it is what it is said to be: it comes
// from a process that we do not trust. Else it opens one.
func openListener(ns *netns.NS, held *os.File, at netip.AddrPort) (*os.File, error) {
	if held != nil && ns.IsListener(held, at) == nil {
		return held, nil
	}
	f, err := ns.Listen(at)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("%w: %w", errTaken, err)
	}
	return f, err
}

// capture applies the rules and reads them back. The record comes first.
func (a *Agent) capture(ctx context.Context, p *pod) {
	if err := a.savePhase(p, phaseCapture); err != nil {
		p.fail(err, time.Now())
		return
	}
	ns, word := p.ns, *p.rec.Word
	rules := p.redirectionBy(word)
	apply := a.kernel.Apply
	if p.rules == stale {
		apply = a.kernel.Repair
	}
	p.rules = stale // if it fails, nobody knows
	a.job(ctx, p, func(ctx context.Context) error {
		return apply(ctx, ns, rules)
	}, func(err error) {
		a.metrics.captures.WithLabelValues(result(err)).Inc()
		p.fail(err, time.Now())
		// Control may have said something else meanwhile.
		if err == nil && p.sameRules(word, *p.rec.Word) {
			p.rules = capturing
		}
		p.guard.last, p.guard.forwarded, p.guard.otherwise = nil, time.Time{}, time.Time{} // other rules may refuse something else
		a.checkSoon(p)
		a.watch(ctx, p)
	})
}

// drain applies rules that capture nothing new.
func (a *Agent) drain(ctx context.Context, p *pod) {
	ns := p.ns
	a.job(ctx, p, func(ctx context.Context) error {
		return a.kernel.Apply(ctx, ns, redirect.Config{Drain: true})
	}, func(err error) {
		if err == nil {
			err = a.savePhase(p, phaseDrain)
			p.rules = draining
			a.cfg.Log.Info("pod draining", p.attrs()...)
		}
		p.fail(err, time.Now())
		a.checkSoon(p)
		a.watch(ctx, p)
	})
}

// release takes everything out of the pod, and lets go of it. It waits until the
// proxy has closed its listeners too: a released pod has nothing of ours.
func (a *Agent) release(ctx context.Context, p *pod) {
	ns, d, key, listeners := p.ns, a.proxy, p.key, p.listeners
	a.dropHeld(key)
	var left error
	a.job(ctx, p, func(ctx context.Context) error {
		open := awaitOver(ctx, ns)
		if err := a.kernel.Remove(ctx, ns); err != nil {
			return err
		}
		if d != nil {
			d.send(handle.Message{Kind: handle.Remove, UID: key}, nil)
		}
		for _, l := range listeners {
			closeShared(l.file)
		}
		left = errors.Join(open, awaitFree(ctx, ns))
		return nil
	}, func(err error) {
		if left != nil {
			a.cfg.Log.Warn("a released pod still has something of the capture", append(p.attrs(), "error", left)...)
		}
		if err == nil {
			p.closeFiles()
			p.rules, p.proxy = noRules, unsaid
			err = a.savePhase(p, phaseNone)
		}
		p.fail(err, time.Now())
	})
}

// awaitFree waits until nobody listens at the ports of the capture, and returns
// why somebody seems to, if that takes too long.
func awaitFree(ctx context.Context, ns *netns.NS) error {
	return poll(ctx, freeLimit, func() error {
		ls, err := openListeners(ns, nil)
		for _, l := range ls {
			closeShared(l.file)
		}
		return err
	})
}

// awaitOver waits until no connection is open that was captured on its way in, and returns
// an error if that takes too long, for nobody seems to answer any more, or at once if it
// cannot be seen.
func awaitOver(ctx context.Context, ns *netns.NS) error {
	var blind error
	late := poll(ctx, overLimit, func() error {
		var open bool
		if open, blind = redirect.HasOpen(ns); open {
			return errors.New("a connection does not end")
		}
		return nil
	})
	return errors.Join(late, blind)
}

// poll asks until the answer is no error, and returns the last one if that does not come
// in time.
func poll(ctx context.Context, limit time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if !pause.For(ctx, pollPause) {
			return err
		}
	}
}

// forget ends a pod. Its namespace may be gone already, and goes in any case:
// what cannot be removed from it goes with it.
func (a *Agent) forget(ctx context.Context, p *pod) {
	ns, d, key, ruled := p.ns, a.proxy, p.key, p.rules != noRules
	a.job(ctx, p, func(ctx context.Context) error {
		if ns == nil {
			return nil
		}
		var open error
		if ruled && d != nil {
			open = a.endOpen(ctx, ns, func() { d.send(handle.Message{Kind: handle.Remove, UID: key}, nil) })
		}
		return errors.Join(open, a.kernel.Remove(ctx, ns))
	}, func(err error) {
		if err != nil {
			a.cfg.Log.Debug("an ended pod was not left as it should be", append(p.attrs(), "error", err)...)
		}
		a.sayRemove(p)
		p.closeFiles()
		p.rules, p.proxy, p.err = noRules, unsaid, nil
		a.unsave(p)
		a.report(p, time.Now())
		delete(a.pods, p.key)
		p.known, p.forgotten = closeEach(p.known), closeEach(p.forgotten)
		if n := p.successor; n != nil {
			a.pods[n.key] = n
			n.fail(a.save(n), time.Now())
		}
	})
}

// endOpen ends what is open in an ended pod, and lets nothing new in, while rules are there
// that translate what is still sent.
func (a *Agent) endOpen(ctx context.Context, ns *netns.NS, tell func()) error {
	if err := a.kernel.Apply(ctx, ns, redirect.Config{Drain: true}); err != nil {
		return err
	}
	tell()
	return awaitOver(ctx, ns)
}

// sayRemove has the proxy drop p, if it may have it.
func (a *Agent) sayRemove(p *pod) {
	a.dropHeld(p.key)
	if a.proxy != nil {
		a.proxy.send(handle.Message{Kind: handle.Remove, UID: p.key}, nil)
	}
}

// check sees whether the namespace is still there, and the rules in it are as
// they should be; else it puts them right.
func (a *Agent) check(ctx context.Context, p *pod) {
	rec, ns, rules, want := p.rec, p.ns, p.rules, p.redirection()
	var wrong error
	var ports [2]uint16
	var counters map[string]uint64
	var at []netip.Addr
	p.check = time.Now().Add(a.cfg.CheckInterval*9/10 + rand.N(a.cfg.CheckInterval/5+1))
	p.checked = time.Now()
	a.job(ctx, p, func(ctx context.Context) error {
		there, err := openSame(rec)
		if err != nil {
			return err
		}
		there.Close()
		if rules != capturing && rules != draining {
			return nil
		}
		ports, counters, at = ephemeralPorts(ns), countersOf(ns), addressesOf(ns)
		wrong = a.kernel.Check(ctx, ns, want)
		if wrong == nil {
			return nil
		}
		return a.kernel.Repair(ctx, ns, want)
	}, func(err error) {
		a.hearPorts(p, ports)
		p.hearAddresses(at)
		a.hearGuard(p, counters, time.Now())
		switch {
		case wrong == nil:
			p.wasRight(time.Now())
			a.calmDown(p)
		case !p.gone && ctx.Err() == nil:
			p.wasRepaired(time.Now())
			p.guard.last = nil // counters begin anew
			a.metrics.repairs.Inc()
			a.cfg.Log.Warn("rules were changed by somebody, and are put right", append(p.attrs(), "found", wrong, "error", err, "next_not_before", p.unrest)...)
			a.calmDown(p)
		}
		if err != nil && p.rules == capturing {
			p.rules = stale
		}
		if err != nil || wrong != nil {
			p.fail(err, time.Now())
		}
		a.watch(ctx, p)
	})
}

// checkSoon has the rules read back again, but not without pause.
func (a *Agent) checkSoon(p *pod) {
	if soon := p.checked.Add(max(restless, p.unrest)); soon.Before(p.check) {
		p.check = soon
	}
}

// calmDown has the rules of a restless pod read back when it may be at rest again.
func (a *Agent) calmDown(p *pod) {
	if calmed := p.repaired.Add(calm * p.unrest); p.isRestless() && calmed.Before(p.check) {
		p.check = calmed
	}
}

// watch reads the rules back when somebody changes them. Without it, or if it
// ends, that happens at intervals.
func (a *Agent) watch(ctx context.Context, p *pod) {
	if p.ns == nil || p.gone || p.stopWatch != nil || p.rules == noRules {
		return
	}
	ctx, p.stopWatch = context.WithCancel(ctx)
	ns, attrs := p.ns, p.attrs()
	var told atomic.Bool
	a.running.Go(func() {
		err := redirect.Watch(ctx, ns, func() {
			if told.CompareAndSwap(false, true) {
				a.post(func() { told.Store(false); a.checkSoon(p) })
			}
		})
		if err != nil {
			a.cfg.Log.Warn("rules are watched at intervals only", append(attrs, "error", err)...)
		}
	})
}

// give makes the sockets that the proxy has asked for, a batch at a time.
func (a *Agent) give(ctx context.Context, p *pod) {
	a.bind(ctx, p)
	for family, n := range p.needs {
		if n == 0 || p.giving[family] || a.proxy == nil || a.proxy.isFull() {
			continue
		}
		n = min(n, handle.MaxFiles)
		p.needs[family] -= n
		if p.ns == nil {
			p.needs[family] = 0
			a.proxy.send(handle.Message{Kind: handle.Sockets, UID: p.key, Family: family, Reason: "the pod is not served"}, nil)
			continue
		}
		p.giving[family] = true
		a.giveBatch(ctx, p, netns.SocketConfig{Family: family, Count: n, Mark: mesh.Mark, LastPort: mesh.DirectPortFirst - 1})
	}
}

func (a *Agent) giveBatch(ctx context.Context, p *pod, c netns.SocketConfig) {
	ns, d, key := p.ns, a.proxy, p.key
	var ports [2]uint16
	a.aside(ctx, func(context.Context) error {
		fds, err := ns.Sockets(c)
		a.boundUnread(fds...)
		ports = ephemeralPorts(ns)
		m := handle.Message{Kind: handle.Sockets, UID: key, Family: c.Family, Count: len(fds)}
		if err != nil {
			m.Reason = err.Error()[:min(len(err.Error()), 1000)]
		}
		d.send(m, fds)
		a.metrics.sockets.Add(float64(len(fds)))
		return err
	}, func(err error) {
		p.giving[c.Family] = false
		a.hearPorts(p, ports)
		if err != nil {
			delete(p.needs, c.Family)
			a.cfg.Log.Warn("no sockets for the proxy", append(p.attrs(), "error", err)...)
		}
	})
}

func closeHeld(held map[handle.Role]*os.File) {
	for _, f := range held {
		closeShared(f)
	}
}

// closeShared closes a file that the proxy has, too, as it has all sockets that we ever
// gave it. It may have turned it into one whose close waits for a peer.
func closeShared(f *os.File) {
	if raw, err := f.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { handle.DoNotLinger(int(fd)) })
	}
	f.Close()
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		handle.DoNotLinger(fd)
		unix.Close(fd)
	}
}

// duplicate copies a descriptor, so that its sender may close it whenever it was sent.
func duplicate(f syscall.Conn) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	if e := raw.Control(func(old uintptr) {
		fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); e != nil {
		return -1, e
	}
	return fd, err
}
