package proxy

import (
	"fmt"
	"net/netip"
	"slices"

	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// What leaves a pod in plaintext is decided here, before it is dialed and for as long as it is open:
// under a strict mode nothing of the kind reaches an address of the cluster.

// letOut lets j leave in plaintext to t, which is not the pod itself.
func (d *pod) letOut(j *journey, t target) error {
	p := &passage{departure: &policy.Departure{Dialed: unmap(j.flow.Dialled), To: unmap(t.addr), Inside: t.workload != nil}, end: func(why *refusal) { j.queued.reset(why) }}
	p.connection.Source = p.departure.To.Addr()
	d.follows(j, p)
	w := d.p.know.world()
	set := d.law(w).set
	v := judgeDeparture(*p.departure, set, w)
	switch {
	case !v.Allowed:
		return nameTarget(denied(v), t, w)
	case set.IsStrictOutbound():
		return d.except(j, v.Reason == policy.Excepted)
	}
	return nil
}

// judgeDeparture decides about what is open, or about to be.
func judgeDeparture(to policy.Departure, set *policy.Set, w *mesh.World) policy.Verdict {
	to.Inside = to.Inside || isCluster(w, to.To)
	return set.Leave(&to)
}

// isCluster reports whether the address is one of the cluster: a pod's, a Service's, a node's, or
// in a range of which nobody is known to have it.
func isCluster(w *mesh.World, to netip.AddrPort) bool {
	a := to.Addr()
	return w.Workload(a) != nil || w.Service(a) != nil || w.IsNode(a) || w.Contested(a) || w.IsOurs(to)
}

// nameTarget adds whom the mode keeps the pod from, and why there is no TLS.
func nameTarget(r *refusal, t target, w *mesh.World) *refusal {
	return &refusal{r.reason, r.flags, fmt.Errorf("dial %s: %s: %w", t.addr, nameOf(t, w), r.err)}
}

func nameOf(t target, w *mesh.World) string {
	wl := t.workload
	switch {
	case wl == nil && w.IsNode(t.addr.Addr()):
		return "an address of a node"
	case wl == nil && isCluster(w, t.addr):
		return "an address of the cluster that is no pod's"
	case wl == nil:
		return "an address outside of the cluster that is not listed"
	}
	name := wl.Namespace + "/" + wl.Name()
	switch {
	case wl.HostNetwork:
		return name + " has the network of its node"
	case wl.Direct && slices.Contains(wl.ExcludeInbound, t.addr.Port()):
		return name + " excludes this port from the mesh"
	}
	return name + " is not in the mesh"
}

// mayReach tells which targets may be reached, so that a Service whose endpoints are not all in
// the mesh is served by those that are. It is nil where all may be.
func (d *pod) mayReach(w *mesh.World, dialed netip.AddrPort) func(target) bool {
	set := d.law(w).set
	if !set.IsStrictOutbound() {
		return nil
	}
	return func(t target) bool {
		if t.direct || t.within {
			return true
		}
		return judgeDeparture(policy.Departure{Dialed: unmap(dialed), To: unmap(t.addr), Inside: t.workload != nil}, set, w).Allowed
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(plain(a.Addr()), a.Port()) }
