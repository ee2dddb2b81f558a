package mesh

import (
	"net/netip"
	"time"
)

// formerFor is how long an address counts as a pod's after its pod is gone.
const formerFor = 2 * time.Minute

// World is what a node knows of the mesh at one moment. It is immutable:
// readers load it through one atomic pointer, a writer builds another one and
// swaps it in. The zero World is empty and usable.
type World struct {
	workloads map[netip.Addr]*Workload
	services  map[netip.Addr]*Service
	named     map[string]*Service
	endpoints map[endpointKey][]Endpoint
	// former has the addresses that were pods' and are nobody's now, with the time
	// since when.
	former map[netip.Addr]time.Time
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

// After returns the World w as one that follows on before: it knows also which
// addresses were pods' a while ago and are nobody's now. Neither is changed.
func (w *World) After(before *World, now time.Time) *World {
	former := make(map[netip.Addr]time.Time)
	for a, since := range before.former {
		if w.workloads[a] == nil && now.Sub(since) < formerFor {
			former[a] = since
		}
	}
	for a := range before.workloads {
		if w.workloads[a] == nil {
			former[a] = now
		}
	}
	if len(former) == 0 {
		return w
	}
	next := *w
	next.former = former
	return &next
}

// Former reports whether the address is nobody's now, but was a pod's some time before
// now. The next pod that gets it may be there already, and not known yet.
func (w *World) Former(a netip.Addr, now time.Time) bool {
	since, ok := w.former[a.Unmap()]
	return ok && now.Sub(since) < formerFor
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
