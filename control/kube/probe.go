package kube

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// probePorts are the pod's own ports that its kubelet calls: those of probes and of
// lifecycle hooks, sorted.
func probePorts(p *PodObject) []uint16 {
	var ports []uint16
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, h := range handlers(&c) {
			if port := calledPort(&c, h); port > 0 && port <= 65535 {
				ports = append(ports, uint16(port))
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// handler is what probes and hooks have in common.
type handler struct {
	http *corev1.HTTPGetAction
	tcp  *corev1.TCPSocketAction
	grpc *corev1.GRPCAction
}

func handlers(c *corev1.Container) (all []handler) {
	for _, p := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
		if p != nil {
			all = append(all, handler{p.HTTPGet, p.TCPSocket, p.GRPC})
		}
	}
	if c.Lifecycle == nil {
		return all
	}
	for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
		if h != nil {
			all = append(all, handler{h.HTTPGet, h.TCPSocket, nil})
		}
	}
	return all
}

// calledPort is 0 for what is called elsewhere, or not over the network.
func calledPort(c *corev1.Container, h handler) int32 {
	switch {
	case h.http != nil && h.http.Host == "":
		return numberOf(c, h.http.Port)
	case h.tcp != nil && h.tcp.Host == "":
		return numberOf(c, h.tcp.Port)
	case h.grpc != nil:
		return h.grpc.Port
	}
	return 0
}

// numberOf finds a port by its name among the container's own, as the kubelet does.
func numberOf(c *corev1.Container, port intstr.IntOrString) int32 {
	if port.Type == intstr.Int {
		return port.IntVal
	}
	for _, p := range c.Ports {
		if p.Name == port.StrVal {
			return p.ContainerPort
		}
	}
	return 0
}
