package agent

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
)

const (
	// lastUnrest bounds how long rules are left alone that somebody changes again and again.
	// Meanwhile nothing leaves the pod, where the kernel has gates.
	lastUnrest = 5 * time.Second
	// unrestful is the unrest from which on a pod counts as unprotected.
	unrestful = time.Second
	// calm is how many times its unrest a pod must be quiet to be at rest again.
	calm = 3
	// guardSilence is how often it is told at most that a pod's guard drops packets.
	guardSilence = time.Minute
	// partlyFor is how long after the last of its forwarded packets was refused a pod counts as
	// partly protected: so control is told of it rarely, however much is refused.
	partlyFor = time.Hour
)

// forwardsReason and othersReason are what control and people are told of such a pod.
const forwardsReason = "it forwards TCP for others (containers, machines or VPN clients within it) that cannot be captured, and is refused. " +
	"Have the pod translate it to its own address (masquerade), exclude destinations by the annotation tacit.dev/exclude-outbound and ports that " +
	"are led on by tacit.dev/exclude-inbound-ports, make what is within pods of their own, or label the pod tacit.dev/mesh=off"
const othersReason = "it has addresses that the mesh does not know (tacit-control --cluster-cidr, clusterCIDRs of the chart, has no range for them), " +
	"where TCP to it is refused: nobody would speak TLS. Add their ranges, or exclude the ports by the annotation tacit.dev/exclude-inbound-ports"

// guard is what the guard of a pod has dropped.
type guard struct {
	// last is what its counters were, which begin anew with the rules.
	last, dropped map[string]uint64
	// told is when the log was told, untold what it was not told of since.
	told   time.Time
	untold map[string]uint64
	// forwarded is when it was last seen that forwarded packets were refused, otherwise when
	// that was so of connections to an address that the mesh does not know.
	forwarded, otherwise time.Time
}

// countersOf reads the counters; that they cannot be read is told by who reads the rules.
func countersOf(ns *netns.NS) map[string]uint64 {
	now, err := redirect.Counters(ns)
	if err != nil {
		return nil
	}
	return now
}

// see takes counters in, and returns what is new in them.
func (g *guard) see(now map[string]uint64) map[string]uint64 {
	fresh := make(map[string]uint64)
	for kind, n := range now {
		if n < g.last[kind] { // other rules
			g.last[kind] = 0
		}
		if n > g.last[kind] {
			fresh[kind] = n - g.last[kind]
		}
	}
	if now != nil {
		g.last = maps.Clone(now)
	}
	if len(fresh) > 0 && g.dropped == nil {
		g.dropped, g.untold = make(map[string]uint64), make(map[string]uint64)
	}
	for kind, n := range fresh {
		g.dropped[kind] += n
		g.untold[kind] += n
	}
	return fresh
}

// noteRefused takes in what is new in the counters.
func (g *guard) noteRefused(fresh map[string]uint64, now time.Time) {
	if fresh["forwarded"] > 0 {
		g.forwarded = now
	}
	if fresh["other_address"] > 0 {
		g.otherwise = now
	}
}

// partly is why the pod is partly protected, if it is: not all that it would send or get may
// leave or come in.
func (g *guard) partly(now time.Time) (reason string) {
	is := func(last time.Time) bool { return !last.IsZero() && now.Sub(last) < partlyFor }
	switch {
	case is(g.forwarded):
		return forwardsReason
	case is(g.otherwise):
		return othersReason
	}
	return ""
}

// hearGuard tells metrics and log what the guard of p has dropped.
func (a *Agent) hearGuard(p *pod, counters map[string]uint64, now time.Time) {
	g := &p.guard
	fresh := g.see(counters)
	for kind, n := range fresh {
		a.metrics.dropped.WithLabelValues(kind).Add(float64(n))
	}
	g.noteRefused(fresh, now)
	if len(g.untold) == 0 || now.Sub(g.told) < guardSilence {
		return
	}
	attrs := p.attrs()
	for _, kind := range slices.Sorted(maps.Keys(g.untold)) {
		attrs = append(attrs, kind, g.untold[kind])
	}
	a.cfg.Log.Warn("the guard of a pod has dropped packets", attrs...)
	g.told = now
	clear(g.untold)
}

// wasRepaired notes that rules had to be put right: if that happens again and again, they are
// left alone for longer each time.
func (p *pod) wasRepaired(now time.Time) {
	p.unrest = min(max(2*p.unrest, restless), lastUnrest)
	p.repaired = now
}

// wasRight notes that rules were as they should be.
func (p *pod) wasRight(now time.Time) {
	if now.Sub(p.repaired) >= calm*p.unrest {
		p.unrest = 0
	}
}

// isRestless reports whether somebody changes the pod's rules so often that they are not put
// right at once any more.
func (p *pod) isRestless() bool { return p.rules == capturing && p.unrest >= unrestful }

func (p *pod) restlessReason() string {
	return fmt.Sprintf("somebody changes its rules again and again: they are put right every %s", p.unrest)
}
