// Package kube turns Kubernetes objects into what the mesh needs to know:
// workloads, services, and the pods of each node. It stands at the beginning of
// the way of knowledge. Build is pure; a source (Folder) brings the objects. The
// package refuses to change an object, and to guess: what it cannot read it
// reports as a Problem, and leaves the pod as protected as it would be without.
package kube

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"tacit.dev/mesh"
)

// Objects is everything of a cluster that Build reads. Nothing in it is changed
// once a source has handed it out.
type Objects struct {
	Namespaces     []*corev1.Namespace
	Pods           []*corev1.Pod
	Services       []*corev1.Service
	EndpointSlices []*discoveryv1.EndpointSlice
}

// BuildConfig is what Build needs besides the objects.
type BuildConfig struct {
	// TrustDomain of all identities.
	TrustDomain string
	// Cluster is the name of the cluster. "" means Kubernetes, as Istio's default.
	Cluster string
	// Domain is what the names of services end in. "" means cluster.local.
	Domain string
}

// Pod is a pod that its node has to know. Pod.Enrol says what its labels ask for.
type Pod struct {
	mesh.Pod
	Node string
	// Workload is how the others see it; nil while it has no address.
	Workload *mesh.Workload
}

// Problem is something in an object that was not understood. It never makes a
// pod less protected.
type Problem struct {
	// Object is KIND NAMESPACE/NAME.
	Object string
	Text   string
}

// Result is what the objects say. Workload.Direct is false everywhere: whether
// a pod is announced is not in the objects.
type Result struct {
	Workloads []*mesh.Workload
	Services  []*mesh.Service
	Pods      []Pod
	Problems  []Problem
}

// Build reads the objects. It is pure; its result is sorted, shares nothing with
// the objects, and is the same for the same objects in any order.
func Build(o Objects, cfg BuildConfig) Result { return Result{} }
