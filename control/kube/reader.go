package kube

import (
	"net/netip"

	"tacit.dev/mesh"
)

// reader reads single objects; it is the one place that says what an object means. Build
// and Builder share it. They differ in how they find out what to read.
type reader struct {
	cfg    BuildConfig
	policy Policy // of the Mesh
	modes  Modes
	around around
	out    sink
}

// around is what other objects, and agents, say: what an object means depends on it.
type around interface {
	// labels are those of a namespace.
	labels(namespace string) map[string]string
	// zone is that of a node.
	zone(node string) string
	// told are the addresses of a pod, by UID, as its agent has them.
	told(uid string) []netip.Addr
	// others are further addresses that its agent sees in it.
	others(uid string) []netip.Addr
	// vouched tells whether a live agent holds the pod captured, as its labels ask.
	vouched(uid string) bool
	// disputed tells whose an address is that several objects claim; is is false for others.
	disputed(a netip.Addr) (d dispute, is bool)
	// pod is a pod by NAMESPACE/NAME, and how the others see it; nil for each that is not.
	pod(name string) (*PodObject, *mesh.Workload)
	// at is who is at an address, if it is a pod, and its object says so, too: an agent's
	// word alone makes no pod an endpoint. Pods of the host's network share an address,
	// which says nothing.
	at(a netip.Addr) *mesh.Workload
	// isOurs tells whether the address is in a range of the cluster's.
	isOurs(a netip.Addr) bool
}

// dispute is whose an address is that several objects claim.
type dispute struct {
	holder *PodObject // nil: no pod's
	// contested: nobody knows.
	contested bool
}

// sink takes what is noticed while an object is read.
type sink interface {
	problem(f finding)
	except(e Exception)
}

// finding is a problem of one object.
type finding struct{ kind, namespace, name, text string }

func (r *reader) problem(kind, namespace, name, text string) {
	r.out.problem(finding{kind, namespace, name, text})
}

func (r *reader) except(namespace, name, reason string) {
	r.out.except(Exception{namespace, name, reason})
}

// quiet reads the same, and tells nobody what it notices: that is told elsewhere.
func (r *reader) quiet() *reader {
	q := *r
	q.out = nowhere{}
	return &q
}

type nowhere struct{}

func (nowhere) problem(finding)  {}
func (nowhere) except(Exception) {}
