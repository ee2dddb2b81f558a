package lab

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// What the API server, kubelets and controllers would write.

func namespaceObject(name string, with map[string]string) *corev1.Namespace {
	return &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: with},
	}
}

func accountObject(namespace, name string) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}
}

func podObject(p *pod) *corev1.Pod {
	o := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.namespace, Name: p.name, UID: types.UID(p.uid),
			Labels: p.labels, Annotations: p.annotations,
			CreationTimestamp: metav1.Time{Time: p.created},
		},
		Spec: corev1.PodSpec{
			NodeName: p.node.name, ServiceAccountName: p.account,
			Containers: []corev1.Container{{Name: "app", Image: "lab", Ports: p.ports}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
	if !p.deleted.IsZero() {
		grace := int64(p.grace.Seconds())
		o.DeletionTimestamp, o.DeletionGracePeriodSeconds = &metav1.Time{Time: p.deleted}, &grace
	}
	if p.running {
		o.Status.Phase = corev1.PodRunning
		o.Status.PodIP = p.address.v4.String()
		o.Status.HostIP = nodeAddress(p.node.number).v4.String()
		for _, a := range p.address.list() {
			o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
		}
	}
	ready := corev1.ConditionFalse
	if p.ready {
		ready = corev1.ConditionTrue
	}
	o.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}
	return o
}

// sliceObjects are the EndpointSlices of a service: per family, and per set of
// resolved ports, since a named target port may differ from pod to pod.
func sliceObjects(s *corev1.Service, pods []*pod) []*discoveryv1.EndpointSlice {
	if len(s.Spec.Selector) == 0 {
		return nil
	}
	selector := labels.SelectorFromSet(s.Spec.Selector)
	var out []*discoveryv1.EndpointSlice
	for _, family := range s.Spec.IPFamilies {
		groups := map[string]*discoveryv1.EndpointSlice{}
		for _, p := range pods {
			if p.namespace != s.Namespace || !p.running || !selector.Matches(labels.Set(p.labels)) {
				continue
			}
			ports, key := resolvePorts(s, p)
			if groups[key] == nil {
				groups[key] = sliceObject(s, family, ports)
			}
			groups[key].Endpoints = append(groups[key].Endpoints, endpoint(p, family))
		}
		for i, key := range slices.Sorted(maps.Keys(groups)) {
			groups[key].Name = fmt.Sprintf("%s-%s-%d", s.Name, familyName(family), i)
			out = append(out, groups[key])
		}
	}
	return out
}

func familyName(f corev1.IPFamily) string {
	if f == corev1.IPv6Protocol {
		return "v6"
	}
	return "v4"
}

func sliceObject(s *corev1.Service, family corev1.IPFamily, ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace,
			Labels:    map[string]string{discoveryv1.LabelServiceName: s.Name, discoveryv1.LabelManagedBy: "lab"},
		},
		AddressType: discoveryv1.AddressType(family),
		Ports:       ports,
	}
}

func endpoint(p *pod, family corev1.IPFamily) discoveryv1.Endpoint {
	address := p.address.v4
	if family == corev1.IPv6Protocol {
		address = p.address.v6
	}
	terminating := !p.deleted.IsZero()
	ready, serving := p.ready && !terminating, p.ready
	return discoveryv1.Endpoint{
		Addresses:  []string{address.String()},
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		NodeName:   &p.node.name,
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: p.namespace, Name: p.name, UID: types.UID(p.uid)},
	}
}

// resolvePorts names the ports of p behind s; a port whose name p does not have
// is left out. The key is equal for equal ports.
func resolvePorts(s *corev1.Service, p *pod) (ports []discoveryv1.EndpointPort, key string) {
	for _, sp := range s.Spec.Ports {
		number, ok := targetPort(sp, p)
		if !ok {
			continue
		}
		name, protocol := sp.Name, cmp.Or(sp.Protocol, corev1.ProtocolTCP)
		ports = append(ports, discoveryv1.EndpointPort{Name: &name, Port: &number, Protocol: &protocol})
		key += fmt.Sprintf("%s=%d ", name, number)
	}
	return ports, key
}

func targetPort(sp corev1.ServicePort, p *pod) (int32, bool) {
	if sp.TargetPort.Type == intstr.Int {
		return cmp.Or(sp.TargetPort.IntVal, sp.Port), true
	}
	for _, cp := range p.ports {
		if cp.Name == sp.TargetPort.StrVal {
			return cp.ContainerPort, true
		}
	}
	return 0, false
}

// virtual is one port of one virtual address and what stands behind it.
type virtual struct {
	address   netip.AddrPort
	endpoints []netip.AddrPort
}

// virtuals reads services and their slices as kube-proxy does: ready endpoints,
// or if there is none, those that still serve while they terminate.
func virtuals(s *corev1.Service, sliced []*discoveryv1.EndpointSlice) []virtual {
	var out []virtual
	for _, text := range s.Spec.ClusterIPs {
		vip, err := netip.ParseAddr(text)
		if err != nil {
			continue // None: headless
		}
		for _, sp := range s.Spec.Ports {
			if cmp.Or(sp.Protocol, corev1.ProtocolTCP) != corev1.ProtocolTCP {
				continue
			}
			v := virtual{address: netip.AddrPortFrom(vip, uint16(sp.Port))}
			v.endpoints = endpointsOf(sp.Name, vip, sliced)
			out = append(out, v)
		}
	}
	return out
}

func endpointsOf(port string, vip netip.Addr, sliced []*discoveryv1.EndpointSlice) []netip.AddrPort {
	var ready, serving []netip.AddrPort
	for _, slice := range sliced {
		if (slice.AddressType == discoveryv1.AddressTypeIPv4) != vip.Is4() {
			continue
		}
		for _, ep := range slice.Ports {
			if *ep.Name != port {
				continue
			}
			for _, e := range slice.Endpoints {
				at := netip.AddrPortFrom(netip.MustParseAddr(e.Addresses[0]), uint16(*ep.Port))
				switch {
				case *e.Conditions.Ready:
					ready = append(ready, at)
				case *e.Conditions.Serving && *e.Conditions.Terminating:
					serving = append(serving, at)
				}
			}
		}
	}
	if len(ready) == 0 {
		return serving
	}
	return ready
}
