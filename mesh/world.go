package mesh

import (
	"iter"
	"net/netip"
	"slices"
	"time"
)

// formerFor is how long an address counts as a pod's after its pod is gone.
const formerFor = 2 * time.Minute

// World is what a node knows of the mesh at one moment. It is immutable:
// readers load it through one atomic pointer, a writer makes another one of it (With) and
// swaps that in. The two share all but what has changed. The zero World is empty and usable.
//
// Of an address it knows one of three things: whose it is (Workload, Service, Inlet,
// HostPort, IsNode); that it is not the cluster's; or that it is the cluster's and not
// known (Former, Contested, IsOurs).
type World struct {
	era era
	// open says that there is a Part of what is to come. Nobody reads it.
	open bool

	// What there is, by name.
	peers    trie[string, *Peer]
	services trie[string, *Service]
	places   trie[string, *Place]
	policies trie[string, *Policy]

	// What leads to it.
	pods      claims[address, *Peer]
	virtual   claims[address, *Service]
	inlets    claims[destination, *Service]
	nodes     claims[address, *Place]
	contested claims[address, *Place]
	hostPorts trie[hostPort, []*Peer] // by UID
	endpoints trie[servicePort, []Endpoint]
	ranges    ranges
	// broad are the policies of a namespace, and at "" those of the whole mesh, by Key.
	broad trie[string, []*Policy]
	// policyVersion counts the changes of policies, and named those that workloads name.
	policyVersion uint64
	named         int
	// stricts counts the workloads that have a strict mode of their own.
	stricts int
	former  former
	// revoked are the identities that count no more, trustVersion counts their changes, and
	// maxAge has who says how old connections may become.
	revoked      trie[ID, int]
	trustVersion uint64
	maxAge       claims[struct{}, *Place]
	// portRange has who says out of which ports services get ports of nodes, and healthPorts
	// counts those that are kube-proxy's own.
	portRange   claims[struct{}, *Place]
	healthPorts trie[uint16, int]

	// What many Peers share.
	kinds shared[Kind]
	spots shared[Spot]
}

// address is a netip.Addr without a pointer.
type address [16]byte

// addressOf has no address for what leads nowhere, or somewhere else on each node.
func addressOf(a netip.Addr) (address, bool) {
	if !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
		return address{}, false
	}
	return a.As16(), true
}

// destination is what leads to something: a port of an address, or of each node where that
// is zero; port 0 is the whole address.
type destination struct {
	at   address
	port uint16
}

type servicePort struct {
	service string
	port    uint16
}

type hostPort struct {
	node string
	port uint16
}

// Inlet is where a service is reached besides its own addresses.
type Inlet struct {
	Service *Service
	Port    uint16
	// Node is the one whose endpoints alone are reached, "" if all are.
	Node string
}

// NewWorld is the World in which these are all there is.
func NewWorld(workloads []*Workload, services []*Service, places ...*Place) *World {
	return new(World).With(Changes{Workloads: workloads, Services: services, Places: places}, time.Time{})
}

// leads reports whether something leads to a pod or service.
func (w *World) leads(to destination) bool {
	if to.port != 0 {
		_, is := w.inlets.owner.get(to)
		return is
	}
	if _, is := w.pods.owner.get(to.at); is {
		return true
	}
	_, is := w.virtual.owner.get(to.at)
	return is
}

// Former reports whether the destination is nobody's now, but led to a pod or service some
// time before now. The next one that gets it may be there already, and not known yet; or
// kube-proxy still knows the one before.
func (w *World) Former(to netip.AddrPort, now time.Time) bool {
	a, ok := addressOf(to.Addr())
	if !ok {
		return false
	}
	whole := destination{at: a}
	if w.IsNode(to.Addr()) {
		whole = destination{port: to.Port()}
	}
	return w.former.has(whole, now) || w.former.has(destination{a, to.Port()}, now)
}

// Inlet returns the service that an address outside of the cluster, or a port of a node,
// leads to.
func (w *World) Inlet(to netip.AddrPort) (Inlet, bool) {
	a, ok := addressOf(to.Addr())
	if !ok || to.Port() == 0 {
		return Inlet{}, false
	}
	if s, ok := w.inlets.owner.get(destination{a, to.Port()}); ok {
		return Inlet{Service: s, Port: to.Port()}, true
	}
	node, ok := w.nodes.owner.get(a)
	if !ok {
		return Inlet{}, false
	}
	s, ok := w.inlets.owner.get(destination{port: to.Port()})
	if !ok {
		return Inlet{}, false
	}
	i := slices.IndexFunc(s.NodePorts, func(p NodePort) bool { return p.Node == to.Port() })
	in := Inlet{Service: s, Port: s.NodePorts[i].Service}
	if s.NodeLocal {
		in.Node = node.Node
	}
	return in, true
}

// HostPort returns the pod that a port of a node leads to, and its own port there.
func (w *World) HostPort(to netip.AddrPort) (pod *Peer, target uint16) {
	a, ok := addressOf(to.Addr())
	if !ok {
		return nil, 0
	}
	node, ok := w.nodes.owner.get(a)
	if !ok {
		return nil, 0
	}
	all, _ := w.hostPorts.get(hostPort{node.Node, to.Port()})
	for _, wl := range all {
		for _, p := range wl.HostPorts {
			fits := !wl.HostNetwork && p.Port == to.Port() && (!p.Address.IsValid() || p.Address.Unmap() == to.Addr().Unmap())
			if fits && (pod == nil || !pod.Ready || wl.Ready) {
				pod, target = wl, p.Target
			}
		}
	}
	return pod, target
}

// isListener reports whether a pod of the node's own network, or kube-proxy, is known to
// listen at that port of a node.
func (w *World) isListener(node string, port uint16) bool {
	if _, is := w.healthPorts.get(port); is {
		return true
	}
	all, _ := w.hostPorts.get(hostPort{node, port})
	return slices.ContainsFunc(all, func(wl *Peer) bool { return wl.HostNetwork })
}

// IsNode reports whether the address is a node's.
func (w *World) IsNode(a netip.Addr) bool { return owner(&w.nodes, a) != nil }

// HasNodeIn reports whether a node has an address in the prefix.
func (w *World) HasNodeIn(p netip.Prefix) bool {
	for a := range w.nodes.owner.all() {
		if p.Contains(netip.AddrFrom16(a).Unmap()) {
			return true
		}
	}
	return false
}

// Contested reports whether several objects claim the address, so that it is nobody's.
func (w *World) Contested(a netip.Addr) bool { return owner(&w.contested, a) != nil }

// IsOurs reports whether the destination is in one of the cluster's ranges. At a node that
// is a port out of which services get theirs, and at which nobody else is known to listen.
func (w *World) IsOurs(to netip.AddrPort) bool {
	if node := owner(&w.nodes, to.Addr()); node != nil {
		by, ok := w.portRange.owner.get(struct{}{})
		return ok && by.NodePorts.Has(to.Port()) && !w.isListener(node.Node, to.Port())
	}
	return w.ranges.has(to.Addr().Unmap())
}

// Pod returns the pod that a Listed workload is said to be of, or nil.
func (w *World) Pod(listed *Peer) *Peer {
	if listed.Of == "" {
		return nil
	}
	p, _ := w.peers.get(listed.Of)
	return p
}

// Workload returns the pod that has the address, or nil: unknown, or a node. Of several it
// is one that is ready: a finished pod's address may already be another's.
func (w *World) Workload(a netip.Addr) *Peer { return owner(&w.pods, a) }

// Workloads are all workloads.
func (w *World) Workloads() iter.Seq[*Peer] { return values(&w.peers) }

// Services are all services.
func (w *World) Services() iter.Seq[*Service] { return values(&w.services) }

// Service returns the service that has the virtual address, or nil.
func (w *World) Service(a netip.Addr) *Service { return owner(&w.virtual, a) }

// ServiceNamed returns the service with that Key, or nil.
func (w *World) ServiceNamed(key string) *Service {
	s, _ := w.services.get(key)
	return s
}

// Endpoints returns the ready endpoints of a port of a service, ordered by UID. The slice is
// the World's own: read only.
func (w *World) Endpoints(s *Service, port uint16) []Endpoint {
	all, _ := w.endpoints.get(servicePort{s.Key(), port})
	return all
}

// owner returns whose the address is, or nil.
func owner[V comparable](c *claims[address, V], a netip.Addr) (v V) {
	if k, ok := addressOf(a); ok {
		v, _ = c.owner.get(k)
	}
	return v
}

func values[K comparable, V any](t *trie[K, V]) iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, v := range t.all() {
			if !yield(v) {
				return
			}
		}
	}
}
