package cluster

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tacit.dev/bench/scale/api"
)

// sliceSize is how many endpoints the controller puts into one slice.
const sliceSize = 100

// born is when everything was made that is there at the beginning.
var born = metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))

func nodeObject(n *node) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.name, CreationTimestamp: born, Labels: map[string]string{
			corev1.LabelTopologyZone: n.zone, corev1.LabelHostname: n.name, corev1.LabelInstanceTypeStable: "m7i.4xlarge", corev1.LabelOSStable: "linux"}},
		Spec: corev1.NodeSpec{PodCIDR: fmt.Sprintf("%s/24", podAddress(n.number, 0)), PodCIDRs: []string{
			fmt.Sprintf("%s/24", podAddress(n.number, 0)), fmt.Sprintf("%s/64", podAddress6(n.number, 0))}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: nodeAddress(n.number).String()}, {Type: corev1.NodeHostName, Address: n.name}}},
	}
}

func namespaceObject(s *space) *corev1.Namespace {
	labels := make(map[string]string, len(s.labels))
	for k, v := range s.labels {
		labels[k] = v
	}
	return &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{Name: s.name, CreationTimestamp: born, Labels: labels},
		Status:     corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
	}
}

func (s *set) labels() map[string]string {
	return map[string]string{"app.kubernetes.io/name": s.name, "app.kubernetes.io/version": s.version, "team": s.space.labels["team"]}
}

func podObject(p *pod) *corev1.Pod {
	s, yes := p.set, true
	labels := s.labels()
	labels["pod-template-hash"] = s.hash
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.space.name, Name: p.name, GenerateName: s.name + "-" + s.hash + "-", UID: types.UID(p.uid), CreationTimestamp: born, Labels: labels,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: s.name + "-" + s.hash, UID: types.UID("0" + p.uid[1:]), Controller: &yes, BlockOwnerDeletion: &yes}},
		},
		Spec: corev1.PodSpec{
			NodeName: p.node.name, ServiceAccountName: s.account, RestartPolicy: corev1.RestartPolicyAlways,
			Containers: []corev1.Container{{
				Name: "main", Image: "registry.example.org/" + s.space.labels["team"] + "/" + s.name + ":" + s.version, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: s.port, Protocol: corev1.ProtocolTCP}},
				ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromString("http")}}},
			}},
		},
	}
	setStatus(o, p)
	return o
}

// setStatus writes what a kubelet would; what is control's stays.
func setStatus(o *corev1.Pod, p *pod) {
	o.Status.Phase = corev1.PodPending
	if p.running {
		o.Status.Phase = corev1.PodRunning
		o.Status.HostIP = nodeAddress(p.node.number).String()
		o.Status.PodIPs = nil
		for _, a := range Addresses(p.uid) {
			o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
		}
		o.Status.PodIP = o.Status.PodIPs[0].IP
	}
	ready := corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse}
	if p.ready {
		ready.Status = corev1.ConditionTrue
	}
	conditions := []corev1.PodCondition{ready}
	for _, c := range o.Status.Conditions {
		if c.Type != corev1.PodReady {
			conditions = append(conditions, c)
		}
	}
	o.Status.Conditions = conditions
	if p.ending && o.DeletionTimestamp == nil {
		now, grace := metav1.Now(), int64(1)
		o.DeletionTimestamp, o.DeletionGracePeriodSeconds = &now, &grace
	}
}

func serviceObject(s *set, number int) *corev1.Service {
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.space.name, Name: s.service, CreationTimestamp: born, Labels: s.labels()},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: s.address, ClusterIPs: []string{s.address}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Selector: map[string]string{"app.kubernetes.io/name": s.name},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), Protocol: corev1.ProtocolTCP}},
		},
	}
	if s.dual {
		o.Spec.ClusterIPs = append(o.Spec.ClusterIPs, serviceAddress6(number).String())
		o.Spec.IPFamilies = append(o.Spec.IPFamilies, corev1.IPv6Protocol)
	}
	return o
}

// putSlices puts the slices, of each family, that hold the slot.
func (c *Cluster) putSlices(s *set, slot int) {
	if s.service == "" {
		return
	}
	families := []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4}
	if s.dual {
		families = append(families, discoveryv1.AddressTypeIPv6)
	}
	for i, f := range families {
		c.cfg.Store.Put(api.Slices, sliceObject(s, slot/sliceSize, i, f))
	}
}

// sliceObject is the n-th slice of a family; of the addresses of a pod it takes that of the family.
func sliceObject(s *set, n, address int, family discoveryv1.AddressType) *discoveryv1.EndpointSlice {
	name, protocol := "http", corev1.ProtocolTCP
	o := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.space.name, Name: fmt.Sprintf("%s-%s-%d", s.service, strings.ToLower(string(family)), n), CreationTimestamp: born,
			Labels: map[string]string{discoveryv1.LabelServiceName: s.service, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"},
		},
		AddressType: family,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &s.port, Protocol: &protocol}},
	}
	for _, p := range s.slots[n*sliceSize : min((n+1)*sliceSize, len(s.slots))] {
		if p == nil || !p.running {
			continue
		}
		ready, serving, terminating := p.ready && !p.ending, p.ready, p.ending
		zone := p.node.zone
		o.Endpoints = append(o.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{Addresses(p.uid)[address].String()}, NodeName: &p.node.name, Zone: &zone,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: s.space.name, Name: p.name, UID: types.UID(p.uid)},
		})
	}
	return o
}
