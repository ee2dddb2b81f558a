package control

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"tacit.dev/wire/xds"
)

// Status is what /dump/status serves as JSON, for `tacit lab status`.
type Status struct {
	TrustDomain string `json:"trustDomain"`
	// Pods are ordered by UID.
	Pods  []PodStatus  `json:"pods"`
	Nodes []NodeStatus `json:"nodes"`
	// Problems are things in objects that were not understood, at most some hundred;
	// the last one says how many more there are.
	Problems []string `json:"problems"`
	// Contested counts addresses that several objects claim.
	Contested int `json:"contested,omitempty"`
	// Leader is the address of the process that leads, "" if this one does or none.
	Leader string `json:"leader,omitempty"`
}

// PodStatus is one pod that a node has to know.
type PodStatus struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Node      string `json:"node"`
	Identity  string `json:"identity"`
	// Addresses of the pod, as text.
	Addresses []string `json:"addresses"`
	// Wanted is what the labels ask for, Enrolled what the node was told.
	Wanted   bool `json:"wanted"`
	Enrolled bool `json:"enrolled"`
	// Captured is what the node's agent said last.
	Captured bool `json:"captured"`
	// Unprotected: enrolled, and the agent says that it is not captured.
	Unprotected bool `json:"unprotected"`
	// Direct: announced, so that the others dial it by direct.
	Direct bool `json:"direct"`
	// State of the enrollment, and since when.
	State State     `json:"state"`
	Since time.Time `json:"since"`
	// Reason is why a pod that should be captured is not: what its agent says, or what is
	// waited for. Of a captured one, why it is only partly protected; "" if it is wholly.
	Reason string `json:"reason,omitempty"`
	// Waiting names the nodes that have not acknowledged its withdrawal.
	Waiting []string `json:"waiting,omitempty"`

	withdrawn uint64
}

// NodeStatus is one node that has proved itself lately.
type NodeStatus struct {
	Name string `json:"name"`
	// Proxy and Agent tell whether each is connected.
	Proxy bool `json:"proxy"`
	Agent bool `json:"agent"`
	// Behind: the proxy has not acknowledged the last publication yet.
	Behind bool `json:"behind"`
	// Version is the publication that it has acknowledged last.
	Version uint64 `json:"version"`
	// Rejected is the last refusal of something that it was told, "" if none stands.
	Rejected string `json:"rejected,omitempty"`
}

// status is what the roster knows. It costs as much as there is.
func (r *roster) status(f facts, trustDomain string) *Status {
	s := &Status{TrustDomain: trustDomain, Pods: []PodStatus{}, Nodes: []NodeStatus{}, Problems: []string{}, Contested: f.contested}
	for _, e := range slices.SortedFunc(maps.Values(r.pods), byUID) {
		s.Pods = append(s.Pods, e.status())
	}
	for _, p := range f.problems {
		s.Problems = append(s.Problems, p.String())
	}
	if f.untold > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d more problems", f.untold))
	}
	return s
}

func (e *enrollment) status() PodStatus {
	p := PodStatus{
		UID: e.pod.UID, Namespace: e.pod.Namespace, Name: e.pod.Name, Node: e.pod.Node, Identity: e.pod.ID.String(),
		Addresses: []string{}, Wanted: e.pod.Enroll, Enrolled: e.state.enroll(), Captured: e.word == captured || e.word == stale,
		Unprotected: e.state.enroll() && e.word == free, Direct: e.direct(),
		State: e.state, Since: e.since, Reason: e.reason, withdrawn: e.withdrawn,
	}
	if e.pod.Workload != nil {
		for _, a := range e.pod.Workload.Addresses {
			p.Addresses = append(p.Addresses, a.String())
		}
	}
	return p
}

// complete adds what the server knows at this moment. It leaves s as it is.
func (s Status) complete(server *xds.Server) Status {
	agents, nodes := make(map[string]bool), []NodeStatus{}
	for _, n := range server.Nodes() {
		agents[n.Node] = n.Agent
		nodes = append(nodes, NodeStatus{Name: n.Node, Proxy: n.Proxy, Agent: n.Agent, Behind: n.Behind, Version: n.Acked, Rejected: n.Rejected})
	}
	pods := make([]PodStatus, len(s.Pods))
	for i, p := range s.Pods {
		if p.Enrolled && !p.Captured && p.Reason == "" {
			p.Reason = fmt.Sprintf("the agent of node %s has not captured it yet", p.Node)
			if !agents[p.Node] {
				p.Reason = fmt.Sprintf("the agent of node %s is not connected", p.Node)
			}
		}
		if p.State == Withdrawing && p.withdrawn != 0 {
			p.Waiting = server.Acked(p.withdrawn)
		}
		pods[i] = p
	}
	s.Pods, s.Nodes = pods, nodes
	return s
}
