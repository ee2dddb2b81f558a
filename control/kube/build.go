// Package kube turns Kubernetes objects into what the mesh needs to know:
// workloads, services, and the pods of each node. It stands at the beginning of
// the way of knowledge. Build is pure; a source (Folder, or API) brings the objects. The
// package refuses to change an object, and to guess: what it cannot read it
// reports as a Problem, and leaves the pod as protected as it would be without.
package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"tacit.dev/mesh"
)

// Objects is everything of a cluster that Build reads. Nothing in it is changed
// once a source has handed it out.
type Objects struct {
	Namespaces     []*corev1.Namespace
	Pods           []*PodObject
	Services       []*corev1.Service
	EndpointSlices []*discoveryv1.EndpointSlice
	Nodes          []*corev1.Node
	ServiceCIDRs   []*networkingv1.ServiceCIDR
	Meshes         []*Mesh
	Policies       []*AuthorizationPolicy
	Peers          []*PeerAuthentication
	// Told are the addresses of pods, by UID, as their agents have them: they know them
	// before the pod's object says so.
	Told map[string][]netip.Addr
	// Others are further addresses of pods, by UID, that their agents see in them.
	Others map[string][]netip.Addr
	// Vouched are the pods, by UID, that a live agent holds captured, as their labels ask.
	Vouched map[string]bool
}

// BuildConfig is what Build needs besides the objects.
type BuildConfig struct {
	// TrustDomain of all identities.
	TrustDomain string
	// Cluster is the name of the cluster. "" means Kubernetes, as Istio's default.
	Cluster string
	// Domain is what the names of services end in. "" means cluster.local.
	Domain string
	// Namespace is control's own: like kube-system it is never enrolled.
	Namespace string
	// RootNamespace is where an AuthorizationPolicy applies to the whole mesh. "" means
	// Namespace.
	RootNamespace string
	// Ranges are those of the cluster's pods and services that no object names.
	Ranges []netip.Prefix
	// NodePorts are those out of which Services get ports of nodes.
	NodePorts mesh.NodePorts
	// Before is what the Mesh asked for when it was last understood.
	Before Policy
	// BeforeModes is the same of plaintext, nil if it was never understood.
	BeforeModes *Modes
}

func (c BuildConfig) withDefaults() BuildConfig {
	c.Cluster = cmp.Or(c.Cluster, "Kubernetes")
	c.Domain = cmp.Or(c.Domain, "cluster.local")
	c.RootNamespace = cmp.Or(c.RootNamespace, c.Namespace)
	return c
}

// Pod is a pod that its node has to know. Pod.Enroll says what its labels ask for.
type Pod struct {
	mesh.Pod
	Node string
	// Workload is how the others see it; nil while it has no address.
	Workload *mesh.Workload
	// Shown is its condition as it is.
	Shown Condition
	// Ending: somebody has deleted it.
	Ending bool
	// Contested: others claim an address of its own, and nobody knows who is right.
	Contested bool
}

// Problem is something in an object that was not understood. It never makes a
// pod less protected.
type Problem struct {
	// Object is KIND NAMESPACE/NAME, the first of those that have the same problem.
	Object string
	Text   string
	// More is how many others of that kind and namespace have it, too.
	More int
}

func (p Problem) String() string {
	if p.More > 0 {
		return fmt.Sprintf("%s and %d more: %s", p.Object, p.More, p.Text)
	}
	return p.Object + ": " + p.Text
}

// Topic is the problem whichever object of the namespace has it.
func (p Problem) Topic() string {
	return p.Object[:strings.LastIndexByte(p.Object, '/')+1] + ": " + p.Text
}

// Result is what the objects say. Workload.Direct is false everywhere: whether
// a pod is announced is not in the objects.
type Result struct {
	Workloads []*mesh.Workload
	Services  []*mesh.Service
	Places    []*mesh.Place
	Policies  []*mesh.Policy
	Pods      []Pod
	// Disputed are the addresses that several objects claim, with whether they are
	// contested: who is vouched for decides.
	Disputed map[netip.Addr]bool
	// Exceptions are the running pods that are left out, wholly or partly.
	Exceptions []Exception
	Nodes      []Node
	Mesh       MeshFacts
	// Policed is what people should see of each policy.
	Policed []PolicyFacts
	// Namespaces are those in which a pod may have to be enrolled, by a label of theirs
	// or of a pod that is there. Sorted.
	Namespaces []string
	// Problems are told, at most some hundred; Untold is how many there are besides.
	Problems []Problem
	Untold   int
}

// Build reads the objects. It is pure; its result is sorted, shares nothing with
// the objects, and is the same for the same objects in any order. It is the slow and
// obvious truth about what Builder keeps up to date.
func Build(o Objects, cfg BuildConfig) Result {
	b := build{
		reader:     reader{cfg: cfg.withDefaults()},
		objects:    o,
		namespaces: make(map[string]map[string]string, len(o.Namespaces)),
		zones:      make(map[string]string, len(o.Nodes)),
		pods:       make(map[string]*PodObject, len(o.Pods)),
		workloads:  make(map[string]*mesh.Workload, len(o.Pods)),
		disputes:   make(map[netip.Addr]dispute),
	}
	b.around, b.out = &b, &b
	for _, n := range o.Namespaces {
		b.namespaces[n.Name] = n.Labels
	}
	for _, n := range o.Nodes {
		b.zones[n.Name] = n.Labels[corev1.LabelTopologyZone]
		b.result.Nodes = append(b.result.Nodes, nodeOf(n))
	}
	b.result.Mesh = b.mesh(o.Meshes)
	b.policy, b.modes = b.result.Mesh.Policy, b.result.Mesh.Modes
	b.places()
	b.claims()
	b.readPods()
	b.readServices()
	b.readModes()
	b.readPolicies()
	b.enrolling()
	return b.sorted()
}

// build is what Build has found so far. It is around every object that is read.
type build struct {
	reader
	objects    Objects
	namespaces map[string]map[string]string // labels by name
	zones      map[string]string            // by node
	pods       map[string]*PodObject        // by NAMESPACE/NAME
	workloads  map[string]*mesh.Workload    // by UID
	disputes   map[netip.Addr]dispute
	byAddress  map[netip.Addr]*mesh.Workload
	ranges     []netip.Prefix
	problems   problems
	result     Result
}

func (b *build) labels(namespace string) map[string]string { return b.namespaces[namespace] }
func (b *build) zone(node string) string                   { return b.zones[node] }
func (b *build) told(uid string) []netip.Addr              { return b.objects.Told[uid] }
func (b *build) others(uid string) []netip.Addr            { return b.objects.Others[uid] }
func (b *build) vouched(uid string) bool                   { return b.objects.Vouched[uid] }
func (b *build) at(a netip.Addr) *mesh.Workload            { return b.byAddress[a] }

func (b *build) disputed(a netip.Addr) (dispute, bool) {
	d, is := b.disputes[a]
	return d, is
}

func (b *build) pod(name string) (*PodObject, *mesh.Workload) {
	p := b.pods[name]
	if p == nil {
		return nil, nil
	}
	return p, b.workloads[b.podUID(p)]
}

func (b *build) isOurs(a netip.Addr) bool {
	return slices.ContainsFunc(b.ranges, func(r netip.Prefix) bool { return r.Contains(a) })
}

func (b *build) problem(f finding)  { b.problems.add(f) }
func (b *build) except(e Exception) { b.result.Exceptions = append(b.result.Exceptions, e) }

// places takes in which addresses are nodes', and out of which ranges pods and services get
// theirs.
func (b *build) places() {
	places := []*mesh.Place{b.trustPlace(), b.cluster(b.objects.ServiceCIDRs)}
	for _, n := range b.objects.Nodes {
		places = append(places, b.place(n))
	}
	for _, p := range places {
		if p != nil {
			b.result.Places = append(b.result.Places, p)
			b.ranges = append(b.ranges, p.Ranges...)
		}
	}
}

// claims decides about addresses that several objects claim.
func (b *build) claims() {
	claimed := make(map[netip.Addr]*claimants, len(b.objects.Pods))
	for _, p := range b.objects.Pods {
		b.pods[p.Namespace+"/"+p.Name] = p
		b.claimed(p, func(a netip.Addr) *claimants { return find(claimed, a, func() *claimants { return &claimants{} }) })
	}
	others := make(map[netip.Addr]claim, len(b.objects.Services)+len(b.objects.Nodes))
	add := func(a netip.Addr, c claim) {
		if had, is := others[a]; !is || c.before(had) {
			others[a] = c
		}
	}
	for _, n := range b.objects.Nodes {
		for _, a := range nodeAddresses(n) {
			add(a, claimOfNode(n.Name))
		}
	}
	for _, s := range b.objects.Services {
		for _, a := range clusterIPs(s) {
			add(a, claimOfService(s.Namespace+"/"+s.Name))
		}
	}
	b.result.Disputed = make(map[netip.Addr]bool)
	for a, all := range claimed {
		other := others[a]
		if pods, is := all.rivals(other); is {
			d := b.decide(a, pods, other)
			if b.disputes[a] = d; d.contested {
				b.result.Places = append(b.result.Places, b.contestedPlace(a))
			}
			b.result.Disputed[a] = d.contested
		}
	}
}

func (b *build) readPods() {
	b.byAddress = make(map[netip.Addr]*mesh.Workload, len(b.objects.Pods))
	for _, p := range b.objects.Pods {
		w, known := b.readPod(p)
		if known != nil {
			b.result.Pods = append(b.result.Pods, *known)
		}
		if w == nil {
			continue
		}
		b.workloads[w.UID] = w
		for _, a := range w.Addresses {
			if !w.HostNetwork && slices.Contains(podAddresses(p), a) {
				b.byAddress[a] = w // nobody else is there: see claims
			}
		}
	}
}

// readServices takes in all services, and connects them with the workloads that serve them.
func (b *build) readServices() {
	slicesOf := make(map[string][]*discoveryv1.EndpointSlice)
	for _, s := range b.objects.EndpointSlices {
		slicesOf[serviceOf(s)] = append(slicesOf[serviceOf(s)], s)
	}
	for _, s := range b.objects.Services {
		if !isKnown(s) {
			continue
		}
		m := b.service(s)
		b.result.Services = append(b.result.Services, m)
		served := b.serve(s, slicesOf[s.Namespace+"/"+s.Name])
		for uid, ports := range served.ports {
			serveBy(b.workloads[uid], m.Key(), ports)
		}
		for _, w := range served.listed {
			b.workloads[w.UID] = w
		}
	}
}

// enrolling names the namespaces in which a pod may have to be enrolled: their own
// labels want it, or those of a pod that is there now.
func (b *build) enrolling() {
	names := make(map[string]bool)
	for _, n := range b.objects.Namespaces {
		if b.enrollsIn(n.Name) {
			names[n.Name] = true
		}
	}
	for _, p := range b.objects.Pods {
		if b.enrolls(p) {
			names[p.Namespace] = true
		}
	}
	b.result.Namespaces = slices.Sorted(maps.Keys(names))
}

func (b *build) sorted() Result {
	r := b.result
	for _, w := range b.workloads {
		r.Workloads = append(r.Workloads, w)
	}
	r.Pods = b.unique(r.Pods)
	r.Problems, r.Untold = b.problems.told()
	r.sort()
	return r
}

func (r *Result) sort() {
	slices.SortFunc(r.Workloads, func(x, y *mesh.Workload) int { return cmp.Compare(x.UID, y.UID) })
	slices.SortFunc(r.Services, func(x, y *mesh.Service) int { return cmp.Compare(x.Key(), y.Key()) })
	slices.SortFunc(r.Places, func(x, y *mesh.Place) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(r.Policies, func(x, y *mesh.Policy) int { return cmp.Compare(x.Key(), y.Key()) })
	slices.SortFunc(r.Policed, PolicyFacts.compare)
	slices.SortFunc(r.Nodes, func(x, y Node) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(r.Pods, func(x, y Pod) int { return cmp.Compare(x.UID, y.UID) })
	slices.SortFunc(r.Exceptions, Exception.compare)
}

// unique leaves pods each with a UID of its own. Of two with one UID, which only a
// hand-written file can bring about, the first by name counts.
func (b *build) unique(pods []Pod) (unique []Pod) {
	slices.SortFunc(pods, Pod.compare)
	for i, p := range pods {
		if i > 0 && pods[i-1].UID == p.UID {
			b.notUnique(p, pods[i-1])
		} else {
			unique = append(unique, p)
		}
	}
	return unique
}
