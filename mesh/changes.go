package mesh

import (
	"cmp"
	"slices"
)

// Changes is what differs in the mesh: what is new or other than before, and the names of
// what is gone. No name is in it twice. The order within it is of no account.
type Changes struct {
	Workloads []*Workload
	Services  []*Service
	Places    []*Place
	Policies  []*Policy
	// Gone are UIDs of workloads, Keys of services and Names of places,
	// GonePolicies Keys of policies, which may be the same.
	Gone, GonePolicies []string
	// Part says that what comes next belongs to it: no World decides before that is there.
	Part bool
}

// All returns everything that w knows, ordered by name, as what leads to it from nothing.
func (w *World) All() (all Changes) {
	for p := range w.Workloads() {
		all.Workloads = append(all.Workloads, p.Workload())
	}
	all.Services = slices.Collect(w.Services())
	all.Places = slices.Collect(values(&w.places))
	all.Policies = slices.Collect(values(&w.policies))
	slices.SortFunc(all.Workloads, func(a, b *Workload) int { return cmp.Compare(a.UID, b.UID) })
	slices.SortFunc(all.Services, byKey)
	slices.SortFunc(all.Places, byName)
	slices.SortFunc(all.Policies, byPolicyKey)
	return all
}
