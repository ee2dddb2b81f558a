package kube

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"tacit.dev/mesh"
)

// Builder is Build for a cluster that changes. It holds the objects, takes what has changed,
// and reads again what depends on that and nothing else:
//
//	Pod, or what its agent says  itself; who claims an address of its; services that name
//	                             it, or have an endpoint at its address; pods with its UID
//	Namespace                    its pods, if its labels differ
//	Node                         its pods, if its zone differs; who claims its addresses
//	Service, EndpointSlice       the service and its endpoints; who claims its addresses
//	ranges                       services that name a pod which is not there; pods in which their
//	                             agents see others
//	Mesh                         all pods, if it enrolls others
//	AuthorizationPolicy          itself; pods that it is for, if those differ
//	PeerAuthentication           the mode of its namespace, or of the mesh; pods of its namespace, if
//	                             one with a selector differs
//
// What stays the same keeps its pointer, and nothing that was given away is changed. One
// goroutine uses it.
type Builder struct {
	reader     reader
	prefix     string          // of the UID of a pod's workload, before its name
	said       map[string]Said // by UID
	pods       map[string]*podState
	spaces     map[string]*spaceState
	nodes      map[string]*nodeState
	services   map[string]*serviceState
	sliced     map[string]*serviceState // by slice
	addresses  map[netip.Addr]*addressState
	uids       map[string]*uidState
	cidrs      map[string]*networkingv1.ServiceCIDR
	meshes     map[string]*Mesh
	policed    map[string]*policed // by namespace
	peered     map[string]*peered  // by namespace
	meshMode   *mesh.Policy
	counts     podCounts // of all pods
	facts      MeshFacts
	cluster    *mesh.Place
	trust      *mesh.Place
	ranges     rangeSet
	rangeAsked map[*serviceState]bool // services that have asked for them
	disputes   map[netip.Addr]bool
	enrolling  map[string]bool
	exceptions map[*podState][]Exception
	tally      tally

	asks  *asks // of the service that is being read
	notes notes // about what is being read
	batch batch
}

// Said is what the agent of a pod says of it. If nothing but the UID is set, it takes back
// what was said.
type Said struct {
	UID string
	// Told are its addresses: see Objects.
	Told []netip.Addr
	// Others: see Objects.
	Others []netip.Addr
	// Vouched: see Objects.
	Vouched bool
}

// podState is a pod, or the name of one that only endpoints speak of.
type podState struct {
	name      string // NAMESPACE/NAME
	object    *PodObject
	addresses []netip.Addr // where it is, as it or its agent says, others included
	workload  *mesh.Workload
	known     *Pod // whether or not another pod has its UID
	serves    []share
	asked     []*serviceState // services that have asked for it
	enrolls   bool
	counted   counted
}

// share is what a pod serves of a service.
type share struct {
	service *serviceState
	ports   []mesh.Port
}

type spaceState struct {
	object  *corev1.Namespace
	pods    map[*podState]struct{}
	enrolls int // how many of them may have to be enrolled
	counts  podCounts
}

type nodeState struct {
	object *corev1.Node
	pods   map[*podState]struct{}
	node   Node
	place  *mesh.Place
}

type serviceState struct {
	name    string // NAMESPACE/NAME
	object  *corev1.Service
	slices  map[string]*discoveryv1.EndpointSlice
	service *mesh.Service
	key     string                    // of service, one string for all who serve it
	pods    []*podState               // those that serve it
	alone   map[string][]mesh.Port    // what a pod serves that serves nothing else
	listed  map[string]*mesh.Workload // by UID
	asks    asks
}

// asks are what the endpoints of a service depend on.
type asks struct {
	pods      map[*podState]struct{}
	addresses map[netip.Addr]struct{}
	ranges    bool
}

// addressState is an address that somebody has, claims, or asks for.
type addressState struct {
	pods     []*podState // of the host's network, too
	nodes    []string
	services []string
	asked    []*serviceState
	disputed bool
	holder   *podState
	place    *mesh.Place // if it is contested
}

// uidState are the pods with one UID.
type uidState struct {
	pods  []*podState
	known *Pod // of the one that counts
}

// Pieces that are there once, for what is noticed about them; others are their states.
type (
	meshPiece    struct{}
	clusterPiece struct{}
)

// notes is a sink.
type notes struct {
	findings   []finding
	exceptions []Exception
}

func (n *notes) problem(f finding)  { n.findings = append(n.findings, f) }
func (n *notes) except(e Exception) { n.exceptions = append(n.exceptions, e) }

// NewBuilder knows no object.
func NewBuilder(cfg BuildConfig) *Builder {
	b := &Builder{
		reader:     reader{cfg: cfg.withDefaults()},
		said:       make(map[string]Said),
		pods:       make(map[string]*podState),
		spaces:     make(map[string]*spaceState),
		nodes:      make(map[string]*nodeState),
		services:   make(map[string]*serviceState),
		sliced:     make(map[string]*serviceState),
		addresses:  make(map[netip.Addr]*addressState),
		uids:       make(map[string]*uidState),
		cidrs:      make(map[string]*networkingv1.ServiceCIDR),
		meshes:     make(map[string]*Mesh),
		policed:    make(map[string]*policed),
		peered:     make(map[string]*peered),
		rangeAsked: make(map[*serviceState]bool),
		disputes:   make(map[netip.Addr]bool),
		enrolling:  make(map[string]bool),
		exceptions: make(map[*podState][]Exception),
		batch:      newBatch(),
	}
	b.reader.around, b.reader.out = b, &b.notes
	b.prefix = strings.TrimSuffix(b.reader.workloadUID("/Pod", "", ""), "/")
	b.batch.mesh, b.batch.cluster = true, true // what cfg says
	return b
}

// batch is what one call of Apply has to read, and what has come of it.
type batch struct {
	was       map[*podState]*podWas
	pods      map[*podState]struct{}
	spaces    map[string]struct{}
	addresses map[netip.Addr]struct{}
	services  map[*serviceState]struct{}
	uids      map[string]struct{}
	policed   map[string]struct{}       // namespaces with policies that are different
	peered    map[string]struct{}       // namespaces whose mode may be different
	shown     map[*policyState]struct{} // of which people may have to see something else
	unnamed   []*podState               // which a service has asked for and does not any more
	emptied   []string                  // nodes that have lost a pod
	mesh      bool
	cluster   bool
	ranges    bool
	delta     Delta
}

// podWas is a pod as it was before the batch.
type podWas struct {
	object   *PodObject
	workload *mesh.Workload
	known    *Pod
}

func newBatch() batch {
	return batch{
		was:       make(map[*podState]*podWas),
		pods:      make(map[*podState]struct{}),
		spaces:    make(map[string]struct{}),
		addresses: make(map[netip.Addr]struct{}),
		services:  make(map[*serviceState]struct{}),
		uids:      make(map[string]struct{}),
		policed:   make(map[string]struct{}),
		peered:    make(map[string]struct{}),
		shown:     make(map[*policyState]struct{}),
	}
}

// Apply takes events and what agents say, of each object and each pod once, and returns what
// is different for that.
func (b *Builder) Apply(events []Event, said []Said) Delta {
	for _, e := range events {
		b.take(e)
	}
	for _, s := range said {
		b.hear(s)
	}
	b.readMesh()
	b.readCluster()
	b.readAddresses()
	b.decide()
	b.readPods()
	b.readServices()
	b.readModes()
	b.readPolicies()
	b.join()
	b.readUIDs()
	b.readSpaces()
	b.tellPoliced()
	b.sweep()
	d := b.batch.delta
	d.Problems = b.tally.stale()
	b.batch = newBatch()
	return d
}

// take puts an object where it belongs, and notes what has to be read again.
func (b *Builder) take(e Event) {
	name := e.Namespace + "/" + e.Name
	switch e.Kind {
	case "Pod":
		o, _ := e.Object.(*PodObject)
		b.takePod(name, o)
	case "Namespace":
		o, _ := e.Object.(*corev1.Namespace)
		b.takeNamespace(e.Name, o)
	case "Node":
		o, _ := e.Object.(*corev1.Node)
		b.takeNode(e.Name, o)
	case "Service":
		o, _ := e.Object.(*corev1.Service)
		b.takeService(name, o)
	case "EndpointSlice":
		o, _ := e.Object.(*discoveryv1.EndpointSlice)
		b.takeSlice(name, o)
	case "ServiceCIDR":
		o, _ := e.Object.(*networkingv1.ServiceCIDR)
		keepOrDelete(b.cidrs, e.Name, o)
		b.batch.cluster = true
	case "Mesh":
		o, _ := e.Object.(*Mesh)
		keepOrDelete(b.meshes, e.Name, o)
		b.batch.mesh = true
	case "AuthorizationPolicy":
		o, _ := e.Object.(*AuthorizationPolicy)
		b.takePolicy(e, o)
	case PeerKind:
		o, _ := e.Object.(*PeerAuthentication)
		b.takePeer(e, o)
	}
}

func keepOrDelete[T any](m map[string]*T, name string, o *T) {
	if o == nil {
		delete(m, name)
	} else {
		m[name] = o
	}
}

func (b *Builder) takePod(name string, o *PodObject) {
	p := b.namedPod(name)
	b.touch(p)
	b.batch.pods[p] = struct{}{}
	had := p.object
	p.object = o
	if had != nil {
		b.leave(p, had)
	}
	if o != nil {
		b.space(o.Namespace).pods[p] = struct{}{}
		b.node(o.Spec.NodeName).pods[p] = struct{}{}
		if u := b.uid(uidOf(o)); !slices.Contains(u.pods, p) {
			u.pods = append(u.pods, p)
		}
	}
}

// leave takes a pod from where it was, unless it is there still.
func (b *Builder) leave(p *podState, had *PodObject) {
	if p.object == nil {
		delete(b.space(had.Namespace).pods, p)
		b.batch.spaces[had.Namespace] = struct{}{}
	}
	if p.object == nil || p.object.Spec.NodeName != had.Spec.NodeName {
		delete(b.node(had.Spec.NodeName).pods, p)
		b.batch.emptied = append(b.batch.emptied, had.Spec.NodeName)
	}
	if uid := uidOf(had); p.object == nil || uidOf(p.object) != uid {
		u := b.uid(uid)
		u.pods = without(u.pods, p)
		b.batch.uids[uid] = struct{}{}
	}
}

func (b *Builder) takeNamespace(name string, o *corev1.Namespace) {
	s := b.space(name)
	had := s.object
	s.object = o
	b.batch.spaces[name] = struct{}{}
	if !maps.Equal(labelsOf(had), labelsOf(o)) {
		maps.Copy(b.batch.pods, s.pods)
	}
	if was, is := value(had), value(o); !maps.Equal(was.Annotations, is.Annotations) {
		b.batch.peered[name] = struct{}{}
	}
}

func labelsOf(n *corev1.Namespace) map[string]string {
	if n == nil {
		return nil
	}
	return n.Labels
}

// takeNode reads the node, too: that depends on nothing else.
func (b *Builder) takeNode(name string, o *corev1.Node) {
	n := b.node(name)
	had := value(n.object)
	n.object = o
	now := value(o)
	if had.Labels[corev1.LabelTopologyZone] != now.Labels[corev1.LabelTopologyZone] {
		maps.Copy(b.batch.pods, n.pods)
	}
	b.claim(nodeAddresses(&had), nodeAddresses(&now), name, func(a *addressState) *[]string { return &a.nodes })
	place := n.place
	if n.place = nil; o != nil {
		n.place = b.reader.place(o)
	}
	n.place = b.replacePlace(place, n.place)
	b.tell(n)
	b.tellNode(n, name)
}

func (b *Builder) takeService(name string, o *corev1.Service) {
	s := b.service(name)
	b.batch.services[s] = struct{}{}
	had, now := value(s.object), value(o)
	s.object = o
	b.claim(clusterIPs(&had), clusterIPs(&now), name, func(a *addressState) *[]string { return &a.services })
}

func (b *Builder) takeSlice(name string, o *discoveryv1.EndpointSlice) {
	if s := b.sliced[name]; s != nil {
		delete(s.slices, name)
		delete(b.sliced, name)
		b.batch.services[s] = struct{}{}
	}
	if o != nil {
		s := b.service(serviceOf(o))
		s.slices[name], b.sliced[name] = o, s
		b.batch.services[s] = struct{}{}
	}
}

// claim notes that an object that is no pod claims addresses now, and had others.
func (b *Builder) claim(had, now []netip.Addr, name string, by func(*addressState) *[]string) {
	for _, a := range had {
		if !slices.Contains(now, a) {
			list := by(b.address(a))
			*list = without(*list, name)
			b.batch.addresses[a] = struct{}{}
		}
	}
	for _, a := range now {
		if !slices.Contains(had, a) {
			list := by(b.address(a))
			*list = append(*list, name)
			b.batch.addresses[a] = struct{}{}
		}
	}
}

func (b *Builder) hear(s Said) {
	if len(s.Told)+len(s.Others) == 0 && !s.Vouched {
		delete(b.said, s.UID)
	} else {
		b.said[s.UID] = s
	}
	b.rereadUID(s.UID)
}

func (b *Builder) rereadUID(uid string) {
	if u := b.uids[uid]; u != nil {
		for _, p := range u.pods {
			b.batch.pods[p] = struct{}{}
		}
	}
}

// touch keeps how a pod was before the batch.
func (b *Builder) touch(p *podState) *podWas {
	was := b.batch.was[p]
	if was == nil {
		was = &podWas{object: p.object, workload: p.workload, known: p.known}
		b.batch.was[p] = was
	}
	return was
}

func (b *Builder) namedPod(name string) *podState {
	return find(b.pods, name, func() *podState { return &podState{name: name} })
}

func (b *Builder) space(name string) *spaceState {
	return find(b.spaces, name, func() *spaceState { return &spaceState{pods: make(map[*podState]struct{})} })
}

func (b *Builder) node(name string) *nodeState {
	return find(b.nodes, name, func() *nodeState { return &nodeState{pods: make(map[*podState]struct{})} })
}

func (b *Builder) service(name string) *serviceState {
	return find(b.services, name, func() *serviceState {
		return &serviceState{name: name, slices: make(map[string]*discoveryv1.EndpointSlice)}
	})
}

func (b *Builder) address(a netip.Addr) *addressState {
	return find(b.addresses, a, func() *addressState { return &addressState{} })
}

func (b *Builder) uid(uid string) *uidState {
	return find(b.uids, uid, func() *uidState { return &uidState{} })
}

// find returns what is there, or makes it.
func find[K comparable, V any](m map[K]*V, k K, fresh func() *V) *V {
	v := m[k]
	if v == nil {
		v = fresh()
		m[k] = v
	}
	return v
}

// without is a list without one of it, in any order. It uses the list's memory.
func without[T comparable](list []T, v T) []T {
	i := slices.Index(list, v)
	if i < 0 {
		return list
	}
	list[i] = list[len(list)-1]
	clear(list[len(list)-1:])
	if len(list) == 1 {
		return nil
	}
	return list[:len(list)-1]
}
