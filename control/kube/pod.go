package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/mesh"
)

// readPod says how others see a pod, and what its node has to know of it; nil for what there
// is not. A finished one is left out: its address may already be
// another's. One without a node is nobody's yet.
func (r *reader) readPod(p *PodObject) (*mesh.Workload, *Pod) {
	if !isThere(p) {
		return nil, nil
	}
	id := mesh.ID{
		TrustDomain:    r.cfg.TrustDomain,
		Namespace:      p.Namespace,
		ServiceAccount: cmp.Or(p.Spec.ServiceAccountName, "default"),
	}
	if _, err := mesh.ParseID(id.String()); err != nil {
		r.problem("Pod", p.Namespace, p.Name, "left out: "+err.Error())
		return nil, nil
	}
	w := r.workload(p, id)
	if p.Spec.HostNetwork {
		r.except(p.Namespace, p.Name, HostNetwork)
		if w != nil {
			w.HostPorts = r.hostPorts(p)
		}
		return w, nil
	}
	m := r.enrollment(p, id)
	if w != nil {
		w.ExcludeInbound, w.ExcludeOutbound = m.ExcludeInbound, m.ExcludeOutbound
		w.HostPorts = r.hostPorts(p)
		w.Mode = r.ownMode(p, w.OwnerName, m.Enroll)
	}
	return w, &Pod{Pod: m, Node: p.Spec.NodeName, Workload: w, Shown: shown(p), Ending: p.DeletionTimestamp != nil, Contested: r.isContested(p)}
}

func uidOf(p *PodObject) string { return cmp.Or(string(p.UID), p.Namespace+"/"+p.Name) }

// notUnique tells that a pod has the UID of another one.
func (r *reader) notUnique(p, had Pod) {
	r.problem("Pod", p.Namespace, p.Name, "not enrolled: UID "+p.UID+" is also that of "+had.Namespace+"/"+had.Name)
}

// compare orders pods by UID, and then by name.
func (p Pod) compare(q Pod) int {
	return cmp.Or(cmp.Compare(p.UID, q.UID), cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name, q.Name))
}

func (r *reader) enrollment(p *PodObject, id mesh.ID) mesh.Pod {
	m := mesh.Pod{
		UID:       uidOf(p),
		Namespace: p.Namespace,
		Name:      p.Name,
		ID:        id,
		Enroll:    r.wanted(p),
	}
	var bad []string
	m.ExcludeOutbound, bad = parseOutbound(p.Annotations[AnnotationExcludeOutbound])
	for _, s := range bad {
		r.problem("Pod", p.Namespace, p.Name, "annotation "+AnnotationExcludeOutbound+": "+s)
	}
	m.ExcludeInbound, bad = parsePorts(p.Annotations[AnnotationExcludeInbound])
	for _, s := range bad {
		r.problem("Pod", p.Namespace, p.Name, "annotation "+AnnotationExcludeInbound+": "+s)
	}
	if m.ProbePorts = probePorts(p); len(m.ProbePorts) > maxProbePorts {
		m.ProbePorts = m.ProbePorts[:maxProbePorts]
		r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("more than %d ports of probes: the higher ones are captured, so that probes of them fail", maxProbePorts))
	}
	if m.Enroll && len(m.ExcludeOutbound)+len(m.ExcludeInbound) > 0 {
		r.except(p.Namespace, p.Name, PartlyExcluded)
	}
	return m
}

func (r *reader) workloadUID(kind, namespace, name string) string {
	return r.cfg.Cluster + "/" + kind + "/" + namespace + "/" + name
}

func (r *reader) podUID(p *PodObject) string { return r.workloadUID("/Pod", p.Namespace, p.Name) }

// workload is the pod as the others see it, nil while it has no address.
func (r *reader) workload(p *PodObject, id mesh.ID) *mesh.Workload {
	isAnothers := func(a netip.Addr) bool {
		d, is := r.around.disputed(a)
		return is && d.holder != p
	}
	addrs := slices.DeleteFunc(r.addresses(p), isAnothers)
	if len(addrs) == 0 {
		return nil
	}
	// Those by which services lead to it come first.
	addrs = slices.Concat(addrs, slices.DeleteFunc(r.others(p), isAnothers))
	addrs = addrs[:min(len(addrs), maxAddresses)]
	if len(p.Status.PodIPs) >= maxAddresses {
		r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("more than %d addresses: the others are not read", maxAddresses))
	}
	owner, kind := ownerOf(p)
	return &mesh.Workload{
		UID:         r.podUID(p),
		Namespace:   p.Namespace,
		Name:        p.Name,
		Node:        p.Spec.NodeName,
		Zone:        r.around.zone(p.Spec.NodeName),
		Addresses:   addrs,
		ID:          id,
		HostNetwork: p.Spec.HostNetwork,
		Ready:       isReady(p),
		OwnerName:   owner,
		OwnerKind:   kind,
		CanonicalName: cmp.Or(labelOf(p, "service.istio.io/canonical-name"), labelOf(p, "app.kubernetes.io/name"),
			labelOf(p, "app"), owner),
		CanonicalRevision: cmp.Or(labelOf(p, "service.istio.io/canonical-revision"),
			labelOf(p, "app.kubernetes.io/version"), labelOf(p, "version"), "latest"),
		Cluster: r.cfg.Cluster,
	}
}

func isThere(p *PodObject) bool {
	return p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed && p.Spec.NodeName != ""
}

// addresses are where the pod is reached: of each family as its agent says, or else its
// object, which may still have those of an earlier sandbox.
func (r *reader) addresses(p *PodObject) []netip.Addr {
	all := podAddresses(p)
	told := r.around.told(string(p.UID))
	if len(told) == 0 || p.Spec.HostNetwork {
		return all
	}
	all = slices.DeleteFunc(all, func(a netip.Addr) bool {
		return slices.ContainsFunc(told, func(t netip.Addr) bool { return t.Is4() == a.Is4() })
	})
	return append(slices.Clone(told), all...)
}

// others are further addresses of the pod, as its agent sees them there, in the cluster's ranges.
// Where they are in none, a wrong word would take what is really there from the whole mesh.
func (r *reader) others(p *PodObject) []netip.Addr {
	if p.Spec.HostNetwork {
		return nil
	}
	own := r.addresses(p)
	return slices.DeleteFunc(slices.Clone(r.around.others(string(p.UID))), func(a netip.Addr) bool {
		return slices.Contains(own, a) || !a.IsGlobalUnicast() || !r.around.isOurs(a)
	})
}

func podAddresses(p *PodObject) []netip.Addr {
	texts := []string{p.Status.PodIP}
	for _, ip := range p.Status.PodIPs[:min(len(p.Status.PodIPs), maxAddresses-1)] {
		texts = append(texts, ip.IP)
	}
	return addresses(texts)
}

// addresses reads what are addresses, each once, in order; maxExternal of them, which is
// more than any other list has.
func addresses(texts []string) []netip.Addr {
	var addrs []netip.Addr
	for _, t := range texts[:min(len(texts), maxExternal)] {
		a, err := netip.ParseAddr(t)
		if err == nil && a.Zone() == "" && !slices.Contains(addrs, a.Unmap()) {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// hostPorts are ports of the node that the CNI leads to the pod.
func (r *reader) hostPorts(p *PodObject) (list []mesh.HostPort) {
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, cp := range c.Ports {
			if p.Spec.HostNetwork { // an API server has filled it in
				cp.HostPort, cp.HostIP = cp.ContainerPort, ""
			}
			if !isTCP(cp.Protocol) || !isPort(cp.HostPort) || !isPort(cp.ContainerPort) {
				continue
			}
			if p.Spec.HostNetwork && !r.cfg.NodePorts.Has(uint16(cp.HostPort)) {
				continue // may be anybody's, and is reached like the node's other ports
			}
			if len(list) == maxHostPorts {
				r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("more than %d host ports, the rest are not known", maxHostPorts))
				return list
			}
			a, _ := netip.ParseAddr(cp.HostIP)
			if a.IsUnspecified() {
				a = netip.Addr{}
			}
			list = append(list, mesh.HostPort{Address: a.Unmap().WithZone(""), Port: uint16(cp.HostPort), Target: uint16(cp.ContainerPort)})
		}
	}
	return list
}

func isReady(p *PodObject) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// cronJob is how the CronJob controller names its jobs: with the minute of the schedule.
var cronJob = regexp.MustCompile(`^(.+)-\d{8,}$`)

// ownerOf tells what a pod belongs to, as Istio's metrics name it: the
// Deployment behind the ReplicaSet, the CronJob behind the Job.
func ownerOf(p *PodObject) (name, kind string) {
	ref := metav1.GetControllerOfNoCopy(p)
	if ref == nil || len(ref.Name) > maxName { // the API server takes a longer one
		return p.Name, "pod"
	}
	switch ref.Kind {
	case "ReplicaSet":
		if name, ok := strings.CutSuffix(ref.Name, "-"+p.Labels["pod-template-hash"]); ok {
			return name, "deployment"
		}
	case "Job":
		if m := cronJob.FindStringSubmatch(ref.Name); m != nil {
			return m[1], "cronjob"
		}
		return ref.Name, "job"
	}
	return ref.Name, "pod"
}
