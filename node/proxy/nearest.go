package proxy

import (
	"net/netip"
	"sync"
	"time"

	"tacit.dev/mesh"
)

// near leaves the endpoints that a caller on the node and in the zone takes, as
// kube-proxy does: if a preference finds nobody, or the zone of one of them is
// not known, it does not hold.
func near(s *mesh.Service, endpoints []mesh.Endpoint, node, zone string) []mesh.Endpoint {
	local := func(e mesh.Endpoint) bool { return node != "" && e.Workload.Node == node }
	switch s.Reach {
	case mesh.SameNode:
		return only(endpoints, local)
	case mesh.PreferNode:
		if found := only(endpoints, local); len(found) > 0 {
			return found
		}
	case mesh.PreferZone:
	default:
		return endpoints
	}
	if len(only(endpoints, func(e mesh.Endpoint) bool { return e.Workload.Zone == "" })) > 0 {
		return endpoints
	}
	if found := only(endpoints, func(e mesh.Endpoint) bool { return e.Workload.Zone == zone }); len(found) > 0 {
		return found
	}
	return endpoints
}

func only(endpoints []mesh.Endpoint, fits func(mesh.Endpoint) bool) (found []mesh.Endpoint) {
	for _, e := range endpoints {
		if fits(e) {
			found = append(found, e)
		}
	}
	return found
}

// maxKept bounds what a pod's affinity remembers.
const maxKept = 1024

// affinity is which endpoints a pod keeps to: the client of a service is the pod, by
// its address. It is safe for concurrent use; nil keeps to nothing.
type affinity struct {
	mu   sync.Mutex // guards kept
	kept map[dialledPort]keeping
}

// dialledPort is a port of a service, in one family: each family has endpoints of
// its own.
type dialledPort struct {
	service string
	port    uint16
	four    bool
}

type keeping struct {
	uid   string
	until time.Time
}

func newAffinity() *affinity { return &affinity{kept: make(map[dialledPort]keeping)} }

// first moves the endpoint that is kept to before the others, or keeps to the one
// that is first by chance.
func (a *affinity) first(s *mesh.Service, to netip.AddrPort, endpoints []mesh.Endpoint, chosen []int, now time.Time) []int {
	if a == nil || s.Affinity <= 0 || len(chosen) == 0 {
		return chosen
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	key := dialledPort{s.Key(), to.Port(), to.Addr().Unmap().Is4()}
	if k, ok := a.kept[key]; ok && now.Before(k.until) {
		for i, e := range endpoints {
			if e.Workload.UID == k.uid {
				chosen = toFront(chosen, i)
				break
			}
		}
	}
	if len(a.kept) >= maxKept {
		a.forget(now)
	}
	a.kept[key] = keeping{endpoints[chosen[0]].Workload.UID, now.Add(s.Affinity)}
	return chosen
}

// toFront puts i before all others, of which the last gives way.
func toFront(chosen []int, i int) []int {
	front := append(make([]int, 0, len(chosen)), i)
	for _, j := range chosen {
		if j != i && len(front) < len(chosen) {
			front = append(front, j)
		}
	}
	return front
}

// forget makes room. Called with mu.
func (a *affinity) forget(now time.Time) {
	for key, k := range a.kept {
		if !now.Before(k.until) {
			delete(a.kept, key)
		}
	}
	if len(a.kept) >= maxKept {
		clear(a.kept)
	}
}
