package proxy

import (
	"slices"
	"strings"
	"time"
)

// PodStatus tells of one pod, for /dump/pods and tacit status.
type PodStatus struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Identity  string `json:"identity"`
	// State is starting, serving, draining or drained.
	State string `json:"state"`
	// Expiry is when the certificate ends; zero if there is none.
	Expiry time.Time `json:"expiry,omitzero"`
	// CertificateError says why there is none that is valid.
	CertificateError string `json:"certificate_error,omitempty"`
	// Connections are by kind: mutual_tls, plaintext (with the cluster),
	// outside (of the cluster), within (the pod).
	Connections map[string]ConnectionCount `json:"connections"`
	// Refused counts the connections that were reset before a byte went through.
	Refused int64 `json:"refused"`
	// Sockets says how many of the agent's wait ready.
	Sockets int `json:"sockets"`
}

// ConnectionCount counts connections of one kind.
type ConnectionCount struct {
	Open  int64 `json:"open"`
	Total int64 `json:"total"`
}

// Pods tells of all pods, sorted by namespace and name.
func (p *Proxy) Pods() []PodStatus {
	all := make([]PodStatus, 0)
	for _, d := range p.list() {
		all = append(all, d.status())
	}
	slices.SortFunc(all, func(a, b PodStatus) int {
		return strings.Compare(a.Namespace+"/"+a.Name+"/"+a.UID, b.Namespace+"/"+b.Name+"/"+b.UID)
	})
	return all
}

func (d *pod) status() PodStatus {
	f := d.facts.Load()
	s := PodStatus{
		UID: d.uid, Namespace: f.namespace, Name: f.name, Identity: d.id.String(),
		State:       string(d.stateNow()),
		Connections: make(map[string]ConnectionCount, kinds),
		Refused:     d.counts.refused.Load(),
		Sockets:     d.sockets4.ready() + d.sockets6.ready(),
	}
	if leaf, err := d.p.cfg.Leaves.Leaf(d.id); err != nil {
		s.CertificateError = err.Error()
	} else {
		s.Expiry = leaf.NotAfter
	}
	for k := range kinds {
		s.Connections[k.String()] = ConnectionCount{d.counts.of[k].now.Load(), d.counts.of[k].total.Load()}
	}
	return s
}

func (d *pod) stateNow() podState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// podsIn counts the pods in a state.
func (p *Proxy) podsIn(s podState) (n int) {
	for _, d := range p.list() {
		if d.stateNow() == s {
			n++
		}
	}
	return n
}
