package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"tacit.dev/mesh"
)

// Bounds of what is read of PeerAuthentications.
const (
	// maxPeerPorts bounds the ports of one.
	maxPeerPorts = 256
	// maxPeers bounds those of one namespace. Beyond it the namespace is strict.
	maxPeers = 500
)

// PeerResources are where the kind PeerAuthentication is served, the version that is preferred
// first: deploy/helm/tacit/crd/peerauthentication.yaml, or Istio's own.
func PeerResources() []schema.GroupVersionResource {
	at := schema.GroupResource{Group: "security.istio.io", Resource: "peerauthentications"}
	return []schema.GroupVersionResource{at.WithVersion("v1"), at.WithVersion("v1beta1")}
}

// PeerKind is the kind of a PeerAuthentication.
const PeerKind = "PeerAuthentication"

// PeerAuthentication is Istio's kind: whether pods take plaintext. Its spec stays as it came, as
// that of an AuthorizationPolicy does.
type PeerAuthentication struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec,omitempty"`
	Status            PolicyStatus    `json:"status,omitempty"`
}

// peerSpec is what a spec says: the fields of Istio's, and no others.
type peerSpec struct {
	Selector *struct {
		MatchLabels map[string]string `json:"matchLabels"`
	} `json:"selector"`
	MTLS  *peerMTLS           `json:"mtls"`
	Ports map[string]peerMTLS `json:"portLevelMtls"`
}

type peerMTLS struct {
	Mode string `json:"mode"`
}

// keepPeer leaves of a PeerAuthentication what is read of it.
func keepPeer(p *PeerAuthentication) *PeerAuthentication {
	kept := &PeerAuthentication{ObjectMeta: keepMesh(p.ObjectMeta), Spec: p.Spec, Status: p.Status}
	if len(p.Spec) > maxPolicySpec {
		kept.Spec = json.RawMessage(tooLong)
	}
	return kept
}

// peerRead is what a PeerAuthentication comes to.
type peerRead struct {
	// labels are those of the pods that it is for; nil for the whole namespace.
	labels  map[string]string
	inbound mesh.Level
	ports   []mesh.PortLevel
	// ignored: it is for nobody.
	ignored bool
	faults  []Fault
}

// readPeer reads a PeerAuthentication. It is pure. What of it is not understood is strict, for all
// who may be meant.
func (r *reader) readPeer(p *PeerAuthentication) (t peerRead) {
	var spec, loose peerSpec
	err := decodeStrictly(orEmpty(p.Spec), &spec)
	if err != nil && json.Unmarshal(p.Spec, &loose) != nil {
		loose = peerSpec{}
	}
	if err != nil {
		t.note("spec", Invalid, Denies, err.Error()+", so that plaintext is refused", "correct or remove it: kubectl explain peerauthentication.spec")
		spec = peerSpec{Selector: loose.Selector, MTLS: &peerMTLS{"STRICT"}}
	}
	t.selector(&spec)
	if t.labels != nil && p.Namespace == r.cfg.RootNamespace {
		t.note("spec.selector", Unsupported, Ignored, "a PeerAuthentication of the root namespace "+p.Namespace+" has no selector, in Istio as here", "put it into the namespace of the pods")
		t.ignored = true
		return t
	}
	if spec.MTLS != nil {
		t.inbound = t.level("spec.mtls.mode", spec.MTLS.Mode)
	}
	t.portLevels(&spec)
	return t
}

func (t *peerRead) note(path, reason string, effect Effect, text, remedy string) {
	if len(t.faults) < maxPolicyFaults {
		t.faults = append(t.faults, Fault{path, reason, effect, text, remedy})
	}
}

// selector: one without labels is none, as in Istio.
func (t *peerRead) selector(s *peerSpec) {
	if s.Selector == nil || len(s.Selector.MatchLabels) == 0 {
		return
	}
	if n := len(s.Selector.MatchLabels); n > maxPodLabels {
		t.note("spec.selector.matchLabels", TooMuch, Denies, fmt.Sprintf("%d labels: want at most %d. Plaintext is refused in the whole namespace", n, maxPodLabels), "use fewer labels")
		s.MTLS, s.Ports = &peerMTLS{"STRICT"}, nil
		return
	}
	t.labels = s.Selector.MatchLabels
}

func (t *peerRead) level(path, mode string) mesh.Level {
	switch mode {
	case "", "UNSET":
		return mesh.Inherited
	case "PERMISSIVE":
		return mesh.Permissive
	case "DISABLE":
		t.note(path, Unsupported, Ignored, "DISABLE does not turn mutual TLS off within the mesh; it is taken for PERMISSIVE", "use PERMISSIVE, or the annotation "+AnnotationExcludeInbound)
		return mesh.Permissive
	case "STRICT":
		return mesh.Strict
	}
	t.note(path, Invalid, Denies, fmt.Sprintf("%.80q is not a mode, so that plaintext is refused", mode), "use STRICT, PERMISSIVE, DISABLE or UNSET")
	return mesh.Strict
}

// portLevels reads what differs at single ports. Without a selector Istio ignores them.
func (t *peerRead) portLevels(s *peerSpec) {
	if len(s.Ports) > 0 && t.labels == nil {
		t.note("spec.portLevelMtls", Unsupported, Ignored, "ports count only together with a selector, in Istio as here", "add a selector, or remove the ports")
		return
	}
	if len(s.Ports) > maxPeerPorts {
		t.note("spec.portLevelMtls", TooMuch, Denies, fmt.Sprintf("%d ports: want at most %d. Plaintext is refused at all of them", len(s.Ports), maxPeerPorts), "use fewer ports")
		t.inbound = mesh.Strict
		return
	}
	for _, text := range slices.Sorted(maps.Keys(s.Ports)) {
		path := fmt.Sprintf("spec.portLevelMtls[%.20s]", text)
		level := t.level(path+".mode", s.Ports[text].Mode)
		port, ok := parsePort(text)
		switch {
		case ok && level != mesh.Inherited:
			t.ports = append(t.ports, mesh.PortLevel{Port: port, Level: level})
		case ok:
		case level == mesh.Strict: // at which port is not known
			t.note(path, Invalid, Denies, fmt.Sprintf("%.20q is not a port, so that plaintext is refused at all of them", text), "use the port of the container, 1 to 65535")
			t.inbound = mesh.Strict
		default:
			t.note(path, Invalid, Ignored, fmt.Sprintf("%.20q is not a port", text), "use the port of the container, 1 to 65535")
		}
	}
	slices.SortFunc(t.ports, func(a, b mesh.PortLevel) int { return cmp.Compare(a.Port, b.Port) })
}

// CheckPeer tells what of a PeerAuthentication is not enforced as it stands there.
func CheckPeer(p *PeerAuthentication, cfg BuildConfig) []Fault {
	r := reader{cfg: cfg.withDefaults()}
	return r.readPeer(p).faults
}

// olderPeer orders by age, as Istio does: of two that are for the same pods the older one counts.
// It has no order for two of one second; here the name decides.
func olderPeer(p, q *PeerAuthentication) int {
	if c := p.CreationTimestamp.Time.Compare(q.CreationTimestamp.Time); c != 0 {
		return c
	}
	return cmp.Compare(p.Name, q.Name)
}

// peerState is one PeerAuthentication, and what it comes to.
type peerState struct {
	object *PeerAuthentication
	read   peerRead
}

// peers are those of a namespace.
type peers struct {
	// broad is the one without a selector that counts, nil for none; selecting have one, the oldest
	// first.
	broad     *peerState
	selecting []*peerState
	// all are they and those that do not count, by age.
	all []*peerState
	// tooMany: nobody knows what those say that are not read.
	tooMany bool
}

// readPeers reads all that are of one namespace.
func (r *reader) readPeers(list []*PeerAuthentication) (x peers) {
	list = slices.SortedFunc(slices.Values(list), olderPeer)
	x.tooMany = len(list) > maxPeers
	for _, o := range list[:min(len(list), maxPeers)] {
		s := &peerState{o, r.readPeer(o)}
		x.all = append(x.all, s)
		switch {
		case s.read.ignored:
		case s.read.labels != nil:
			x.selecting = append(x.selecting, s)
		case x.broad == nil:
			x.broad = s
		}
	}
	return x
}

// inbound is what those without a selector say.
func (x *peers) inbound() mesh.Level {
	switch {
	case x.tooMany:
		return mesh.Strict
	case x.broad == nil:
		return mesh.Inherited
	}
	return x.broad.read.inbound
}

// of is the one with a selector that counts for pods with these labels, nil for none.
func (x *peers) of(labels map[string]string) *peerRead {
	if len(labels) > maxPodLabels && len(x.selecting) > 0 { // not all of them are known
		return &peerRead{inbound: mesh.Strict}
	}
	for _, s := range x.selecting {
		if hasAll(labels, s.read.labels) {
			return &s.read
		}
	}
	return nil
}

// sameSelecting tells whether both say the same of single workloads.
func (x *peers) sameSelecting(y *peers) bool {
	return slices.EqualFunc(x.selecting, y.selecting, func(a, b *peerState) bool {
		return a.read.inbound == b.read.inbound && slices.Equal(a.read.ports, b.read.ports) && maps.Equal(a.read.labels, b.read.labels)
	})
}
