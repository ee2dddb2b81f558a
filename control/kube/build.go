// Package kube turns Kubernetes objects into what the mesh needs to know:
// workloads, services, and the pods of each node. It stands at the beginning of
// the way of knowledge. Build is pure; a source (Folder, or API) brings the objects. The
// package refuses to change an object, and to guess: what it cannot read it
// reports as a Problem, and leaves the pod as protected as it would be without.
package kube

import (
	"cmp"
	"fmt"
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
	Pods           []*corev1.Pod
	Services       []*corev1.Service
	EndpointSlices []*discoveryv1.EndpointSlice
	Nodes          []*corev1.Node
	ServiceCIDRs   []*networkingv1.ServiceCIDR
	Meshes         []*Mesh
	// Told are the addresses of pods, by UID, as their agents have them: they know them
	// before the pod's object says so.
	Told map[string][]netip.Addr
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
	// Ranges are those of the cluster's pods and services that no object names.
	Ranges []netip.Prefix
	// NodePorts are those out of which Services get ports of nodes.
	NodePorts mesh.NodePorts
	// Before is what the Mesh asked for when it was last understood.
	Before Policy
}

func (c BuildConfig) withDefaults() BuildConfig {
	c.Cluster = cmp.Or(c.Cluster, "Kubernetes")
	c.Domain = cmp.Or(c.Domain, "cluster.local")
	return c
}

// Pod is a pod that its node has to know. Pod.Enrol says what its labels ask for.
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
	Pods      []Pod
	// Disputed are the addresses that several objects claim, with whether they are
	// contested: who is vouched for decides.
	Disputed map[netip.Addr]bool
	// Exceptions are the running pods that are left out, wholly or partly.
	Exceptions []Exception
	Nodes      []Node
	Mesh       MeshFacts
	// Namespaces are those in which a pod may have to be enrolled, by a label of theirs
	// or of a pod that is there. Sorted.
	Namespaces []string
	// Problems are told, at most some hundred; Untold is how many there are besides.
	Problems []Problem
	Untold   int
}

// Build reads the objects. It is pure; its result is sorted, shares nothing with
// the objects, and is the same for the same objects in any order.
func Build(o Objects, cfg BuildConfig) Result {
	b := builder{
		cfg:        cfg.withDefaults(),
		namespaces: make(map[string]map[string]string, len(o.Namespaces)),
		workloads:  make(map[string]*mesh.Workload, len(o.Pods)),
		pods:       make(map[string]*corev1.Pod, len(o.Pods)),
		zones:      make(map[string]string, len(o.Nodes)),
		told:       o.Told,
		vouched:    o.Vouched,
		toldOnly:   make(map[netip.Addr]bool),
	}
	for _, n := range o.Namespaces {
		b.namespaces[n.Name] = n.Labels
	}
	b.result.Mesh = b.mesh(o.Meshes)
	b.nodes(o.Nodes)
	b.places(o)
	b.claims(o)
	for _, p := range o.Pods {
		b.pod(p)
	}
	b.services(o.Services, o.EndpointSlices)
	b.result.Namespaces, b.result.Disputed = b.enrolling(o), b.contested
	return b.sorted()
}

// builder holds what Build has found so far.
type builder struct {
	cfg        BuildConfig
	namespaces map[string]map[string]string // labels by name
	workloads  map[string]*mesh.Workload    // by UID
	pods       map[string]*corev1.Pod       // by NAMESPACE/NAME
	zones      map[string]string            // by node
	told       map[string][]netip.Addr      // Objects.Told
	toldOnly   map[netip.Addr]bool          // addresses that no object has
	problems   problems
	vouched    map[string]bool            // Objects.Vouched
	holder     map[netip.Addr]*corev1.Pod // of an address that several objects claim; nil for no pod
	contested  map[netip.Addr]bool        // of the same addresses
	ranges     []netip.Prefix             // the cluster's
	result     Result
}

func (b *builder) problem(kind, namespace, name, text string) {
	b.problems.add(kind, namespace, name, text)
}

func (b *builder) sorted() Result {
	r := b.result
	for _, w := range b.workloads {
		r.Workloads = append(r.Workloads, w)
	}
	slices.SortFunc(r.Workloads, func(x, y *mesh.Workload) int { return cmp.Compare(x.UID, y.UID) })
	slices.SortFunc(r.Services, func(x, y *mesh.Service) int { return cmp.Compare(x.Key(), y.Key()) })
	slices.SortFunc(r.Places, func(x, y *mesh.Place) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(r.Nodes, func(x, y Node) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(r.Exceptions, func(x, y Exception) int {
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name), cmp.Compare(x.Reason, y.Reason))
	})
	r.Pods = b.unique(r.Pods)
	r.Problems, r.Untold = b.problems.told()
	return r
}

// unique sorts pods by UID. Of two with one UID, which only a hand-written file
// can bring about, the first by name counts.
func (b *builder) unique(pods []Pod) []Pod {
	slices.SortFunc(pods, func(x, y Pod) int {
		return cmp.Or(cmp.Compare(x.UID, y.UID), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
	})
	return slices.CompactFunc(pods, func(p, had Pod) bool {
		if had.UID == p.UID {
			b.problem("Pod", p.Namespace, p.Name, "not enrolled: UID "+p.UID+" is also that of "+had.Namespace+"/"+had.Name)
		}
		return had.UID == p.UID
	})
}
