package kube

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// ConditionProtected is what a pod of the mesh shows: True if it is captured, and
// the others reach it by mutual TLS.
const ConditionProtected = "tacit.dev/Protected"

// TaintNotReady keeps pods away from a node until its agent is there. Who starts
// nodes sets it, control removes it.
const TaintNotReady = "tacit.dev/agent-not-ready"

// AnnotationLost says of a node that it is lost: nothing waits for it. `tacit node forget`
// sets it, to the time, and control removes it when the node connects.
const AnnotationLost = "tacit.dev/lost"

// Condition is the condition ConditionProtected of a pod, as it is or as it should
// be. The zero value means that there is none.
type Condition struct {
	Status, Reason, Message string
	// Since is when Status became so.
	Since time.Time
}

// Reasons of the condition.
const (
	// Captured: protected.
	Captured = "Captured"
	// PartlyProtected: captured, and some of what it would send is refused.
	PartlyProtected = "PartlyProtected"
	// Enrolling: its agent has not captured it yet.
	Enrolling = "Enrolling"
	// NotCaptured: its agent cannot capture it, and says why.
	NotCaptured = "NotCaptured"
	// Leaving: about to be released.
	Leaving = "Leaving"
	// Contested: other objects claim its address.
	Contested = "ContestedAddress"
	// AgentAway: nobody knows.
	AgentAway = "AgentAway"
)

// Same tells whether both say the same, whenever they began to.
func (c Condition) Same(d Condition) bool {
	return c.Status == d.Status && c.Reason == d.Reason && c.Message == d.Message
}

// shown is the condition that a pod has.
func shown(p *PodObject) Condition {
	for _, c := range p.Status.Conditions {
		if c.Type == ConditionProtected {
			return Condition{string(c.Status), c.Reason, c.Message, c.LastTransitionTime.Time}
		}
	}
	return Condition{}
}

// Node is a node of the cluster.
type Node struct {
	Name string
	// Taints are read only.
	Taints []corev1.Taint
	// Lost is AnnotationLost.
	Lost string
}

// Tainted tells whether the node has TaintNotReady.
func (n Node) Tainted() bool { return slices.ContainsFunc(n.Taints, isNotReady) }

func isNotReady(t corev1.Taint) bool { return t.Key == TaintNotReady }

func nodeOf(n *corev1.Node) Node {
	return Node{Name: n.Name, Taints: slices.Clone(n.Spec.Taints), Lost: n.Annotations[AnnotationLost]}
}
