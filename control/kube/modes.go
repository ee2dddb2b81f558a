package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/mesh"
)

// What users write on pods and, but for the last, on namespaces.
const (
	// AnnotationOutboundMode says Permissive or Strict: whether plaintext may leave.
	AnnotationOutboundMode = "tacit.dev/outbound-mode"
	// AnnotationOutboundAllowed lists where plaintext may go all the same, as
	// AnnotationExcludeOutbound does.
	AnnotationOutboundAllowed = "tacit.dev/outbound-allowed"
	// AnnotationAdmitNodes lists ports at which plaintext from nodes is let in all the same.
	AnnotationAdmitNodes = "tacit.dev/admit-nodes"
)

// Names of the policies that carry modes. No object can have either.
const (
	meshMode      = "_mesh-mode"
	namespaceMode = "_mode"
)

// Bounds of what a Mesh says of plaintext.
const maxMeshAllowed, maxMeshExceptions = 256, 100

// Modes is what a Mesh asks for, of plaintext, as it was understood.
type Modes struct {
	// Mesh is that of the whole mesh, PeerAuthentications apart.
	Mesh       mesh.Mode
	Exceptions []Admitted
}

// Admitted is plaintext that some pods let in, although they are strict.
type Admitted struct {
	Namespace, Workload string
	Selector            map[string]string
	Admit               []mesh.Admission
}

func (a *Admitted) isFor(p *PodObject, workload string) bool {
	return a.Namespace == p.Namespace && (a.Workload == "" || a.Workload == workload) && hasAll(p.Labels, a.Selector)
}

func hasAll(labels, want map[string]string) bool {
	for k, v := range want {
		if is, ok := labels[k]; !ok || is != v {
			return false
		}
	}
	return true
}

// understandModes: what cannot be understood is as it was before; if nobody knows how that was, it
// is strict.
func (r *reader) understandModes(s MeshSpec, f *faults) (m Modes) {
	before := Modes{Mesh: *mesh.StrictMode()}
	if r.cfg.BeforeModes != nil {
		before = *r.cfg.BeforeModes
	}
	level := func(field, text string, before mesh.Level) mesh.Level {
		l, ok := parseLevel(text)
		if !ok {
			f.add("%s %.80q: want %s or %s; what held before holds", field, text, PermissiveMode, StrictMode)
			return before
		}
		return l
	}
	m.Mesh.Inbound = level("mode", s.Mode, before.Mesh.Inbound)
	if o := s.Outbound; o != nil {
		m.Mesh.Outbound = level("outbound.mode", o.Mode, before.Mesh.Outbound)
		switch o.Outside {
		case "", OutsideAll:
		case OutsideListed:
			m.Mesh.Outside = mesh.Strict
		default:
			f.add("outbound.outside %.80q: want %s or %s; what held before holds", o.Outside, OutsideAll, OutsideListed)
			m.Mesh.Outside = before.Mesh.Outside
		}
		m.Mesh.Allowed = readAllowed(o.Allowed, f)
	}
	if len(s.Exceptions) > maxMeshExceptions {
		f.add("%d exceptions: those after the first %d are not heeded", len(s.Exceptions), maxMeshExceptions)
	}
	for i, e := range s.Exceptions[:min(len(s.Exceptions), maxMeshExceptions)] {
		if a, err := readException(e); err != nil {
			f.add("exceptions[%d]: %v; it is not heeded", i, err)
		} else {
			m.Exceptions = append(m.Exceptions, a)
		}
	}
	return m
}

func parseLevel(text string) (l mesh.Level, ok bool) {
	switch text {
	case "":
		return mesh.Inherited, true
	case PermissiveMode:
		return mesh.Permissive, true
	case StrictMode:
		return mesh.Strict, true
	}
	return mesh.Strict, false
}

func readAllowed(list []string, f *faults) (all []mesh.Exclusion) {
	if len(list) > maxMeshAllowed {
		f.add("outbound.allowed: %d destinations: those after the first %d are not heeded", len(list), maxMeshAllowed)
	}
	for _, text := range list[:min(len(list), maxMeshAllowed)] {
		e, ok := parseExclusion(text)
		if !ok {
			f.add("outbound.allowed %.80q: want ADDRESS, PREFIX, PORT, ADDRESS:PORT or [PREFIX]:PORT; it is not heeded", text)
			continue
		}
		all = append(all, e)
	}
	return all
}

func readException(e MeshException) (a Admitted, err error) {
	a = Admitted{Namespace: e.Namespace, Workload: e.Workload, Selector: e.Selector}
	if !namespaceName.MatchString(e.Namespace) || len(e.Workload) > maxName || len(e.Selector) > maxPodLabels {
		return a, fmt.Errorf("namespace %.80q, workload %.80q and %d labels: want the name of a namespace, and no more than %d labels", e.Namespace, e.Workload, len(e.Selector), maxPodLabels)
	}
	var from []netip.Prefix
	for _, text := range e.From {
		p, ok := parsePrefix(text)
		if !ok {
			return a, fmt.Errorf("from %.80q: want an address or a prefix", text)
		}
		from = append(from, p)
	}
	if len(e.Ports) == 0 || len(e.Ports) > maxExclusions || len(from) > maxExclusions {
		return a, fmt.Errorf("%d ports and %d ranges: want 1 to %d ports, and at most as many ranges", len(e.Ports), len(from), maxExclusions)
	}
	for _, port := range e.Ports {
		if !isPort(port) {
			return a, fmt.Errorf("port %d: want 1 to 65535", port)
		}
		a.Admit = append(a.Admit, mesh.Admission{Port: uint16(port), From: from})
	}
	return a, nil
}

// outbound reads the annotations of a pod or a namespace. What says a mode that there is not is
// strict; a destination that is none is left out.
func (r *reader) outbound(kind string, o metav1.ObjectMeta) (l mesh.Level, allowed []mesh.Exclusion) {
	l, ok := parseLevel(o.Annotations[AnnotationOutboundMode])
	if !ok {
		r.problem(kind, o.Namespace, o.Name, fmt.Sprintf("annotation %s: %.80q: want %s or %s; it is taken for %s", AnnotationOutboundMode, o.Annotations[AnnotationOutboundMode], PermissiveMode, StrictMode, StrictMode))
	}
	allowed, bad := parseOutbound(o.Annotations[AnnotationOutboundAllowed])
	for _, s := range bad {
		r.problem(kind, o.Namespace, o.Name, "annotation "+AnnotationOutboundAllowed+": "+s)
	}
	return l, allowed
}

// ownMode is what the annotations of a pod and the exceptions of the Mesh say of it, nil for
// nothing.
func (r *reader) ownMode(p *PodObject, workload string, enroll bool) *mesh.Mode {
	m := &mesh.Mode{}
	m.Outbound, m.Allowed = r.outbound("Pod", p.ObjectMeta)
	ports, bad := parsePorts(p.Annotations[AnnotationAdmitNodes])
	for _, s := range bad {
		r.problem("Pod", p.Namespace, p.Name, "annotation "+AnnotationAdmitNodes+": "+s)
	}
	for _, port := range ports {
		m.Admit = append(m.Admit, mesh.Admission{Port: port})
	}
	for i := range r.modes.Exceptions {
		if a := &r.modes.Exceptions[i]; a.isFor(p, workload) {
			m.Admit = append(m.Admit, a.Admit...)
		}
	}
	if len(m.Admit) > mesh.MaxModeEntries {
		r.problem("Pod", p.Namespace, p.Name, fmt.Sprintf("%d exceptions of the strict mode: those after the first %d are not heeded", len(m.Admit), mesh.MaxModeEntries))
		m.Admit = m.Admit[:mesh.MaxModeEntries]
	}
	if enroll && (len(m.Admit)+len(m.Allowed) > 0 || m.Outbound == mesh.Permissive) {
		r.except(p.Namespace, p.Name, PlaintextAllowed)
	}
	return m.OrNil()
}

// withPeer is own with what a PeerAuthentication says in place of what one said before; t is nil
// for none.
func withPeer(own *mesh.Mode, t *peerRead) *mesh.Mode {
	m := &mesh.Mode{}
	if own != nil {
		*m = *own
	}
	m.Inbound, m.Ports = mesh.Inherited, nil
	if t != nil {
		m.Inbound, m.Ports = t.inbound, t.ports
	}
	return m.OrNil()
}

// meshModeOf is that of the whole mesh. A PeerAuthentication of the root namespace says more than
// the Mesh.
func (r *reader) meshModeOf(m Modes, root *peers) *mesh.Policy {
	now := m.Mesh
	if l := root.inbound(); l != mesh.Inherited {
		now.Inbound = l
	}
	for _, l := range []*mesh.Level{&now.Inbound, &now.Outbound, &now.Outside} {
		if *l == mesh.Permissive {
			*l = mesh.Inherited // from nobody
		}
	}
	return newModePolicy(cmp.Or(r.cfg.RootNamespace, metav1.NamespaceDefault), meshMode, mesh.WholeMesh, &now)
}

// namespaceModeOf is that of a namespace, which may be nil.
func (r *reader) namespaceModeOf(namespace string, o *corev1.Namespace, x *peers) *mesh.Policy {
	m := &mesh.Mode{}
	if o != nil {
		m.Outbound, m.Allowed = r.outbound("Namespace", o.ObjectMeta)
	}
	if namespace != r.cfg.RootNamespace {
		m.Inbound = x.inbound()
	}
	return newModePolicy(namespace, namespaceMode, mesh.WholeNamespace, m)
}

// newModePolicy is nil for a mode that says nothing.
func newModePolicy(namespace, name string, scope mesh.Scope, m *mesh.Mode) *mesh.Policy {
	if m.IsZero() {
		return nil
	}
	return &mesh.Policy{Namespace: namespace, Name: name, Scope: scope, Action: mesh.Deny, Mode: m}
}

// peerFacts are what people should see of each that is read, by name.
func (r *reader) peerFacts(namespace string, x *peers) map[string]PolicyFacts {
	facts := make(map[string]PolicyFacts, len(x.all))
	for _, s := range x.all {
		o := s.object
		facts[o.Name] = PolicyFacts{
			Kind: PeerKind, Namespace: namespace, Name: o.Name, Generation: o.Generation, Shown: o.Status,
			Want: [2]metav1.Condition{accepted(s.read.faults), r.peerEnforced(s, x)},
		}
	}
	return facts
}

func (r *reader) peerEnforced(s *peerState, x *peers) metav1.Condition {
	c := metav1.Condition{Type: PolicyEnforced, Status: metav1.ConditionFalse}
	where := "every pod of the namespace " + s.object.Namespace
	switch {
	case s.read.labels != nil:
		where = fmt.Sprintf("pods with the labels of the selector (%d), unless an older one is for them", len(s.read.labels))
	case s.object.Namespace == r.cfg.RootNamespace:
		where = "every pod of the mesh"
	}
	switch {
	case s.read.ignored:
		c.Reason, c.Message = NotEnforced, "no part of it is enforced"
	case x.tooMany:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, TooMuch, fmt.Sprintf("this namespace has more than %d: plaintext is refused in it", maxPeers)
	case s.read.labels == nil && s != x.broad:
		c.Reason, c.Message = Older, "the older one "+x.broad.object.Name+" counts, which has no selector either"
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, AtDestination, "the proxy of the pod's node enforces it, for "+where
	}
	return c
}

func (r *reader) tellPeerFaults(x *peers) {
	for _, s := range x.all {
		for _, f := range s.read.faults[:min(len(s.read.faults), maxFaults)] {
			r.problem(PeerKind, s.object.Namespace, s.object.Name, f.String())
		}
	}
	if x.tooMany {
		o := x.all[0].object
		r.problem(PeerKind, o.Namespace, o.Name, fmt.Sprintf("the namespace has more than %d: plaintext is refused in it", maxPeers))
	}
}

// peered is what is said of the plaintext of a namespace.
type peered struct {
	objects map[string]*PeerAuthentication // by name
	peers   peers
	mode    *mesh.Policy
	facts   map[string]PolicyFacts // by name
}

// peeredPiece is a namespace, for what is noticed about its modes.
type peeredPiece string

func (b *Builder) peeredOf(namespace string) *peered {
	return find(b.peered, namespace, func() *peered { return &peered{objects: make(map[string]*PeerAuthentication)} })
}

func (b *Builder) takePeer(e Event, o *PeerAuthentication) {
	keepOrDelete(b.peeredOf(e.Namespace).objects, e.Name, o)
	b.batch.peered[e.Namespace] = struct{}{}
}

// readModes reads those that are different, and touches the pods that they are for.
func (b *Builder) readModes() {
	for namespace := range b.batch.peered {
		x := b.peeredOf(namespace)
		now := b.reader.readPeers(slices.Collect(maps.Values(x.objects)))
		b.reader.tellPeerFaults(&now)
		if !x.peers.sameSelecting(&now) {
			for p := range b.space(namespace).pods {
				b.touch(p)
			}
		}
		x.peers = now
		x.mode = b.tellPolicy(x.mode, b.reader.namespaceModeOf(namespace, b.space(namespace).object, &x.peers))
		b.tell(peeredPiece(namespace))
		b.tellPeered(x, b.reader.peerFacts(namespace, &x.peers))
		if len(x.objects) == 0 && x.mode == nil {
			delete(b.peered, namespace)
		}
		b.batch.spaces[namespace] = struct{}{} // to be swept, if it is not there
	}
	root := value(b.peered[b.reader.cfg.RootNamespace])
	b.meshMode = b.tellPolicy(b.meshMode, b.reader.meshModeOf(b.reader.modes, &root.peers))
	if now := effective(b.meshMode); !b.facts.Effective.Equal(&now) {
		b.facts.Effective, b.batch.delta.Mesh = now, true
	}
}

// effective is the mode of a policy that may be nil.
func effective(p *mesh.Policy) mesh.Mode {
	if p == nil {
		return mesh.Mode{}
	}
	return *p.Mode
}

func (b *Builder) tellPeered(x *peered, now map[string]PolicyFacts) {
	for name, had := range x.facts {
		if _, still := now[name]; !still {
			b.batch.delta.GonePoliced = append(b.batch.delta.GonePoliced, had.Key())
		}
	}
	for name, f := range now {
		if had, is := x.facts[name]; !is || !reflect.DeepEqual(had, f) {
			b.batch.delta.Policed = append(b.batch.delta.Policed, f)
		}
	}
	x.facts = now
}

// setMode gives the workload of a pod its own mode.
func (b *Builder) setMode(p *podState, w *mesh.Workload) {
	var x peers
	if of := b.peered[p.object.Namespace]; of != nil {
		x = of.peers
	}
	w.Mode = b.reader.modeOf(p.object, w, &x)
}

// modeOf is that of a workload, whose mode is so far that of ownMode, or what this function has
// made of it before.
func (r *reader) modeOf(p *PodObject, w *mesh.Workload, x *peers) *mesh.Mode {
	if w.HostNetwork {
		return nil
	}
	return withPeer(w.Mode, x.of(p.Labels))
}

// readModes is how Build does it.
func (b *build) readModes() {
	of := make(map[string][]*PeerAuthentication)
	for _, n := range b.objects.Namespaces {
		of[n.Name] = nil
	}
	for _, p := range b.objects.Peers {
		of[p.Namespace] = append(of[p.Namespace], p)
	}
	read := make(map[string]*peers)
	objects := make(map[string]*corev1.Namespace)
	for _, n := range b.objects.Namespaces {
		objects[n.Name] = n
	}
	for namespace, list := range of {
		x := b.readPeers(list)
		read[namespace] = &x
		b.tellPeerFaults(&x)
		if p := b.namespaceModeOf(namespace, objects[namespace], &x); p != nil {
			b.result.Policies = append(b.result.Policies, p)
		}
		b.result.Policed = slices.AppendSeq(b.result.Policed, maps.Values(b.peerFacts(namespace, &x)))
	}
	p := b.meshModeOf(b.modes, cmp.Or(read[b.cfg.RootNamespace], &peers{}))
	if b.result.Mesh.Effective = effective(p); p != nil {
		b.result.Policies = append(b.result.Policies, p)
	}
	for _, p := range b.objects.Pods {
		if w := b.workloads[b.podUID(p)]; w != nil {
			w.Mode = b.modeOf(p, w, cmp.Or(read[p.Namespace], &peers{}))
		}
	}
}
