package proxy

import (
	"net/netip"
	"slices"
	"time"

	"tacit.dev/mesh"
)

// maxTargets is how many endpoints of a service are tried for one connection.
const maxTargets = 4

// target is one place to dial.
type target struct {
	addr netip.AddrPort
	// workload is who the World knows there, nil if nobody.
	workload *mesh.Peer
	// within means that it is the pod itself.
	within bool
	// direct means mutual TLS with workload, and nothing else: if that fails
	// the connection fails.
	direct bool
}

// route is where a connection goes.
type route struct {
	// service is what was dialled, nil if it was an address.
	service *mesh.Service
	// targets are tried in their order; there is at least one.
	targets []target
	// inside means that service or workload are the cluster's, so that
	// plaintext there is plaintext that the mesh could have avoided.
	inside bool
}

// caller is who asks for a route.
type caller struct {
	addresses []netip.Addr
	// node is where it runs.
	node string
	// pick returns a number of [0,n).
	pick func(n int) int
	// affinity is the pod's; nil for none.
	affinity *affinity
	// mayReach tells which targets it may reach; nil for all.
	mayReach func(target) bool
}

// find decides where a connection to the address to leads. It is pure but for the clock
// and the caller's pick. It asks in this order: the pod itself, a service, a pod, what
// leads to them from outside of the cluster, and the rest of the world. An address that is
// the cluster's and nobody's is not the rest of the world: a pod of the mesh may have it.
func (c *caller) find(w *mesh.World, to netip.AddrPort) (route, error) {
	if c.isSelf(to.Addr()) {
		return c.findSelf(w, to)
	}
	if s := w.Service(to.Addr()); s != nil {
		return c.findEndpoints(w, s, to, c.near(w, s, to))
	}
	if wl := w.Workload(to.Addr()); wl != nil {
		return route{targets: []target{c.target(to, wl)}, inside: true}, nil
	}
	if w.Contested(to.Addr()) {
		return route{inside: true}, refuse(reasonContested, flagNoEndpoint, "dial %s: several objects claim this address", to)
	}
	if in, ok := w.Inlet(to); ok {
		return c.findInlet(w, in, to)
	}
	if wl, port := w.HostPort(to); wl != nil {
		return c.findHostPort(wl, to, port)
	}
	if w.Former(to, time.Now()) {
		return route{inside: true}, refuse(reasonFormerAddress, flagNoEndpoint, "dial %s: the pod or service that had this address is gone, and no other is known yet", to)
	}
	if w.IsOurs(to) {
		return route{inside: true}, refuse(reasonUnknownAddress, flagNoEndpoint, "dial %s: %s, and no pod or service is known there", to, oursAs(w, to))
	}
	return route{targets: []target{{addr: to}}}, nil
}

// oursAs says what of the cluster's the destination is.
func oursAs(w *mesh.World, to netip.AddrPort) string {
	if w.IsNode(to.Addr()) {
		return "a port out of which services get ports of nodes (--node-ports of tacit-control)"
	}
	return "an address of the cluster's"
}

// findSelf refuses the capture's own listeners, where the connection would go in circles.
func (c *caller) findSelf(w *mesh.World, to netip.AddrPort) (route, error) {
	if mesh.IsCapturePort(to.Port()) {
		return route{}, refuse(reasonCapturePort, flagUpstreamFailure, "dial %s: that is a port of the mesh's own", to)
	}
	return route{targets: []target{c.target(to, w.Workload(to.Addr()))}, inside: true}, nil
}

// findInlet goes straight to the endpoints of a service that was dialled from inside by an
// address for those outside, as kube-proxy does.
func (c *caller) findInlet(w *mesh.World, in mesh.Inlet, to netip.AddrPort) (route, error) {
	at := netip.AddrPortFrom(to.Addr(), in.Port)
	return c.findEndpoints(w, in.Service, at, c.behind(w, in, at))
}

// behind are the endpoints to which an inlet leads; internalTrafficPolicy is not about it.
// From its own node, a port of a node leads everywhere.
func (c *caller) behind(w *mesh.World, in mesh.Inlet, at netip.AddrPort) []mesh.Endpoint {
	all := w.Endpoints(in.Service, in.Port)
	switch {
	case in.Node != "" && in.Node != c.node:
		return only(all, func(e mesh.Endpoint) bool { return e.Workload.Node == in.Node })
	case in.Service.Reach == mesh.SameNode:
		return all
	}
	return c.near(w, in.Service, at)
}

// findHostPort goes straight to the pod behind a port of its node.
func (c *caller) findHostPort(wl *mesh.Peer, to netip.AddrPort, port uint16) (route, error) {
	a, ok := addressLike(wl, to.Addr())
	if !ok {
		return route{inside: true}, refuse(reasonNoEndpoint, flagNoEndpoint, "dial %s: %s/%s has no address of that family", to, wl.Namespace, wl.Name())
	}
	return route{targets: []target{c.target(netip.AddrPortFrom(a, port), wl)}, inside: true}, nil
}

// target says how to reach workload wl, which may be nil, at addr.
func (c *caller) target(addr netip.AddrPort, wl *mesh.Peer) target {
	t := target{addr: addr, workload: wl, within: c.isSelf(addr.Addr())}
	t.direct = !t.within && wl != nil && wl.Direct && !slices.Contains(wl.ExcludeInbound, addr.Port())
	return t
}

func (c *caller) isSelf(a netip.Addr) bool {
	return slices.Contains(c.addresses, a) || a.IsLoopback()
}

// findEndpoints picks endpoints of s evenly, of the family that was dialled, among
// those that are near enough, and keeps to one if the service asks for that. A
// service that is known and has none is refused: kube-proxy may know a newer
// endpoint that is in the mesh, and would lead plaintext to it.
func (c *caller) findEndpoints(w *mesh.World, s *mesh.Service, to netip.AddrPort, endpoints []mesh.Endpoint) (route, error) {
	chosen := c.affinity.first(s, to, endpoints, sample(len(endpoints), maxTargets, c.pick), time.Now())
	r := route{service: s, inside: true, targets: make([]target, 0, len(chosen))}
	for _, i := range chosen {
		if t, ok := c.endpoint(w, endpoints[i], to.Addr()); ok {
			r.targets = append(r.targets, t)
		}
	}
	if c.mayReach != nil && !all(r.targets, c.mayReach) {
		may := only(endpoints, func(e mesh.Endpoint) bool {
			t, ok := c.endpoint(w, e, to.Addr())
			return ok && c.mayReach(t)
		})
		if len(may) > 0 { // otherwise the refusal names one that is there
			return c.findEndpoints(w, s, to, may)
		}
	}
	if len(r.targets) < len(chosen) {
		return c.findEndpoints(w, s, to, only(endpoints, func(e mesh.Endpoint) bool {
			_, ok := c.endpoint(w, e, to.Addr())
			return ok
		}))
	}
	if len(r.targets) == 0 {
		return r, refuse(reasonNoEndpoint, flagNoEndpoint, "dial %s: %s has no ready endpoint at this port and family", to, s.Key())
	}
	return r, nil
}

// endpoint says how to reach an endpoint of the family of a. Where the service lists an
// address and no pod, the World knows who is there: that pod or, if it is nobody's, the pod
// that the service names. Otherwise it is outside of the mesh, unless a pod may be there, or
// the address leads on to one. Behind a service's own address there is nothing: kube-proxy
// leads no connection twice.
func (c *caller) endpoint(w *mesh.World, e mesh.Endpoint, a netip.Addr) (target, bool) {
	b, ok := addressLike(e.Workload, a)
	at := netip.AddrPortFrom(b, e.Port)
	if !ok || !e.Workload.Listed {
		return c.target(at, e.Workload), ok
	}
	wl := w.Workload(b)
	switch {
	case wl != nil:
	case w.Contested(b) || w.Service(b) != nil:
		return target{}, false
	case w.Pod(e.Workload) != nil:
		wl = w.Pod(e.Workload)
	default:
		return c.onward(w, at)
	}
	return c.target(at, wl), true
}

// onward says how to reach an endpoint that is no pod, by find's order. An inlet leads to
// pods alone: services may list each other's in a circle.
func (c *caller) onward(w *mesh.World, at netip.AddrPort) (target, bool) {
	if in, ok := w.Inlet(at); ok {
		pods := only(c.behind(w, in, netip.AddrPortFrom(at.Addr(), in.Port)), func(e mesh.Endpoint) bool {
			_, fits := addressLike(e.Workload, at.Addr())
			return fits && !e.Workload.Listed
		})
		if len(pods) == 0 {
			return target{}, false
		}
		e := pods[c.pick(len(pods))]
		b, _ := addressLike(e.Workload, at.Addr())
		return c.target(netip.AddrPortFrom(b, e.Port), e.Workload), true
	}
	if wl, port := w.HostPort(at); wl != nil {
		b, ok := addressLike(wl, at.Addr())
		return c.target(netip.AddrPortFrom(b, port), wl), ok
	}
	return c.target(at, nil), !w.Former(at, time.Now()) && !(w.IsNode(at.Addr()) && w.IsOurs(at))
}

// near returns the endpoints among which one is picked. Where it matters who is
// among them they are those of one family, as kube-proxy has it.
func (c *caller) near(w *mesh.World, s *mesh.Service, to netip.AddrPort) []mesh.Endpoint {
	endpoints := w.Endpoints(s, to.Port())
	if s.Reach == mesh.Everywhere && s.Affinity <= 0 {
		return endpoints
	}
	zone := ""
	for _, a := range c.addresses {
		if self := w.Workload(a); self != nil {
			zone = self.Zone
		}
	}
	return near(s, ofFamily(endpoints, to.Addr()), c.node, zone)
}

// ofFamily returns the endpoints that have an address of the family of a.
func ofFamily(endpoints []mesh.Endpoint, a netip.Addr) []mesh.Endpoint {
	var fit []mesh.Endpoint
	for _, e := range endpoints {
		if _, ok := addressLike(e.Workload, a); ok {
			fit = append(fit, e)
		}
	}
	return fit
}

// addressLike returns the address of wl of the same family as a.
func addressLike(wl *mesh.Peer, a netip.Addr) (netip.Addr, bool) {
	for _, b := range wl.Addresses {
		if b.Unmap().Is4() == a.Is4() {
			return b.Unmap(), true
		}
	}
	return netip.Addr{}, false
}

func all(targets []target, f func(target) bool) bool {
	return !slices.ContainsFunc(targets, func(t target) bool { return !f(t) })
}

// sample returns at most k different numbers of [0,n), each order of them
// equally likely.
func sample(n, k int, pick func(n int) int) []int {
	if n <= 0 {
		return nil
	}
	k = min(n, k)
	chosen := make([]int, 0, k)
	// Floyd's algorithm would not give a random order; with k ≤ 4 trying
	// again is quick, also for n = k.
	for len(chosen) < k {
		if i := pick(n); !slices.Contains(chosen, i) {
			chosen = append(chosen, i)
		}
	}
	return chosen
}
