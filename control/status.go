package control

// Status is what /dump/status serves as JSON, for `tacit lab status`.
type Status struct {
	TrustDomain string       `json:"trustDomain"`
	Pods        []PodStatus  `json:"pods"`
	Nodes       []NodeStatus `json:"nodes"`
	// Problems are things in objects that were not understood.
	Problems []string `json:"problems"`
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
	// Direct: announced, so that the others dial it by direct.
	Direct bool `json:"direct"`
	// State is a state of the enrolment: outside, enrolling, announced,
	// withdrawing, releasing.
	State string `json:"state"`
	// Reason is why the agent says it is not captured, "" if it did not say.
	Reason string `json:"reason,omitempty"`
	// Waiting names the nodes that have not acknowledged its withdrawal.
	Waiting []string `json:"waiting,omitempty"`
}

// NodeStatus is one node that has proved itself, or has pods.
type NodeStatus struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
}
