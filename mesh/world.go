package mesh

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// formerFor is how long an address counts as a pod's after its pod is gone.
const formerFor = 2 * time.Minute

// World is what a node knows of the mesh at one moment. It is immutable:
// readers load it through one atomic pointer, a writer builds another one and
// swaps it in. The zero World is empty and usable.
//
// Of an address it knows one of three things: whose it is (Workload, Service, Inlet,
// HostPort, IsNode); that it is not the cluster's; or that it is the cluster's and not
// known (Former, Contested, IsOurs).
type World struct {
	// known is everything, by its name: a *Workload, *Service or *Place.
	known     map[string]any
	workloads map[netip.Addr]*Workload
	services  map[netip.Addr]*Service
	named     map[string]*Service
	endpoints map[endpointKey][]Endpoint
	// pods are those that a Listed workload names, by UID.
	pods map[string]*Workload
	// external has who shares an external address, nodePorts what a port of every node
	// leads to.
	external  map[netip.Addr][]*Service
	nodePorts map[uint16]Inlet
	hostPorts map[hostPortKey][]*Workload
	// portRange is that of nodePorts, and healthPorts are those of it that are kube-proxy's own.
	portRange   NodePorts
	healthPorts map[uint16]bool
	nodes       map[netip.Addr]*Place
	contested   map[netip.Addr]bool
	ranges      ranges
	// former has what led to pods and services and leads nowhere now, with the time since
	// when. Port 0 is the whole address, the zero Addr is every node's.
	former map[netip.AddrPort]time.Time
}

type endpointKey struct {
	service string
	port    uint16
}

type hostPortKey struct {
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

// NewWorld indexes workloads, services and places. It keeps the pointers: none of them
// may be changed afterwards. Of two workloads with one address the later one
// counts, unless only the earlier one is ready: a finished pod's address may
// already be another's.
func NewWorld(workloads []*Workload, services []*Service, places ...*Place) *World {
	w := &World{
		known:     make(map[string]any, len(workloads)+len(services)+len(places)),
		workloads: make(map[netip.Addr]*Workload, len(workloads)),
		services:  make(map[netip.Addr]*Service, len(services)),
		named:     make(map[string]*Service, len(services)),
		endpoints: make(map[endpointKey][]Endpoint),
		pods:      make(map[string]*Workload),
		external:  make(map[netip.Addr][]*Service),
		nodePorts: make(map[uint16]Inlet),
		hostPorts: make(map[hostPortKey][]*Workload),
		nodes:     make(map[netip.Addr]*Place),
		contested: make(map[netip.Addr]bool),

		healthPorts: make(map[uint16]bool),
	}
	for _, s := range services {
		w.addService(s)
	}
	for _, wl := range workloads {
		if wl.Of != "" {
			w.pods[wl.Of] = nil
		}
	}
	for _, wl := range workloads {
		w.addWorkload(wl)
	}
	for _, p := range places {
		w.addPlace(p)
	}
	return w
}

func (w *World) addService(s *Service) {
	w.known[s.Key()] = s
	w.named[s.Key()] = s
	for _, a := range s.Addresses {
		w.services[a.Unmap()] = s
	}
	for _, a := range s.External {
		w.external[a.Unmap()] = append(w.external[a.Unmap()], s)
	}
	for _, p := range s.NodePorts {
		w.nodePorts[p.Node] = Inlet{Service: s, Port: p.Service}
	}
	if s.HealthPort != 0 {
		w.healthPorts[s.HealthPort] = true
	}
}

func (w *World) addPlace(p *Place) {
	w.known[p.Name] = p
	for _, a := range p.Addresses {
		if p.Contested {
			w.contested[a.Unmap()] = true
		} else if p.Node != "" {
			w.nodes[a.Unmap()] = p
		}
	}
	for _, r := range p.Ranges {
		w.ranges.add(r)
	}
	if p.NodePorts != (NodePorts{}) {
		w.portRange = p.NodePorts
	}
}

func (w *World) addWorkload(wl *Workload) {
	w.known[wl.UID] = wl
	if _, named := w.pods[wl.UID]; named {
		w.pods[wl.UID] = wl
	}
	for _, p := range wl.HostPorts {
		k := hostPortKey{wl.Node, p.Port}
		w.hostPorts[k] = append(w.hostPorts[k], wl)
	}
	if !wl.HostNetwork && !wl.Listed {
		for _, a := range wl.Addresses {
			if had := w.workloads[a.Unmap()]; had == nil || !had.Ready || wl.Ready {
				w.workloads[a.Unmap()] = wl
			}
		}
	}
	if !wl.Ready {
		return
	}
	for key, ports := range wl.Services {
		for _, p := range ports {
			k := endpointKey{key, p.Service}
			w.endpoints[k] = append(w.endpoints[k], Endpoint{wl, p.Target})
		}
	}
}

// With returns the World that follows on w when c has happened. It knows also what led to
// pods and services a while before now and leads nowhere any more. w is not changed; it
// keeps the pointers, as NewWorld does.
func (w *World) With(c Changes, now time.Time) *World {
	known := maps.Clone(w.known)
	if known == nil {
		known = make(map[string]any)
	}
	for _, name := range c.Gone {
		delete(known, name)
	}
	for _, x := range c.Workloads {
		known[x.UID] = x
	}
	for _, x := range c.Services {
		known[x.Key()] = x
	}
	for _, x := range c.Places {
		known[x.Name] = x
	}
	all := inOrder(known)
	return NewWorld(all.Workloads, all.Services, all.Places...).After(w, now)
}

// All returns everything that w knows, ordered by name, as what leads to it from nothing.
func (w *World) All() Changes { return inOrder(w.known) }

func inOrder(known map[string]any) (all Changes) {
	for _, x := range known {
		switch x := x.(type) {
		case *Workload:
			all.Workloads = append(all.Workloads, x)
		case *Service:
			all.Services = append(all.Services, x)
		case *Place:
			all.Places = append(all.Places, x)
		}
	}
	slices.SortFunc(all.Workloads, func(a, b *Workload) int { return cmp.Compare(a.UID, b.UID) })
	slices.SortFunc(all.Services, func(a, b *Service) int { return cmp.Compare(a.Key(), b.Key()) })
	slices.SortFunc(all.Places, func(a, b *Place) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// After returns the World w as one that follows on before: it knows also what led to pods
// and services a while ago and leads nowhere now. Neither is changed.
func (w *World) After(before *World, now time.Time) *World {
	former := make(map[netip.AddrPort]time.Time)
	for at, since := range before.former {
		if !w.leads(at) && now.Sub(since) < formerFor {
			former[at] = since
		}
	}
	note := func(at netip.AddrPort) {
		if !w.leads(at) {
			former[at] = now
		}
	}
	for a := range before.workloads {
		note(netip.AddrPortFrom(a, 0))
	}
	for a := range before.services {
		note(netip.AddrPortFrom(a, 0))
	}
	for key, s := range before.named {
		if w.named[key] == s {
			continue
		}
		for _, a := range s.External {
			for _, p := range s.Ports {
				note(netip.AddrPortFrom(a.Unmap(), p.Service))
			}
		}
		for _, p := range s.NodePorts {
			note(netip.AddrPortFrom(netip.Addr{}, p.Node))
		}
	}
	if len(former) == 0 {
		return w
	}
	next := *w
	next.former = former
	return &next
}

// leads reports whether an entry of former is somebody's again.
func (w *World) leads(at netip.AddrPort) bool {
	if at.Port() == 0 {
		return w.workloads[at.Addr()] != nil || w.services[at.Addr()] != nil
	}
	_, is := w.nodePorts[at.Port()]
	return is && !at.Addr().IsValid() || w.externalAt(at) != nil
}

// externalAt returns the service that has the external address and port.
func (w *World) externalAt(at netip.AddrPort) *Service {
	for _, s := range w.external[at.Addr()] {
		if slices.ContainsFunc(s.Ports, func(p Port) bool { return p.Service == at.Port() }) {
			return s
		}
	}
	return nil
}

// Former reports whether the destination is nobody's now, but led to a pod or service some
// time before now. The next one that gets it may be there already, and not known yet; or
// kube-proxy still knows the one before.
func (w *World) Former(to netip.AddrPort, now time.Time) bool {
	is := func(at netip.AddrPort) bool {
		since, ok := w.former[at]
		return ok && now.Sub(since) < formerFor
	}
	a := to.Addr().Unmap()
	whole := netip.AddrPortFrom(a, 0)
	if w.IsNode(a) {
		whole = netip.AddrPortFrom(netip.Addr{}, to.Port())
	}
	return is(whole) || is(netip.AddrPortFrom(a, to.Port()))
}

// Inlet returns the service that an address outside of the cluster, or a port of a node,
// leads to.
func (w *World) Inlet(to netip.AddrPort) (Inlet, bool) {
	a := to.Addr().Unmap()
	if s := w.externalAt(netip.AddrPortFrom(a, to.Port())); s != nil {
		return Inlet{Service: s, Port: to.Port()}, true
	}
	node := w.nodes[a]
	if node == nil {
		return Inlet{}, false
	}
	in, ok := w.nodePorts[to.Port()]
	if ok && in.Service.NodeLocal {
		in.Node = node.Node
	}
	return in, ok
}

// HostPort returns the pod that a port of a node leads to, and its own port there.
func (w *World) HostPort(to netip.AddrPort) (pod *Workload, target uint16) {
	a := to.Addr().Unmap()
	node := w.nodes[a]
	if node == nil {
		return nil, 0
	}
	for _, wl := range w.hostPorts[hostPortKey{node.Node, to.Port()}] {
		for _, p := range wl.HostPorts {
			fits := !wl.HostNetwork && p.Port == to.Port() && (!p.Address.IsValid() || p.Address.Unmap() == a)
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
	return w.healthPorts[port] || slices.ContainsFunc(w.hostPorts[hostPortKey{node, port}], func(wl *Workload) bool { return wl.HostNetwork })
}

// IsNode reports whether the address is a node's.
func (w *World) IsNode(a netip.Addr) bool { return w.nodes[a.Unmap()] != nil }

// HasNodeIn reports whether a node has an address in the prefix.
func (w *World) HasNodeIn(p netip.Prefix) bool {
	for a := range w.nodes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Contested reports whether several objects claim the address, so that it is nobody's.
func (w *World) Contested(a netip.Addr) bool { return w.contested[a.Unmap()] }

// IsOurs reports whether the destination is in one of the cluster's ranges. At a node that
// is a port out of which services get theirs, and at which nobody else is known to listen.
func (w *World) IsOurs(to netip.AddrPort) bool {
	a := to.Addr().Unmap()
	if node := w.nodes[a]; node != nil {
		return w.portRange.Has(to.Port()) && !w.isListener(node.Node, to.Port())
	}
	return w.ranges.has(a)
}

// Pod returns the pod that a Listed workload is said to be of, or nil.
func (w *World) Pod(listed *Workload) *Workload { return w.pods[listed.Of] }

// Workload returns the pod that has the address, or nil: unknown, or a node.
func (w *World) Workload(a netip.Addr) *Workload { return w.workloads[a.Unmap()] }

// Workloads are the pods to which an address leads; one may come twice.
func (w *World) Workloads() iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		for _, all := range []iter.Seq[*Workload]{maps.Values(w.workloads), maps.Values(w.pods)} {
			for wl := range all {
				if wl != nil && !yield(wl) {
					return
				}
			}
		}
	}
}

// Services are all services.
func (w *World) Services() iter.Seq[*Service] { return maps.Values(w.named) }

// Service returns the service that has the virtual address, or nil.
func (w *World) Service(a netip.Addr) *Service { return w.services[a.Unmap()] }

// ServiceNamed returns the service with that Key, or nil.
func (w *World) ServiceNamed(key string) *Service { return w.named[key] }

// Endpoints returns the ready endpoints of a port of a service. The slice is
// the World's own: read only.
func (w *World) Endpoints(s *Service, port uint16) []Endpoint {
	return w.endpoints[endpointKey{s.Key(), port}]
}
