package kube

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What is read of an object is bounded before it is parsed: whoever may write one would
// else decide how much memory the leader takes. docs/limits.md has every field.
const (
	// maxAnnotation bounds one annotation, in bytes: maxExclusions are half of that.
	maxAnnotation = 4096
	// maxFaults is how many faults of one field are told.
	maxFaults = 3
	// maxProblems bounds the problems that are told, maxProblemsOfOne those of one
	// namespace: nobody hides those of another one.
	maxProblems, maxProblemsOfOne = 1000, 50
	// maxLabel and maxName bound the value of a label and a name, in bytes, as the API
	// server does for most. Nodes are told both.
	maxLabel, maxName = 63, 253
	// maxAddresses bounds those of one object; a pod has one of each family.
	maxAddresses = 16
	// maxProbePorts bounds the ports of a pod that its kubelet may call: each is a rule.
	maxProbePorts = 64
	// maxServicePorts and maxEndpoints bound one Service: its ports, and how many pairs
	// of port and endpoint it has.
	maxServicePorts, maxEndpoints = 1000, 100_000
	// maxExternal bounds the external addresses of a Service, maxHostPorts the ports of the
	// host of a pod, maxNodeAddresses the addresses of a node.
	maxExternal, maxHostPorts, maxNodeAddresses = 64, 64, 32
	// maxClaims is how many of those that claim an address are named.
	maxClaims = 4
)

// faults are what cannot be read of one field, the first few of them.
type faults struct {
	list []string
	more int
}

func (f *faults) add(format string, args ...any) {
	if len(f.list) == maxFaults {
		f.more++
		return
	}
	f.list = append(f.list, fmt.Sprintf(format, args...))
}

// told is what a person reads.
func (f *faults) told() []string {
	if f.more == 0 {
		return f.list
	}
	return append(f.list, fmt.Sprintf("%d more faults like these", f.more))
}

// problems are what was not understood so far. Of those that differ in the name of the
// object only, the first by name is told; of many in a namespace, those first by text.
type problems struct {
	count int
	of    map[string]map[what]*Problem // by namespace
}

// what is a problem without the object's name.
type what struct{ kind, text string }

func (w what) compare(v what) int {
	return cmp.Or(cmp.Compare(w.kind, v.kind), cmp.Compare(w.text, v.text))
}

func (s *problems) add(f finding) {
	if s.of == nil {
		s.of = make(map[string]map[what]*Problem)
	}
	s.count++
	known := s.of[f.namespace]
	if known == nil {
		known = make(map[what]*Problem)
		s.of[f.namespace] = known
	}
	object := f.kind + " " + f.namespace + "/" + f.name
	p := known[what{f.kind, f.text}]
	if p == nil {
		known[what{f.kind, f.text}] = &Problem{Object: object, Text: f.text}
		if len(known) > 2*maxProblemsOfOne {
			cut(known)
		}
		return
	}
	p.Object, p.More = min(p.Object, object), p.More+1
}

// cut leaves the first by kind and text. What is among the first of all is among the first
// of any part, and so is never cut and comes again with a lower count.
func cut(known map[what]*Problem) {
	if len(known) <= maxProblemsOfOne {
		return
	}
	for _, w := range slices.SortedFunc(maps.Keys(known), what.compare)[maxProblemsOfOne:] {
		delete(known, w)
	}
}

// told are the problems that are told, sorted, and how many are not.
func (s *problems) told() (list []Problem, untold int) {
	for _, known := range s.of {
		cut(known)
		for _, p := range known {
			list = append(list, *p)
		}
	}
	slices.SortFunc(list, Problem.compare)
	list = list[:min(len(list), maxProblems)]
	untold = s.count
	for _, p := range list {
		untold -= 1 + p.More
	}
	return list, untold
}

// labelOf is a label that nodes are told; one that is too long is none.
func labelOf(p *PodObject, key string) string {
	if v := p.Labels[key]; len(v) <= maxLabel {
		return v
	}
	return ""
}

// portsOf are the ports of a Service that are read.
func portsOf(s *corev1.Service) []corev1.ServicePort {
	return s.Spec.Ports[:min(len(s.Spec.Ports), maxServicePorts)]
}

// readLabels are all labels that Build reads, of any kind.
func readLabels() []string {
	return []string{
		LabelMesh, LabelIstio, discoveryv1.LabelServiceName, corev1.LabelTopologyZone, "pod-template-hash",
		"service.istio.io/canonical-name", "app.kubernetes.io/name", "app",
		"service.istio.io/canonical-revision", "app.kubernetes.io/version", "version",
	}
}

// readAnnotations are all annotations that Build reads, policies apart.
func readAnnotations() []string {
	return []string{
		AnnotationExcludeOutbound, AnnotationExcludeInbound, AnnotationLost,
		AnnotationOutboundMode, AnnotationOutboundAllowed, AnnotationAdmitNodes,
	}
}

// keepMeta leaves of metadata what Build reads. A long annotation stays too long.
func keepMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	kept := metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
	}
	for _, key := range readLabels() {
		if v, ok := m.Labels[key]; ok {
			metav1.SetMetaDataLabel(&kept, key, head(v, maxLabel+1))
		}
	}
	for _, key := range readAnnotations() {
		if v, ok := m.Annotations[key]; ok {
			metav1.SetMetaDataAnnotation(&kept, key, head(v, maxAnnotation+1))
		}
	}
	if ref := metav1.GetControllerOfNoCopy(&metav1.ObjectMeta{OwnerReferences: m.OwnerReferences}); ref != nil {
		kept.OwnerReferences = []metav1.OwnerReference{{Kind: head(ref.Kind, maxLabel+1), Name: head(ref.Name, maxName+1), Controller: ref.Controller}}
	}
	return kept
}

// keepLabels leaves of a pod's labels at most one more than are read; selectors of policies
// may name any of them.
func keepLabels(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	keys := slices.Collect(maps.Keys(labels))
	if len(keys) > maxPodLabels {
		slices.SortFunc(keys, func(x, y string) int {
			return cmp.Or(slices.Index(readLabels(), y)-slices.Index(readLabels(), x), cmp.Compare(x, y))
		})
		keys = keys[:maxPodLabels+1]
	}
	kept := make(map[string]string, len(keys))
	for _, k := range keys {
		kept[head(k, 2*maxName)] = head(labels[k], maxLabel+1)
	}
	return kept
}

// keepMesh is keepMeta for an object of which the generation is read.
func keepMesh(m metav1.ObjectMeta) metav1.ObjectMeta {
	kept := keepMeta(m)
	kept.Generation = m.Generation
	return kept
}

// head is the beginning of s, and keeps nothing else of it in memory.
func head(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.Clone(s[:n])
}

// keepCalled keeps of containers what their kubelet calls, and ports of the host, which all
// ports are in the host's network; most have nothing of it.
func keepCalled(list []corev1.Container, hostNetwork bool) (kept []corev1.Container) {
	for _, c := range list {
		var k corev1.Container
		k.StartupProbe, k.ReadinessProbe, k.LivenessProbe = keepProbe(c.StartupProbe), keepProbe(c.ReadinessProbe), keepProbe(c.LivenessProbe)
		if l := c.Lifecycle; l != nil && (l.PostStart != nil || l.PreStop != nil) {
			k.Lifecycle = &corev1.Lifecycle{PostStart: keepHook(l.PostStart), PreStop: keepHook(l.PreStop)}
		}
		called := len(handlers(&k)) > 0
		for _, p := range c.Ports {
			if called || hostNetwork || p.HostPort != 0 {
				k.Ports = append(k.Ports, corev1.ContainerPort{Name: p.Name, ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIP: p.HostIP, Protocol: p.Protocol})
			}
		}
		if called || len(k.Ports) > 0 {
			kept = append(kept, k)
		}
	}
	return kept
}

func keepProbe(p *corev1.Probe) *corev1.Probe {
	if p == nil || p.HTTPGet == nil && p.TCPSocket == nil && p.GRPC == nil {
		return nil
	}
	kept := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: keepHTTP(p.HTTPGet), TCPSocket: keepTCP(p.TCPSocket)}}
	if p.GRPC != nil {
		kept.GRPC = &corev1.GRPCAction{Port: p.GRPC.Port}
	}
	return kept
}

func keepHook(h *corev1.LifecycleHandler) *corev1.LifecycleHandler {
	if h == nil || h.HTTPGet == nil && h.TCPSocket == nil {
		return nil
	}
	return &corev1.LifecycleHandler{HTTPGet: keepHTTP(h.HTTPGet), TCPSocket: keepTCP(h.TCPSocket)}
}

func keepHTTP(h *corev1.HTTPGetAction) *corev1.HTTPGetAction {
	if h == nil {
		return nil
	}
	return &corev1.HTTPGetAction{Host: head(h.Host, 1), Port: h.Port}
}

func keepTCP(h *corev1.TCPSocketAction) *corev1.TCPSocketAction {
	if h == nil {
		return nil
	}
	return &corev1.TCPSocketAction{Host: head(h.Host, 1), Port: h.Port}
}
