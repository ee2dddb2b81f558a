package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// claim is that of an object that is no pod. The zero claim is nobody's.
type claim struct {
	object string
	// service: no pod can have it.
	service bool
}

func claimOfNode(name string) claim    { return claim{object: "Node " + name} }
func claimOfService(name string) claim { return claim{"Service " + name, true} }

// before tells whether c counts more than d, another claim of the same address.
func (c claim) before(d claim) bool {
	if c.service != d.service {
		return c.service
	}
	return c.object < d.object
}

// claimants are the pods that claim an address for themselves alone: as their own one, or among
// others that an agent sees in them. Whoever may change the network of a pod can give it any
// address. So the latter count for nothing where anybody else claims it.
type claimants struct{ own, among []*PodObject }

// claimed adds what a pod claims.
func (r *reader) claimed(p *PodObject, by func(netip.Addr) *claimants) {
	if !isThere(p) || p.Spec.HostNetwork {
		return
	}
	for _, a := range r.addresses(p) {
		by(a).own = append(by(a).own, p)
	}
	for _, a := range r.others(p) {
		by(a).among = append(by(a).among, p)
	}
}

// rivals are the pods among which one is to be chosen, if that is not plain.
func (c *claimants) rivals(other claim) (pods []*PodObject, disputed bool) {
	if other.object == "" && len(c.own) == 0 {
		return c.among, len(c.among) > 1
	}
	return c.own, len(c.own) > 1 || len(c.among) > 0 || len(c.own) == 1 && other.object != ""
}

// decide finds out whose an address is that several objects claim. Addresses are given to
// new pods while the object of the one before still has them; and a node's kubelet writes
// what it likes into the objects of its own pods. To take the wrong claim would be to
// expect the wrong identity, or plaintext. So, if a pod of the mesh is among them:
//
//	a live agent holds one of the pods there, and its object says so too    that one's
//	pods that are being deleted, and one that is not                        that one's
//	anything else                                                          contested: nobody's
//
// Without a pod of the mesh, whoever was started later has it.
//
// It tells of claims that are not the usual.
func (r *reader) decide(a netip.Addr, pods []*PodObject, other claim) dispute {
	slices.SortFunc(pods, byName)
	var d dispute
	d.holder, d.contested = r.holder(a, pods, other)
	r.tellClaims(a, pods, other, d)
	return d
}

// holder is whose the address is, nil for no pod's.
func (r *reader) holder(a netip.Addr, pods []*PodObject, other claim) (holder *PodObject, contested bool) {
	if other.service {
		return nil, false
	}
	if vouched := unlessDeleted(only(pods, func(p *PodObject) bool { return r.isVouched(p, a) })); len(vouched) > 0 {
		return one(vouched)
	}
	ofMesh := slices.ContainsFunc(pods, r.mayBeOfMesh)
	if other.object != "" {
		return nil, ofMesh
	}
	pods = unlessDeleted(pods)
	// An agent's word alone does not take the address of a pod whose object has it.
	if said := only(pods, func(p *PodObject) bool { return slices.Contains(podAddresses(p), a) }); len(said) > 0 {
		pods = said
	}
	if ofMesh {
		return one(pods)
	}
	return slices.MaxFunc(pods, byStart), false
}

// one returns the only pod, or that it is contested.
func one(pods []*PodObject) (*PodObject, bool) {
	if len(pods) == 1 {
		return pods[0], false
	}
	return nil, true
}

// unlessDeleted leaves pods that are not being deleted, or all if there are none.
func unlessDeleted(pods []*PodObject) []*PodObject {
	if stay := only(pods, func(p *PodObject) bool { return p.DeletionTimestamp == nil }); len(stay) > 0 {
		return stay
	}
	return pods
}

// isVouched tells whether a live agent holds the pod captured at the address, as far as it
// knows, and the pod's object says the same. Each can be wrong or forged alone.
func (r *reader) isVouched(p *PodObject, a netip.Addr) bool {
	told := r.around.told(string(p.UID))
	return r.around.vouched(string(p.UID)) && slices.Contains(podAddresses(p), a) && (len(told) == 0 || slices.Contains(told, a))
}

// mayBeOfMesh tells whether something is to be protected: a label asks for it, or an agent
// has spoken of the pod.
func (r *reader) mayBeOfMesh(p *PodObject) bool {
	uid := string(p.UID)
	return r.around.vouched(uid) || len(r.around.told(uid)) > 0 || len(r.around.others(uid)) > 0 || r.quiet().wanted(p)
}

// tellClaims reports a claim that is not the usual: an address that goes from a pod that is
// being deleted to the next is.
func (r *reader) tellClaims(a netip.Addr, pods []*PodObject, other claim, d dispute) {
	var all []string
	if other.object != "" {
		all = append(all, other.object)
	}
	for _, p := range pods[:min(len(pods), maxClaims)] {
		all = append(all, "Pod "+p.Namespace+"/"+p.Name)
	}
	holder := d.holder
	for _, p := range pods {
		switch {
		case d.contested:
			r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is contested, connections to it are refused: %s claim it", a, strings.Join(all, ", ")))
		case p == holder, p.DeletionTimestamp != nil, holder != nil && !r.mayBeOfMesh(holder):
		case holder != nil:
			r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is not its own: Pod %s/%s has it", a, holder.Namespace, holder.Name))
		default:
			r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("address %s is not its own: %s has it", a, other.object))
		}
	}
}

// isContested tells whether others claim an address of the pod's.
func (r *reader) isContested(p *PodObject) bool {
	return slices.ContainsFunc(r.addresses(p), func(a netip.Addr) bool {
		d, _ := r.around.disputed(a)
		return d.contested
	})
}

func only(pods []*PodObject, fits func(*PodObject) bool) (found []*PodObject) {
	for _, p := range pods {
		if fits(p) {
			found = append(found, p)
		}
	}
	return found
}

func byName(p, q *PodObject) int {
	return cmp.Or(cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name, q.Name))
}

func byStart(p, q *PodObject) int {
	return cmp.Or(started(p).Compare(started(q)), cmp.Compare(p.UID, q.UID), byName(p, q))
}

func started(p *PodObject) time.Time {
	if p.Status.StartTime != nil {
		return p.Status.StartTime.Time
	}
	return p.CreationTimestamp.Time
}
