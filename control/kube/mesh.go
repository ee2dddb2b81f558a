package kube

import (
	"cmp"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"tacit.dev/mesh"
)

// MeshName is the only Mesh that is heeded.
const MeshName = "default"

// MeshResource is where the kind Mesh is served: deploy/helm/tacit/crd/mesh.yaml.
func MeshResource() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "tacit.dev", Version: "v1alpha1", Resource: "meshes"}
}

// Mesh is the one kind of our own: what holds for the whole cluster, and how far the
// mesh is. Without it the zero MeshSpec holds.
type Mesh struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              MeshSpec   `json:"spec"`
	Status            MeshStatus `json:"status,omitempty"`
}

// Enrollment of pods that have no label, and whose namespace has none.
const (
	// Labeled enrolls those of the listed namespaces. It is the default.
	Labeled = "Labeled"
	// All enrolls every one.
	All = "All"
	// None enrolls nobody, whatever the labels say, and releases all.
	None = "None"
)

// MeshSpec is what people ask for.
type MeshSpec struct {
	Enrollment string `json:"enrollment,omitempty"`
	// Namespaces are enrolled without a label, with Labeled.
	Namespaces []string `json:"namespaces,omitempty"`
	// NamespaceSelector selects more of them by their labels. nil is none, an empty one all.
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	// TrustDomain is what control's has to be. It changes nothing: identities
	// and the CA are made for the one that control was started with.
	TrustDomain string `json:"trustDomain,omitempty"`
	// Revoked are identities that count no more: spiffe://..., or NAMESPACE/SERVICE-ACCOUNT.
	Revoked []string `json:"revoked,omitempty"`
	// MaxConnectionAge is how old a connection between pods of the mesh may become. "" is any age.
	MaxConnectionAge string `json:"maxConnectionAge,omitempty"`
	// Mode is whether pods of the mesh take plaintext. PeerAuthentications say more.
	Mode string `json:"mode,omitempty"`
	// Outbound is whether they send it.
	Outbound *MeshOutbound `json:"outbound,omitempty"`
	// Exceptions are plaintext that pods take all the same.
	Exceptions []MeshException `json:"exceptions,omitempty"`
}

// Modes of plaintext.
const (
	// PermissiveMode lets plaintext pass. It is the default.
	PermissiveMode = "Permissive"
	// StrictMode refuses it.
	StrictMode = "Strict"
)

// Addresses outside of the cluster, if outbound is strict.
const (
	// OutsideAll: plaintext may go to all of them. It is the default.
	OutsideAll = "All"
	// OutsideListed: it may go to those that are allowed.
	OutsideListed = "Listed"
)

// MeshOutbound is whether plaintext leaves pods of the mesh.
type MeshOutbound struct {
	Mode    string `json:"mode,omitempty"`
	Outside string `json:"outside,omitempty"`
	// Allowed are destinations, in the cluster or outside of it, to which plaintext may go all the same.
	Allowed []string `json:"allowed,omitempty"`
}

// MeshException is plaintext that some pods take all the same.
type MeshException struct {
	Namespace string `json:"namespace"`
	// Workload is the name of their Deployment, or what else they belong to; Selector has labels of
	// theirs. Without both it is every pod of the namespace.
	Workload string            `json:"workload,omitempty"`
	Selector map[string]string `json:"selector,omitempty"`
	Ports    []int32           `json:"ports"`
	// From are addresses and ranges that it comes from. None means the addresses of nodes.
	From []string `json:"from,omitempty"`
}

// MeshStatus is what control answers.
type MeshStatus struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	TrustDomain        string             `json:"trustDomain,omitempty"`
	Mode               string             `json:"mode,omitempty"`
	OutboundMode       string             `json:"outboundMode,omitempty"`
	Pods               PodCounts          `json:"pods"`
	Nodes              NodeCounts         `json:"nodes"`
	Waiting            []WaitedNode       `json:"waiting,omitempty"`
	Behind             []BehindNode       `json:"behind,omitempty"`
	Lost               []string           `json:"lost,omitempty"`
	Exceptions         []ExceptionCount   `json:"exceptions,omitempty"`
	Unprotected        []UnprotectedPod   `json:"unprotected,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// PodCounts counts pods; see the schema.
type PodCounts struct {
	Enrolled    int32 `json:"enrolled"`
	Protected   int32 `json:"protected"`
	Unprotected int32 `json:"unprotected"`
	Leaving     int32 `json:"leaving"`
	Exceptions  int32 `json:"exceptions"`
}

// NodeCounts counts nodes: Ready are those whose agent and proxy are connected.
type NodeCounts struct {
	Ready int32 `json:"ready"`
	Total int32 `json:"total"`
}

// WaitedNode is a node for which a withdrawal waits, and since when.
type WaitedNode struct {
	Node  string      `json:"node"`
	Since metav1.Time `json:"since"`
	// Connected: its proxy is, and has not acknowledged.
	Connected bool `json:"connected"`
}

// BehindNode is a node that may still act on something older than what was told last: a policy, a
// pod, a revoked identity.
type BehindNode struct {
	Node string `json:"node"`
	// Since is when it was seen to be so, with that version.
	Since metav1.Time `json:"since"`
	// Connected: its proxy is, and has not acknowledged.
	Connected bool `json:"connected"`
	// Version is what it has acknowledged last, 0 for nothing since this control leads.
	Version uint64 `json:"version,omitempty"`
}

// ExceptionCount is how many pods are left out for a reason, and the first of them.
type ExceptionCount struct {
	Reason string   `json:"reason"`
	Count  int32    `json:"count"`
	Pods   []string `json:"pods,omitempty"`
}

// UnprotectedPod is an enrolled pod that is not protected, and why.
type UnprotectedPod struct {
	Pod    string `json:"pod"`
	Reason string `json:"reason,omitempty"`
}

// MostListed bounds each list of pods, or nodes, in a status, but for mostLost nodes that are lost.
const MostListed, mostLost = 20, 500

// Conditions of a Mesh.
const (
	// MeshReady: control leads and serves, and understands the spec.
	MeshReady = "Ready"
	// MeshProtected: there are enrolled pods, and all are protected.
	MeshProtected = "Protected"
)

// Policy is what a Mesh asks for, as it was understood.
type Policy struct {
	Enrollment string
	Namespaces map[string]bool
	// Selector is of more namespaces; nil is none.
	Selector labels.Selector
	Trust    mesh.Trust
}

// enrollsLike tells whether both enroll the same pods.
func (p Policy) enrollsLike(q Policy) bool {
	return p.Enrollment == q.Enrollment && maps.Equal(p.Namespaces, q.Namespaces) && reflect.DeepEqual(p.Selector, q.Selector)
}

// wants tells whether pods of a namespace are enrolled if no label says otherwise.
func (p Policy) wants(namespace string, has map[string]string) bool {
	listed := p.Namespaces[namespace] || p.Selector != nil && p.Selector.Matches(labels.Set(has))
	return p.Enrollment == All || p.Enrollment != None && listed
}

// MeshFacts is what the objects say of the Mesh.
type MeshFacts struct {
	// Found: there is one.
	Found      bool
	Generation int64
	// Shown is its status as it is.
	Shown MeshStatus
	// Faults are what in its spec is not heeded.
	Faults []string
	// Policy holds: what the spec says or, where it cannot be understood, what
	// it said before.
	Policy Policy
	// Modes hold as Policy does.
	Modes Modes
	// Effective is the mode of the whole mesh, after PeerAuthentications.
	Effective mesh.Mode
}

var namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// mesh reads the Mesh. Whatever in it cannot be understood changes nothing.
func (r *reader) mesh(list []*Mesh) MeshFacts {
	f := MeshFacts{}
	for _, m := range list {
		if m.Name != MeshName {
			r.problem("Mesh", "", m.Name, "not heeded: only the one named "+MeshName+" is")
			continue
		}
		f.Found, f.Generation, f.Shown = true, m.Generation, m.Status
		f.Policy, f.Modes, f.Faults = r.understand(m.Spec)
	}
	for _, fault := range f.Faults {
		r.problem("Mesh", "", MeshName, fault)
	}
	return f
}

func (r *reader) understand(s MeshSpec) (p Policy, m Modes, told []string) {
	var f faults
	m = r.understandModes(s, &f)
	p = Policy{Enrollment: s.Enrollment, Namespaces: make(map[string]bool)}
	if !slices.Contains([]string{"", Labeled, All, None}, s.Enrollment) {
		f.add("enrollment %.80q: want %s, %s or %s; what held before holds", s.Enrollment, Labeled, All, None)
		p = r.cfg.Before
	}
	if (len(s.Namespaces) > 0 || s.NamespaceSelector != nil) && s.Enrollment == All {
		f.add("namespaces: say nothing with enrollment %s", s.Enrollment)
	}
	if selector, err := metav1.LabelSelectorAsSelector(s.NamespaceSelector); err != nil {
		f.add("namespaceSelector: %.255v; what held before holds", err)
		p.Selector = r.cfg.Before.Selector
	} else if s.NamespaceSelector != nil && p.Enrollment == s.Enrollment {
		p.Selector = selector
	}
	for _, n := range s.Namespaces {
		switch {
		case !namespaceName.MatchString(n):
			f.add("namespace %.80q: is no name of one", n)
		case r.system(n):
			f.add("namespace %s: is never enrolled", n)
		case p.Enrollment == s.Enrollment:
			p.Namespaces[n] = true
		}
	}
	if s.TrustDomain != "" && s.TrustDomain != r.cfg.TrustDomain {
		f.add("trustDomain %.255q: control was started with %s: say that here, or start it with the other, and a CA made for it", s.TrustDomain, r.cfg.TrustDomain)
	}
	p.Trust = r.trust(s, &f)
	return p, m, f.told()
}

// system tells whether a namespace is never enrolled: what starts the cluster, and
// what starts the mesh, must not wait for the mesh.
func (r *reader) system(namespace string) bool {
	return namespace == metav1.NamespaceSystem || namespace == r.cfg.Namespace
}

// Exception is a pod that is left out, wholly or partly.
type Exception struct {
	Namespace, Name string
	Reason          string
}

// Reasons of exceptions.
const (
	// HostNetwork pods share the addresses of their node.
	HostNetwork = "HostNetwork"
	// SystemNamespace is kube-system, or Tacit's own.
	SystemNamespace = "SystemNamespace"
	// OptedOut by a label of the pod's own.
	OptedOut = "OptedOut"
	// PartlyExcluded by annotations.
	PartlyExcluded = "PartlyExcluded"
	// PlaintextAllowed by annotations, or an exception of the Mesh, although the mode may be strict.
	PlaintextAllowed = "PlaintextAllowed"
)

func (e Exception) compare(f Exception) int {
	return cmp.Or(cmp.Compare(e.Namespace, f.Namespace), cmp.Compare(e.Name, f.Name), cmp.Compare(e.Reason, f.Reason))
}

// Count is the exceptions as a status shows them.
func Count(list []Exception) []ExceptionCount {
	byReason := make(map[string]*ExceptionCount)
	for _, e := range list { // sorted
		c := byReason[e.Reason]
		if c == nil {
			c = &ExceptionCount{Reason: e.Reason}
			byReason[e.Reason] = c
		}
		if c.Count++; len(c.Pods) < MostListed {
			c.Pods = append(c.Pods, e.Namespace+"/"+e.Name)
		}
	}
	var counts []ExceptionCount
	for _, c := range byReason {
		counts = append(counts, *c)
	}
	slices.SortFunc(counts, func(x, y ExceptionCount) int { return strings.Compare(x.Reason, y.Reason) })
	return counts
}
