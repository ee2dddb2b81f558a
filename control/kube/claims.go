package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"tacit.dev/mesh"
)

// claims finds out whose an address is that several objects claim. Addresses are given to
// new pods while the object of the one before still has them; and a node's kubelet writes
// what it likes into the objects of its own pods. To take the wrong claim would be to
// expect the wrong identity, or plaintext. So, if a pod of the mesh is among them:
//
//	a live agent holds one of the pods there, and its object says so too    that one's
//	pods that are being deleted, and one that is not                        that one's
//	anything else                                                          contested: nobody's
//
// Without a pod of the mesh, whoever was started later has it.
func (b *builder) claims(o Objects) {
	b.holder = make(map[netip.Addr]*corev1.Pod)
	b.contested = make(map[netip.Addr]bool)
	claimed := make(map[netip.Addr][]*corev1.Pod, len(o.Pods))
	for _, p := range o.Pods {
		b.pods[p.Namespace+"/"+p.Name] = p
		if isThere(p) && !p.Spec.HostNetwork {
			for _, a := range b.addresses(p) {
				claimed[a] = append(claimed[a], p)
			}
		}
	}
	others := b.otherClaims(o)
	for a, pods := range claimed {
		if other, is := others[a]; is || len(pods) > 1 {
			slices.SortFunc(pods, byName)
			b.holder[a], b.contested[a] = b.decide(a, pods, other)
			b.tellClaims(a, pods, other)
		}
	}
	for a, is := range b.contested {
		if is {
			b.result.Places = append(b.result.Places, &mesh.Place{Name: b.workloadUID("/Address", "contested", a.String()), Contested: true, Addresses: []netip.Addr{a}})
		}
	}
}

// claim is that of an object that is no pod.
type claim struct {
	object string
	// service: no pod can have it.
	service bool
}

// otherClaims are addresses of services and nodes.
func (b *builder) otherClaims(o Objects) map[netip.Addr]claim {
	others := make(map[netip.Addr]claim, len(o.Services)+len(o.Nodes))
	for _, n := range o.Nodes {
		for _, a := range nodeAddresses(n) {
			if had := others[a].object; had == "" || had > "Node "+n.Name {
				others[a] = claim{object: "Node " + n.Name}
			}
		}
	}
	for _, s := range o.Services {
		for _, a := range addresses(append([]string{s.Spec.ClusterIP}, s.Spec.ClusterIPs...)) {
			if had := others[a]; !had.service || had.object > "Service "+s.Namespace+"/"+s.Name {
				others[a] = claim{object: "Service " + s.Namespace + "/" + s.Name, service: true}
			}
		}
	}
	return others
}

// decide returns whose the address is, nil for no pod's.
func (b *builder) decide(a netip.Addr, pods []*corev1.Pod, other claim) (holder *corev1.Pod, contested bool) {
	if other.service {
		return nil, false
	}
	if vouched := unlessDeleted(only(pods, func(p *corev1.Pod) bool { return b.isVouched(p, a) })); len(vouched) > 0 {
		return one(vouched)
	}
	ofMesh := slices.ContainsFunc(pods, b.mayBeOfMesh)
	if other.object != "" {
		return nil, ofMesh
	}
	pods = unlessDeleted(pods)
	// An agent's word alone does not take the address of a pod whose object has it.
	if said := only(pods, func(p *corev1.Pod) bool { return slices.Contains(podAddresses(p), a) }); len(said) > 0 {
		pods = said
	}
	if ofMesh {
		return one(pods)
	}
	return slices.MaxFunc(pods, byStart), false
}

// one returns the only pod, or that it is contested.
func one(pods []*corev1.Pod) (*corev1.Pod, bool) {
	if len(pods) == 1 {
		return pods[0], false
	}
	return nil, true
}

// unlessDeleted leaves pods that are not being deleted, or all if there are none.
func unlessDeleted(pods []*corev1.Pod) []*corev1.Pod {
	if stay := only(pods, func(p *corev1.Pod) bool { return p.DeletionTimestamp == nil }); len(stay) > 0 {
		return stay
	}
	return pods
}

// isVouched tells whether a live agent holds the pod captured at the address, as far as it
// knows, and the pod's object says the same. Each can be wrong or forged alone.
func (b *builder) isVouched(p *corev1.Pod, a netip.Addr) bool {
	told := b.told[string(p.UID)]
	return b.vouched[string(p.UID)] && slices.Contains(podAddresses(p), a) && (len(told) == 0 || slices.Contains(told, a))
}

// mayBeOfMesh tells whether something is to be protected: a label asks for it, or an agent
// has spoken of the pod.
func (b *builder) mayBeOfMesh(p *corev1.Pod) bool {
	quiet := &builder{cfg: b.cfg, namespaces: b.namespaces} // problems are told elsewhere
	quiet.result.Mesh = b.result.Mesh
	return b.vouched[string(p.UID)] || len(b.told[string(p.UID)]) > 0 || quiet.wanted(p)
}

// tellClaims reports a claim that is not the usual: an address that goes from a pod that is
// being deleted to the next is.
func (b *builder) tellClaims(a netip.Addr, pods []*corev1.Pod, other claim) {
	var all []string
	if other.object != "" {
		all = append(all, other.object)
	}
	for _, p := range pods[:min(len(pods), maxClaims)] {
		all = append(all, "Pod "+p.Namespace+"/"+p.Name)
	}
	holder := b.holder[a]
	for _, p := range pods {
		switch {
		case b.contested[a]:
			b.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is contested, connections to it are refused: %s claim it", a, strings.Join(all, ", ")))
		case p == holder, p.DeletionTimestamp != nil, holder != nil && !b.mayBeOfMesh(holder):
		case holder != nil:
			b.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is not its own: Pod %s/%s has it", a, holder.Namespace, holder.Name))
		default:
			b.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is not its own: %s has it", a, other.object))
		}
	}
}

// isContested tells whether others claim an address of the pod's.
func (b *builder) isContested(p *corev1.Pod) bool {
	return slices.ContainsFunc(b.addresses(p), func(a netip.Addr) bool { return b.contested[a] })
}

func only(pods []*corev1.Pod, fits func(*corev1.Pod) bool) (found []*corev1.Pod) {
	for _, p := range pods {
		if fits(p) {
			found = append(found, p)
		}
	}
	return found
}

func byName(p, q *corev1.Pod) int {
	return cmp.Or(cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name, q.Name))
}

func byStart(p, q *corev1.Pod) int {
	return cmp.Or(started(p).Compare(started(q)), cmp.Compare(p.UID, q.UID), byName(p, q))
}

func started(p *corev1.Pod) time.Time {
	if p.Status.StartTime != nil {
		return p.Status.StartTime.Time
	}
	return p.CreationTimestamp.Time
}
