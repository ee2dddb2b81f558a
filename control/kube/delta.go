package kube

import (
	"maps"
	"net/netip"
	"slices"

	"tacit.dev/mesh"
)

// Delta is what is different than before. What has come or is another one is in the lists, what
// is gone is named; nothing is in it twice. None of it is ever changed.
type Delta struct {
	mesh.Changes
	Pods      []*Pod
	GonePods  []string // by UID
	Nodes     []Node
	GoneNodes []string
	// Policed is what people should see of policies, GonePoliced are Keys of those.
	Policed     []PolicyFacts
	GonePoliced []string
	// Mesh, Namespaces, Problems, Exceptions and Disputed tell that what Builder's method of
	// that name returns may be different. Who does not ask pays nothing.
	Mesh, Namespaces, Problems, Exceptions, Disputed bool
}

// Mesh is what the objects say of the Mesh.
func (b *Builder) Mesh() MeshFacts { return b.facts }

// Namespaces are those in which a pod may have to be enrolled, sorted.
func (b *Builder) Namespaces() []string { return slices.Sorted(maps.Keys(b.enrolling)) }

// Problems are told, at most some hundred; untold is how many there are besides.
func (b *Builder) Problems() (list []Problem, untold int) { return b.tally.told() }

// Exceptions are the running pods that are left out, wholly or partly, sorted.
func (b *Builder) Exceptions() (list []Exception) {
	for _, e := range b.exceptions {
		list = append(list, e...)
	}
	slices.SortFunc(list, Exception.compare)
	return list
}

// Disputed are the addresses that several objects claim, with whether they are contested.
func (b *Builder) Disputed() map[netip.Addr]bool { return maps.Clone(b.disputes) }

// Result is all that the Builder knows, as Build would say it. It costs as much as there is.
func (b *Builder) Result() Result {
	r := Result{Mesh: b.facts, Namespaces: b.Namespaces(), Exceptions: b.Exceptions(), Disputed: b.Disputed()}
	r.Problems, r.Untold = b.Problems()
	place := func(p *mesh.Place) {
		if p != nil {
			r.Places = append(r.Places, p)
		}
	}
	for _, p := range b.pods {
		if p.workload != nil {
			r.Workloads = append(r.Workloads, p.workload)
		}
	}
	for _, u := range b.uids {
		if u.known != nil {
			r.Pods = append(r.Pods, *u.known)
		}
	}
	for _, s := range b.services {
		if s.service != nil {
			r.Services = append(r.Services, s.service)
		}
		r.Workloads = slices.AppendSeq(r.Workloads, maps.Values(s.listed))
	}
	for _, n := range b.nodes {
		if n.object != nil {
			r.Nodes = append(r.Nodes, n.node)
		}
		place(n.place)
	}
	for a := range b.disputes {
		place(b.addresses[a].place)
	}
	for _, x := range b.policed {
		for _, s := range x.policies {
			r.Policed = append(r.Policed, s.facts)
			if s.read.policy != nil {
				r.Policies = append(r.Policies, s.read.policy)
			}
		}
		if x.standIn != nil {
			r.Policies = append(r.Policies, x.standIn)
		}
	}
	for _, x := range b.peered {
		r.Policed = slices.AppendSeq(r.Policed, maps.Values(x.facts))
		if x.mode != nil {
			r.Policies = append(r.Policies, x.mode)
		}
	}
	if b.meshMode != nil {
		r.Policies = append(r.Policies, b.meshMode)
	}
	place(b.cluster)
	place(b.trust)
	r.sort()
	return r
}
