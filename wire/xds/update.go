package xds

import (
	"net/netip"
	"time"

	"tacit.dev/mesh"
)

// Update is what differs in what control tells. What it points to must not be changed
// afterwards.
type Update struct {
	// Changes go to every proxy.
	mesh.Changes
	// Pods go, by name of the node, to that node's agent and to no other.
	Pods map[string]PodChanges
	// Namespaces that are new, and those that are gone, go to every agent.
	Namespaces, GoneNamespaces []string
}

// PodChanges are those of one node.
type PodChanges struct {
	// Pods are new, or other than before.
	Pods []mesh.Pod
	// Gone are UIDs.
	Gone []string
}

// PodState is what an agent has made of a pod.
type PodState string

const (
	// Captured: rules are there and read back, certificate and listeners too.
	Captured PodState = "captured"
	// Released: nothing of ours is left in the pod.
	Released PodState = "released"
	// Unprotected: it should be captured and is not; Reason tells why.
	Unprotected PodState = "unprotected"
)

// Report is what an agent tells of one of its pods.
type Report struct {
	// UID is the Kubernetes metadata.uid.
	UID       string
	Namespace string
	Name      string
	State     PodState
	// Reason tells why it is not captured; of a captured pod, what of it is refused.
	Reason string
	// Addresses are where a captured pod is reached, if a runtime has told the agent:
	// control knows them by this before they are in the pod's object.
	Addresses []netip.Addr
	// Others are further addresses that a captured pod has, as its kernel tells: of a second
	// network, or given by the network itself.
	Others []netip.Addr
	// MarkedPorts is mesh.Workload's, of a captured pod.
	MarkedPorts bool
}

// NodeStatus is what a Server knows of one node; for dumps.
type NodeStatus struct {
	Node string
	// Proxy and Agent say whether each is connected.
	Proxy, Agent bool
	// Acked is the publication that the node's proxies have settled on, the
	// oldest if there are several.
	Acked uint64
	// Behind: a proxy is connected, and may still act on something older than the last
	// publication.
	Behind bool
	// Rejected is the last refusal of a resource that still stands, or "".
	Rejected string
	// GoneSince is when the last proxy left; zero while one is connected.
	GoneSince time.Time
}
