package mesh

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// truth is a World made in the slow and obvious way, of everything at once.
type truth struct {
	workloads map[netip.Addr]*Workload
	services  map[netip.Addr]*Service
	named     map[string]*Service
	endpoints map[endpointKey][]told
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
	ranges      []netip.Prefix
	policies    []*Policy
	trust       Trust
	// former has what led to pods and services and leads nowhere now, with the time since
	// when. Port 0 is the whole address, the zero Addr is every node's.
	former map[netip.AddrPort]time.Time
}

// told is an Endpoint.
type told struct {
	workload *Workload
	port     uint16
}

type endpointKey struct {
	service string
	port    uint16
}

type hostPortKey struct {
	node string
	port uint16
}

// newTruth indexes workloads, services and places. It keeps the pointers: none of them
// may be changed afterwards. Of two workloads with one address the later one
// counts, unless only the earlier one is ready: a finished pod's address may
// already be another's.
func newTruth(workloads []*Workload, services []*Service, places ...*Place) *truth {
	w := &truth{
		workloads: make(map[netip.Addr]*Workload, len(workloads)),
		services:  make(map[netip.Addr]*Service, len(services)),
		named:     make(map[string]*Service, len(services)),
		endpoints: make(map[endpointKey][]told),
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

func (w *truth) addService(s *Service) {
	w.named[s.Key()] = s
	for _, a := range s.Addresses {
		w.services[a.Unmap()] = s
	}
	for _, a := range s.External {
		w.external[a.Unmap()] = append(w.external[a.Unmap()], s)
	}
	for _, p := range s.NodePorts {
		if _, had := w.nodePorts[p.Node]; !had {
			w.nodePorts[p.Node] = Inlet{Service: s, Port: p.Service}
		}
	}
	if s.HealthPort != 0 {
		w.healthPorts[s.HealthPort] = true
	}
}

func (w *truth) addPlace(p *Place) {
	for _, a := range p.Addresses {
		if p.Contested {
			w.contested[a.Unmap()] = true
		} else if p.Node != "" {
			w.nodes[a.Unmap()] = p
		}
	}
	w.ranges = append(w.ranges, p.Ranges...)
	if p.NodePorts != (NodePorts{}) {
		w.portRange = p.NodePorts
	}
	w.trust.Revoked = append(w.trust.Revoked, p.Trust.Revoked...)
	w.trust.MaxAge = cmp.Or(p.Trust.MaxAge, w.trust.MaxAge)
}

func (w *truth) addWorkload(wl *Workload) {
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
			w.endpoints[k] = append(w.endpoints[k], told{wl, p.Target})
		}
	}
}

// After returns the World w as one that follows on before: it knows also what led to pods
// and services a while ago and leads nowhere now. Neither is changed.
func (w *truth) After(before *truth, now time.Time) *truth {
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
func (w *truth) leads(at netip.AddrPort) bool {
	if at.Port() == 0 {
		return w.workloads[at.Addr()] != nil || w.services[at.Addr()] != nil
	}
	_, is := w.nodePorts[at.Port()]
	return is && !at.Addr().IsValid() || w.externalAt(at) != nil
}

// externalAt returns the service that has the external address and port.
func (w *truth) externalAt(at netip.AddrPort) *Service {
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
func (w *truth) Former(to netip.AddrPort, now time.Time) bool {
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
func (w *truth) Inlet(to netip.AddrPort) (Inlet, bool) {
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
func (w *truth) HostPort(to netip.AddrPort) (pod *Workload, target uint16) {
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
func (w *truth) isListener(node string, port uint16) bool {
	return w.healthPorts[port] || slices.ContainsFunc(w.hostPorts[hostPortKey{node, port}], func(wl *Workload) bool { return wl.HostNetwork })
}

// IsNode reports whether the address is a node's.
func (w *truth) IsNode(a netip.Addr) bool { return w.nodes[a.Unmap()] != nil }

// HasNodeIn reports whether a node has an address in the prefix.
func (w *truth) HasNodeIn(p netip.Prefix) bool {
	for a := range w.nodes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Contested reports whether several objects claim the address, so that it is nobody's.
func (w *truth) Contested(a netip.Addr) bool { return w.contested[a.Unmap()] }

// IsOurs reports whether the destination is in one of the cluster's ranges. At a node that
// is a port out of which services get theirs, and at which nobody else is known to listen.
func (w *truth) IsOurs(to netip.AddrPort) bool {
	a := to.Addr().Unmap()
	if node := w.nodes[a]; node != nil {
		return w.portRange.Has(to.Port()) && !w.isListener(node.Node, to.Port())
	}
	return slices.ContainsFunc(w.ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// PoliciesOf returns those of the mesh, of the namespace, and those that p names.
func (w *truth) PoliciesOf(p *Peer) (all []*Policy, unknown []string) {
	for _, scope := range []Scope{WholeMesh, WholeNamespace} {
		for _, x := range w.policies {
			if x.Scope == scope && (scope == WholeMesh || x.Namespace == p.Namespace) {
				all = append(all, x)
			}
		}
	}
	for _, key := range p.Policies {
		i := slices.IndexFunc(w.policies, func(x *Policy) bool { return x.Key() == key })
		if i < 0 {
			unknown = append(unknown, key)
		} else if w.policies[i].Scope == Named {
			all = append(all, w.policies[i])
		}
	}
	return all, unknown
}

// Pod returns the pod that a Listed workload is said to be of, or nil.
func (w *truth) Pod(listed *Workload) *Workload { return w.pods[listed.Of] }

// Workload returns the pod that has the address, or nil: unknown, or a node.
func (w *truth) Workload(a netip.Addr) *Workload { return w.workloads[a.Unmap()] }

// Service returns the service that has the virtual address, or nil.
func (w *truth) Service(a netip.Addr) *Service { return w.services[a.Unmap()] }

// ServiceNamed returns the service with that Key, or nil.
func (w *truth) ServiceNamed(key string) *Service { return w.named[key] }

// Endpoints returns the ready endpoints of a port of a service. The slice is
// the World's own: read only.
func (w *truth) Endpoints(s *Service, port uint16) []told {
	return w.endpoints[endpointKey{s.Key(), port}]
}
