package kube

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tacit.dev/mesh"
)

// isKnown: a name of another name has no endpoints, and nodes do not know it.
func isKnown(s *corev1.Service) bool { return s.Spec.Type != corev1.ServiceTypeExternalName }

// serviceOf is NAMESPACE/NAME of the service that the slice is of.
func serviceOf(s *discoveryv1.EndpointSlice) string {
	return s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]
}

func clusterIPs(s *corev1.Service) []netip.Addr {
	return addresses(append([]string{s.Spec.ClusterIP}, s.Spec.ClusterIPs...))
}

func (r *reader) hostname(s *corev1.Service) string {
	return s.Name + "." + s.Namespace + ".svc." + r.cfg.Domain
}

// serviceKey is the mesh.Service.Key of NAMESPACE/NAME.
func (r *reader) serviceKey(name string) string {
	namespace, name, _ := strings.Cut(name, "/")
	return namespace + "/" + name + "." + namespace + ".svc." + r.cfg.Domain
}

// reach is internalTrafficPolicy and trafficDistribution.
func reach(s *corev1.Service) mesh.Reach {
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		return mesh.SameNode
	}
	switch value(s.Spec.TrafficDistribution) {
	case corev1.ServiceTrafficDistributionPreferSameNode:
		return mesh.PreferNode
	case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone:
		return mesh.PreferZone
	}
	return mesh.Everywhere
}

// affinity is sessionAffinity.
func affinity(s *corev1.Service) time.Duration {
	if s.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0
	}
	seconds := int32(corev1.DefaultClientIPServiceAffinitySeconds)
	if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && value(c.ClientIP.TimeoutSeconds) > 0 {
		seconds = *c.ClientIP.TimeoutSeconds
	}
	return time.Duration(seconds) * time.Second
}

func (r *reader) service(s *corev1.Service) *mesh.Service {
	m := &mesh.Service{
		Namespace: s.Namespace,
		Name:      s.Name,
		Hostname:  r.hostname(s),
		Addresses: clusterIPs(s),
		Reach:     reach(s),
		Affinity:  affinity(s),
	}
	m.External = r.external(s)
	m.NodeLocal = s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	if len(s.Spec.Ports) > maxServicePorts {
		r.problem("Service", s.Namespace, s.Name, fmt.Sprintf("more than %d ports: the others are not known", maxServicePorts))
	}
	for _, p := range portsOf(s) {
		if !isTCP(p.Protocol) || !isPort(p.Port) {
			continue
		}
		m.Ports = append(m.Ports, mesh.Port{Service: uint16(p.Port), Target: targetPort(p)})
		if isPort(p.NodePort) {
			m.NodePorts = append(m.NodePorts, mesh.NodePort{Node: uint16(p.NodePort), Service: uint16(p.Port)})
		}
	}
	if isPort(s.Spec.HealthCheckNodePort) {
		m.HealthPort = uint16(s.Spec.HealthCheckNodePort)
	}
	slices.SortFunc(m.NodePorts, func(x, y mesh.NodePort) int { return cmp.Compare(x.Node, y.Node) })
	slices.SortFunc(m.Ports, func(x, y mesh.Port) int { return cmp.Compare(x.Service, y.Service) })
	return m
}

// external are the addresses of load balancers and externalIPs. A load balancer that wants
// to see the connection itself (ipMode: Proxy) is outside of the cluster.
func (r *reader) external(s *corev1.Service) []netip.Addr {
	texts := slices.Clone(s.Spec.ExternalIPs)
	for _, in := range s.Status.LoadBalancer.Ingress {
		if value(in.IPMode) != corev1.LoadBalancerIPModeProxy {
			texts = append(texts, in.IP)
		}
	}
	if len(texts) > maxExternal {
		r.problem("Service", s.Namespace, s.Name, fmt.Sprintf("%d external addresses: want at most %d, the rest are not known", len(texts), maxExternal))
		texts = texts[:maxExternal]
	}
	return addresses(texts)
}

// targetPort is 0 where the port is named: it may differ from pod to pod.
func targetPort(p corev1.ServicePort) uint16 {
	if p.TargetPort.Type == intstr.String && p.TargetPort.StrVal != "" {
		return 0
	}
	if isPort(p.TargetPort.IntVal) {
		return uint16(p.TargetPort.IntVal)
	}
	return uint16(p.Port)
}

func isTCP(p corev1.Protocol) bool { return p == "" || p == corev1.ProtocolTCP }
func isPort(p int32) bool          { return 0 < p && p <= math.MaxUint16 }

// served is what the slices of a service say.
type served struct {
	// ports are those of the service that pods serve, by UID of their workload, sorted.
	ports map[string][]mesh.Port
	// listed are workloads of the service's alone.
	listed []*mesh.Workload
}

// serve finds out who serves a service.
func (r *reader) serve(s *corev1.Service, list []*discoveryv1.EndpointSlice) served {
	e := endpoints{
		r: r, service: s, key: s.Namespace + "/" + r.hostname(s),
		found: make(map[endpointKey]*endpointSet), listed: make(map[string]*mesh.Workload),
	}
	// Always in the same order: which endpoints are too many must not change by itself.
	for _, slice := range slices.SortedFunc(slices.Values(list), func(x, y *discoveryv1.EndpointSlice) int { return cmp.Compare(x.Name, y.Name) }) {
		if !e.slice(slice) {
			r.problem("Service", s.Namespace, s.Name, fmt.Sprintf("more than %d endpoints, each port counted: the others are not known", maxEndpoints))
			break
		}
	}
	return e.join()
}

// endpoints collects who serves which port of a service.
type endpoints struct {
	r       *reader
	service *corev1.Service
	key     string // mesh.Service.Key
	found   map[endpointKey]*endpointSet
	listed  map[string]*mesh.Workload // by UID
	count   int                       // what was looked at
}

type endpointKey struct {
	port uint16
	// local: each node has a set of its own, node is whose. A caller there takes
	// no other, even if all of its own are terminating.
	local bool
	node  string
}

// endpointSet is who serves one port: those that are ready, and those that are
// terminating but still serve.
type endpointSet struct{ ready, serving []endpoint }

type endpoint struct {
	workload *mesh.Workload
	target   uint16
}

// slice takes in a slice, and returns false if there are too many endpoints.
func (e *endpoints) slice(slice *discoveryv1.EndpointSlice) bool {
	for _, p := range slice.Ports[:min(len(slice.Ports), maxServicePorts)] {
		// The slice has resolved a named port; its own name is that of the service's.
		i := slices.IndexFunc(portsOf(e.service), func(sp corev1.ServicePort) bool {
			return isTCP(sp.Protocol) && sp.Name == value(p.Name)
		})
		if i < 0 || p.Port == nil || !isPort(*p.Port) || p.Protocol != nil && !isTCP(*p.Protocol) {
			continue
		}
		key := endpointKey{port: uint16(e.service.Spec.Ports[i].Port), local: reach(e.service) == mesh.SameNode}
		for _, end := range slice.Endpoints {
			if e.count == maxEndpoints {
				return false
			}
			e.count++
			e.endpoint(key, slice, end, uint16(*p.Port))
		}
	}
	return true
}

func (e *endpoints) endpoint(key endpointKey, slice *discoveryv1.EndpointSlice, end discoveryv1.Endpoint, target uint16) {
	w := e.workload(slice, end)
	if w == nil {
		return
	}
	if key.local {
		key.node = w.Node
	}
	set := e.found[key]
	if set == nil {
		set = &endpointSet{}
		e.found[key] = set
	}
	// Absent means ready and serving (discovery/v1, EndpointConditions). Ready has the
	// first word: with publishNotReadyAddresses it is said of who terminates, too.
	c := end.Conditions
	switch {
	case c.Ready == nil || *c.Ready:
		set.ready = append(set.ready, endpoint{w, target})
	case value(c.Terminating) && (c.Serving == nil || *c.Serving):
		set.serving = append(set.serving, endpoint{w, target})
	}
}

// workload finds who is behind an endpoint. kube-proxy dials the address that the slice
// says, whatever it says of a pod; so that address counts, and whose it is. An endpoint of a
// pod that is gone is left out.
func (e *endpoints) workload(slice *discoveryv1.EndpointSlice, end discoveryv1.Endpoint) *mesh.Workload {
	addrs := addresses(end.Addresses[:min(len(end.Addresses), 1)])
	if len(addrs) == 0 {
		return nil
	}
	if r := end.TargetRef; r != nil && r.Kind == "Pod" {
		namespace := cmp.Or(r.Namespace, slice.Namespace)
		if p, w := e.r.around.pod(namespace + "/" + r.Name); p != nil {
			return e.ofPod(slice, end, p, w, addrs)
		}
		// A pod of another cluster, or one that is gone or not known yet.
		if e.r.around.at(addrs[0]) == nil && e.r.around.isOurs(addrs[0]) {
			return nil
		}
	}
	if w := e.r.around.at(addrs[0]); w != nil {
		return w
	}
	return e.list(slice, end, addrs, "")
}

// ofPod is an endpoint that names a pod which is there: at an address of the pod's, or at
// one that its object does not know, as of a second interface.
func (e *endpoints) ofPod(slice *discoveryv1.EndpointSlice, end discoveryv1.Endpoint, p *PodObject, w *mesh.Workload, addrs []netip.Addr) *mesh.Workload {
	uid := end.TargetRef.UID
	// A StatefulSet's next pod has the name of the one that is gone.
	if w == nil || uid != "" && p.UID != "" && uid != p.UID {
		return nil
	}
	if slices.Contains(w.Addresses, addrs[0]) || slices.Contains(podAddresses(p), addrs[0]) {
		return w
	}
	return e.list(slice, end, addrs, w.UID)
}

// list makes an endpoint that is no pod (the API server's, or one of a hand-made slice) a
// workload of the service's alone: no other way leads to it.
func (e *endpoints) list(slice *discoveryv1.EndpointSlice, end discoveryv1.Endpoint, addrs []netip.Addr, of string) *mesh.Workload {
	uid := e.r.workloadUID("discovery.k8s.io/EndpointSlice", slice.Namespace, slice.Name+"/"+addrs[0].String())
	w := e.listed[uid]
	if w == nil {
		w = &mesh.Workload{
			UID: uid, Namespace: slice.Namespace, Name: slice.Name, Node: value(end.NodeName), Zone: value(end.Zone),
			Addresses: addrs, Listed: true, Of: of, Cluster: e.r.cfg.Cluster,
		}
		e.listed[uid] = w
	}
	return w
}

// join says which ports each workload serves. Terminating endpoints take new
// connections only if a port has no others (as kube-proxy does, KEP-1669).
func (e *endpoints) join() served {
	all := served{ports: make(map[string][]mesh.Port)}
	for key, set := range e.found {
		list := set.ready
		if len(list) == 0 {
			list = set.serving
		}
		for _, end := range list {
			p := mesh.Port{Service: key.port, Target: end.target}
			// A pod is in the slices of both address families.
			if ports := all.ports[end.workload.UID]; !slices.Contains(ports, p) {
				all.ports[end.workload.UID] = append(ports, p)
			}
		}
	}
	for _, ports := range all.ports {
		slices.SortFunc(ports, func(x, y mesh.Port) int {
			return cmp.Or(cmp.Compare(x.Service, y.Service), cmp.Compare(x.Target, y.Target))
		})
	}
	for uid, w := range e.listed {
		if ports := all.ports[uid]; len(ports) > 0 {
			serveBy(w, e.key, ports)
			delete(all.ports, uid)
		}
		all.listed = append(all.listed, w)
	}
	return all
}

// serveBy has a workload serve ports of a service. It is ready then, whatever its pod says:
// the slice has the last word, see publishNotReadyAddresses.
func serveBy(w *mesh.Workload, service string, ports []mesh.Port) {
	w.Ready = true
	if w.Services == nil {
		w.Services = make(map[string][]mesh.Port)
	}
	w.Services[service] = ports
}

// value is what p points to, or the zero value.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
