package mesh

import "net/netip"

// World is what a node knows of the mesh at one moment. It is immutable:
// readers load it through one atomic pointer, a writer builds another one and
// swaps it in. The zero World is empty and usable.
type World struct {
	workloads map[netip.Addr]*Workload
	services  map[netip.Addr]*Service
	named     map[string]*Service
	endpoints map[endpointKey][]Endpoint
}

type endpointKey struct {
	service string
	port    uint16
}

// NewWorld indexes workloads and services. It keeps the pointers: none of them
// may be changed afterwards. Of two workloads with one address the later one
// counts, unless only the earlier one is ready: a finished pod's address may
// already be another's.
func NewWorld(workloads []*Workload, services []*Service) *World {
	w := &World{
		workloads: make(map[netip.Addr]*Workload, len(workloads)),
		services:  make(map[netip.Addr]*Service, len(services)),
		named:     make(map[string]*Service, len(services)),
		endpoints: make(map[endpointKey][]Endpoint),
	}
	for _, s := range services {
		w.named[s.Key()] = s
		for _, a := range s.Addresses {
			w.services[a.Unmap()] = s
		}
	}
	for _, wl := range workloads {
		w.addWorkload(wl)
	}
	return w
}

func (w *World) addWorkload(wl *Workload) {
	if !wl.HostNetwork {
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

// Workload returns the pod that has the address, or nil: unknown, or a node.
func (w *World) Workload(a netip.Addr) *Workload { return w.workloads[a.Unmap()] }

// Service returns the service that has the virtual address, or nil.
func (w *World) Service(a netip.Addr) *Service { return w.services[a.Unmap()] }

// ServiceNamed returns the service with that Key, or nil.
func (w *World) ServiceNamed(key string) *Service { return w.named[key] }

// Endpoints returns the ready endpoints of a port of a service. The slice is
// the World's own: read only.
func (w *World) Endpoints(s *Service, port uint16) []Endpoint {
	return w.endpoints[endpointKey{s.Key(), port}]
}
