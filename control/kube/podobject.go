package kube

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PodObject is what Build reads of a pod. A corev1.Pod takes three times its memory before it
// holds anything, and control has one for each pod of the cluster.
type PodObject struct {
	metav1.ObjectMeta
	Spec   podSpec
	Status podStatus
}

// podSpec and podStatus have fields of corev1.PodSpec and corev1.PodStatus.
type podSpec struct {
	NodeName, ServiceAccountName string
	HostNetwork                  bool
	InitContainers, Containers   []corev1.Container
}

type podStatus struct {
	Phase      corev1.PodPhase
	StartTime  *metav1.Time
	PodIP      string
	PodIPs     []corev1.PodIP
	Conditions []corev1.PodCondition
}

// KeepPod leaves of a pod what Build reads.
func KeepPod(p *corev1.Pod) *PodObject {
	kept := &PodObject{
		ObjectMeta: keepMeta(p.ObjectMeta),
		Spec: podSpec{
			NodeName: p.Spec.NodeName, ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork,
			InitContainers: keepCalled(p.Spec.InitContainers, p.Spec.HostNetwork), Containers: keepCalled(p.Spec.Containers, p.Spec.HostNetwork),
		},
		Status: podStatus{Phase: p.Status.Phase, StartTime: p.Status.StartTime, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs},
	}
	kept.Labels = keepLabels(p.Labels)
	for _, c := range p.Status.Conditions {
		switch c.Type {
		case corev1.PodReady:
			kept.Status.Conditions = append(kept.Status.Conditions, corev1.PodCondition{Type: c.Type, Status: c.Status})
		case ConditionProtected:
			kept.Status.Conditions = append(kept.Status.Conditions, c)
		}
	}
	return kept
}
