package mesh

import (
	"net/netip"
	"slices"
	"time"
)

// Workload is a pod as every node sees it. Once it is in a World it is never
// changed.
type Workload struct {
	// UID is unique in the mesh: CLUSTER//Pod/NAMESPACE/NAME, as Istio writes it.
	UID       string
	Namespace string
	Name      string
	// Node is the name of the node it runs on, Zone that of the node's zone.
	Node      string
	Zone      string
	Addresses []netip.Addr
	ID        ID
	// Direct says that the pod is captured and announced: it is reached by
	// wire/direct and by nothing else. False means outside the mesh.
	Direct bool
	// Enrolled says that the pod may be captured: its own connections may come by
	// wire/direct before it is announced, and after it is withdrawn. Who is Direct
	// is Enrolled.
	Enrolled bool
	// ExcludeInbound are ports that are not captured: reached in plaintext even
	// if the pod is Direct.
	ExcludeInbound []uint16
	// ExcludeOutbound are destinations that are not captured: the pod may reach them in
	// plaintext even if it is Direct.
	ExcludeOutbound []Exclusion
	// MarkedPorts says that the pod's kernel gives its programs source ports that hint at
	// direct (net.ipv4.ip_local_port_range), so that what they dial past the capture has
	// such ports, too.
	MarkedPorts bool
	// HostPorts are ports of the pod's node that lead to the pod. Of a HostNetwork pod they
	// are those at which it listens.
	HostPorts []HostPort
	// Listed says that this is no pod but an address that a service lists. It has no
	// identity: the World says who is at the address. Of is the UID of the pod that the
	// service names there, "" if it names none that is known.
	Listed bool
	Of     string
	// HostNetwork pods share their node's addresses; they are never enrolled,
	// and an address leads to no one of them.
	HostNetwork bool
	// Ready endpoints take connections of services; the others only those to
	// their own address.
	Ready bool
	// Services lists, per service key, which ports this workload serves.
	Services map[string][]Port
	// Policies are the Keys of those that apply to this workload besides those of the whole
	// mesh and of its namespace.
	Policies []string
	// Mode is the workload's own, nil for none.
	Mode *Mode

	// What metrics and logs name it by. OwnerKind is deployment, job, cronjob or pod.
	OwnerName         string
	OwnerKind         string
	CanonicalName     string
	CanonicalRevision string
	Cluster           string
}

// Port leads from a port of a service to the port of a workload.
type Port struct {
	Service uint16
	Target  uint16
}

// HostPort leads from a port of a pod's node to a port of the pod.
type HostPort struct {
	// Address is the node's address at which it does; the zero Addr means each of them.
	Address netip.Addr
	Port    uint16
	Target  uint16
}

// Service is a name and virtual addresses for a set of workloads. Once it is in
// a World it is never changed.
type Service struct {
	Namespace string
	Name      string
	Hostname  string
	// Addresses are the ClusterIPs, none for a headless service.
	Addresses []netip.Addr
	// Ports are the ports served. Target is 0 where it is named, and so may
	// differ from workload to workload; Workload.Services then has it.
	Ports []Port
	// External are addresses by which others reach the service: those of load balancers,
	// and externalIPs. In the cluster they lead straight to its endpoints.
	External []netip.Addr
	// NodePorts are ports of every node that lead to ports of the service.
	NodePorts []NodePort
	// HealthPort is a port of every node where kube-proxy itself answers, 0 for none.
	HealthPort uint16
	// NodeLocal says that a node port leads to endpoints of its own node only.
	NodeLocal bool
	// Reach says which of its endpoints a caller takes.
	Reach Reach
	// Affinity is how long a caller keeps to an endpoint after its last
	// connection; 0 means that every connection may go to another.
	Affinity time.Duration
}

// NodePort leads from a port of a node to a port of a service.
type NodePort struct {
	Node    uint16
	Service uint16
}

// Reach says which endpoints of a service a caller takes.
type Reach string

const (
	// Everywhere is every endpoint.
	Everywhere Reach = ""
	// SameNode is those of the caller's node, and no others.
	SameNode Reach = "same node"
	// PreferNode is those of the caller's node if there are any, else PreferZone.
	PreferNode Reach = "prefer node"
	// PreferZone is those of the caller's zone if there are any, and of every
	// endpoint the zone is known; else every endpoint.
	PreferZone Reach = "prefer zone"
)

// Key is what Workload.Services names the service by: NAMESPACE/HOSTNAME.
func (s *Service) Key() string { return s.Namespace + "/" + s.Hostname }

// Endpoint is one workload, and the port on which it serves a port of a service.
type Endpoint struct {
	Workload *Peer
	Port     uint16
}

// Place is what is known of addresses that are no pod's and no service's. Once it is in a
// World it is never changed.
type Place struct {
	// Name is unique in the mesh, also among the UIDs of workloads.
	Name string
	// Node is the node whose addresses these are, "" if they are no node's.
	Node      string
	Addresses []netip.Addr
	// Contested: several objects claim the addresses, and nobody knows who is right.
	Contested bool
	// Ranges are those out of which pods and services get their addresses, NodePorts those
	// out of which services get ports of nodes.
	Ranges    []netip.Prefix
	NodePorts NodePorts
	// Trust is what the whole mesh believes, if this place says it.
	Trust Trust
}

// Pod is what a node is told about a pod of its own: who it is, and whether it
// has to be enrolled.
type Pod struct {
	// UID is the Kubernetes metadata.uid.
	UID       string
	Namespace string
	Name      string
	ID        ID
	// Enroll asks for the pod to be captured; false asks for its release.
	Enroll bool
	// ExcludeOutbound is not captured when going out, ExcludeInbound not when
	// coming in.
	ExcludeOutbound []Exclusion
	ExcludeInbound  []uint16
	// ProbePorts are what the node's kubelet calls: it is not captured there, so
	// that it learns how the application is, and not the mesh. Others are.
	ProbePorts []uint16
	// Known are the addresses at which every node knows the pod, as one to be reached by
	// direct.
	Known []netip.Addr
}

// OneOfEach returns the first address of each family by which others may reach a pod: a
// pod has one of each, as its object has (KEP-563).
func OneOfEach(list []netip.Addr) (few []netip.Addr) {
	for _, a := range list {
		a = a.Unmap()
		if a.IsGlobalUnicast() && !slices.ContainsFunc(few, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			few = append(few, a)
		}
	}
	return few
}

// Exclusion is a set of destinations that are not captured. A zero Port means
// all ports, an invalid Prefix all addresses; never both.
type Exclusion struct {
	Prefix netip.Prefix
	Port   uint16
}

// Has reports whether the destination is one of the set.
func (e Exclusion) Has(to netip.AddrPort) bool {
	return (e.Port == 0 || e.Port == to.Port()) && (!e.Prefix.IsValid() || e.Prefix.Contains(to.Addr().Unmap()))
}
