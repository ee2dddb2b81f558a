package kube

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"tacit.dev/mesh"
)

// This file is how Builder reads a batch, in the order in which one thing depends on another.

// readMesh comes first: every pod depends on its policy.
func (b *Builder) readMesh() {
	if !b.batch.mesh {
		return
	}
	facts := b.reader.mesh(slices.Collect(maps.Values(b.meshes)))
	b.tell(meshPiece{})
	facts.Effective = b.facts.Effective // see readModes
	b.batch.delta.Mesh = !reflect.DeepEqual(facts, b.facts)
	b.facts, b.reader.cfg.Before, b.reader.cfg.BeforeModes = facts, facts.Policy, &facts.Modes
	had, modes := b.reader.policy, b.reader.modes
	b.reader.policy, b.reader.modes = facts.Policy, facts.Modes
	b.trust = b.replacePlace(b.trust, b.reader.trustPlace())
	if had.enrollsLike(facts.Policy) && reflect.DeepEqual(modes.Exceptions, facts.Modes.Exceptions) {
		return
	}
	for _, p := range b.pods {
		b.batch.pods[p] = struct{}{}
	}
	for name := range b.spaces {
		b.batch.spaces[name] = struct{}{}
	}
}

func (b *Builder) readCluster() {
	if !b.batch.cluster {
		return
	}
	place := b.reader.cluster(slices.Collect(maps.Values(b.cidrs)))
	b.tell(clusterPiece{})
	b.cluster = b.replacePlace(b.cluster, place)
}

// replacePlace puts a place in the stead of another one, and returns the one that stands.
func (b *Builder) replacePlace(had, now *mesh.Place) *mesh.Place {
	switch {
	case now == nil && had == nil, reflect.DeepEqual(had, now):
		return had
	case now == nil:
		b.batch.delta.Gone = append(b.batch.delta.Gone, had.Name)
	default:
		b.batch.delta.Places = append(b.batch.delta.Places, now)
	}
	b.batch.ranges = b.ranges.replace(rangesOf(had), rangesOf(now)) || b.batch.ranges
	return now
}

func rangesOf(p *mesh.Place) []netip.Prefix {
	if p == nil {
		return nil
	}
	return p.Ranges
}

func (b *Builder) tellNode(n *nodeState, name string) {
	if n.object == nil {
		if b.batch.emptied = append(b.batch.emptied, name); n.node.Name != "" {
			b.batch.delta.GoneNodes = append(b.batch.delta.GoneNodes, name)
		}
		n.node = Node{}
		return
	}
	if now := nodeOf(n.object); !reflect.DeepEqual(now, n.node) {
		n.node = now
		b.batch.delta.Nodes = append(b.batch.delta.Nodes, now)
	}
}

// readAddresses finds out where the pods of the batch are. About all those addresses is
// decided again: it depends on more of a pod.
func (b *Builder) readAddresses() {
	if b.batch.ranges {
		for uid, s := range b.said {
			if len(s.Others) > 0 {
				b.rereadUID(uid)
			}
		}
	}
	for p := range b.batch.pods {
		var now []netip.Addr
		if p.object != nil && isThere(p.object) {
			now = slices.Concat(b.reader.addresses(p.object), b.reader.others(p.object))
		}
		for _, a := range p.addresses {
			if b.batch.addresses[a] = struct{}{}; !slices.Contains(now, a) {
				x := b.address(a)
				x.pods = without(x.pods, p)
			}
		}
		for _, a := range now {
			if b.batch.addresses[a] = struct{}{}; !slices.Contains(p.addresses, a) {
				x := b.address(a)
				x.pods = append(x.pods, p)
			}
		}
		p.addresses = now
	}
}

// decide finds out whose addresses are that several claim. Pods whose address has become
// another's are read again.
func (b *Builder) decide() {
	for a := range b.batch.addresses {
		x := b.address(a)
		had, holder, place := x.disputed, x.holder, x.place
		x.disputed, x.holder, x.place = false, nil, nil
		all, other := b.claims(a, x)
		if pods, is := all.rivals(other); is {
			d := b.reader.decide(a, pods, other)
			if x.disputed = true; d.holder != nil {
				x.holder = b.pods[d.holder.Namespace+"/"+d.holder.Name]
			}
			if d.contested {
				x.place = b.reader.contestedPlace(a)
			}
		}
		b.tell(x)
		x.place = b.replacePlace(place, x.place)
		if had == x.disputed && holder == x.holder && place == x.place {
			continue
		}
		if delete(b.disputes, a); x.disputed {
			b.disputes[a] = x.place != nil
		}
		b.batch.delta.Disputed = true
		for _, p := range x.pods {
			b.batch.pods[p] = struct{}{}
		}
	}
}

// claims are who claims an address for itself alone.
func (b *Builder) claims(a netip.Addr, x *addressState) (pods claimants, other claim) {
	for _, p := range x.pods {
		b.reader.claimed(p.object, func(c netip.Addr) *claimants {
			if c != a {
				return &claimants{}
			}
			return &pods
		})
	}
	if len(x.services) > 0 {
		return pods, claimOfService(slices.Min(x.services))
	}
	if len(x.nodes) > 0 {
		return pods, claimOfNode(slices.Min(x.nodes))
	}
	return pods, claim{}
}

// readPods reads the pods of the batch, as if they served nothing.
func (b *Builder) readPods() {
	for p := range b.batch.pods {
		was := b.touch(p)
		p.workload, p.known = nil, nil
		enrolls := false
		if p.object != nil {
			p.workload, p.known = b.reader.readPod(p.object)
			enrolls = b.reader.enrolls(p.object)
		}
		if exceptions := b.notes.exceptions; !slices.Equal(exceptions, b.exceptions[p]) {
			b.batch.delta.Exceptions = true
			if b.exceptions[p] = exceptions; len(exceptions) == 0 {
				delete(b.exceptions, p)
			}
		}
		b.tell(p)
		b.countEnrolls(p, enrolls)
		b.readServicesOf(p, was)
	}
}

func (b *Builder) countEnrolls(p *podState, enrolls bool) {
	if enrolls == p.enrolls {
		return
	}
	namespace := namespaceOf(p.name)
	if p.enrolls = enrolls; enrolls {
		b.space(namespace).enrolls++
	} else {
		b.space(namespace).enrolls--
	}
	b.batch.spaces[namespace] = struct{}{}
}

// namespaceOf is that of NAMESPACE/NAME.
func namespaceOf(name string) string {
	namespace, _, _ := strings.Cut(name, "/")
	return namespace
}

// readServicesOf has services read again whose endpoints may lead elsewhere, since the pod is
// not where it was.
func (b *Builder) readServicesOf(p *podState, was *podWas) {
	if sameForEndpoints(was.object, p.object, was.workload, p.workload) {
		return
	}
	for _, s := range p.asked {
		b.batch.services[s] = struct{}{}
	}
	for _, at := range [][]netip.Addr{addressesOf(was.object, was.workload), addressesOf(p.object, p.workload)} {
		for _, a := range at {
			if x := b.addresses[a]; x != nil {
				for _, s := range x.asked {
					b.batch.services[s] = struct{}{}
				}
			}
		}
	}
}

// sameForEndpoints tells whether two states of a pod are the same to reader.serve.
func sameForEndpoints(o, p *PodObject, w, v *mesh.Workload) bool {
	if o == nil || p == nil || w == nil || v == nil {
		return o == p && w == v
	}
	return o.UID == p.UID && w.Node == v.Node && w.HostNetwork == v.HostNetwork &&
		slices.Equal(w.Addresses, v.Addresses) && slices.Equal(podAddresses(o), podAddresses(p))
}

func addressesOf(p *PodObject, w *mesh.Workload) (all []netip.Addr) {
	if p != nil {
		all = podAddresses(p)
	}
	if w != nil {
		all = append(all, w.Addresses...)
	}
	return all
}

func (b *Builder) readServices() {
	if b.batch.ranges {
		for s := range b.rangeAsked {
			b.batch.services[s] = struct{}{}
		}
	}
	for s := range b.batch.services {
		had := s.service
		s.service = nil
		var found served
		var now asks
		if s.object != nil && isKnown(s.object) {
			s.service = b.reader.service(s.object)
			now = asks{pods: make(map[*podState]struct{}), addresses: make(map[netip.Addr]struct{})}
			b.asks = &now
			found = b.reader.serve(s.object, slices.Collect(maps.Values(s.slices)))
			b.asks = nil
		}
		b.tell(s)
		b.replaceService(s, had)
		b.replaceAsks(s, now)
		b.replaceShares(s, found.ports)
		b.replaceListed(s, found.listed)
	}
}

func (b *Builder) replaceService(s *serviceState, had *mesh.Service) {
	switch {
	case had == nil && s.service == nil:
	case s.service == nil:
		b.batch.delta.Gone = append(b.batch.delta.Gone, had.Key())
	case reflect.DeepEqual(had, s.service):
		s.service = had
	default:
		s.key = s.service.Key()
		b.batch.delta.Services = append(b.batch.delta.Services, s.service)
	}
}

func (b *Builder) replaceAsks(s *serviceState, now asks) {
	for p := range s.asks.pods {
		if _, still := now.pods[p]; !still {
			p.asked = without(p.asked, s)
			b.batch.unnamed = append(b.batch.unnamed, p)
		}
	}
	for p := range now.pods {
		if _, already := s.asks.pods[p]; !already {
			p.asked = append(p.asked, s)
		}
	}
	for a := range s.asks.addresses {
		if _, still := now.addresses[a]; !still {
			x := b.address(a)
			x.asked = without(x.asked, s)
			b.batch.addresses[a] = struct{}{}
		}
	}
	for a := range now.addresses {
		if _, already := s.asks.addresses[a]; !already {
			x := b.address(a)
			x.asked = append(x.asked, s)
		}
	}
	if delete(b.rangeAsked, s); now.ranges {
		b.rangeAsked[s] = true
	}
	s.asks = now
}

// replaceShares takes note of which pods serve a service.
func (b *Builder) replaceShares(s *serviceState, ports map[string][]mesh.Port) {
	pods := make([]*podState, 0, len(ports))
	for uid, list := range ports {
		p := b.pods[strings.TrimPrefix(uid, b.prefix)]
		pods = append(pods, p)
		i := slices.IndexFunc(p.serves, func(x share) bool { return x.service == s })
		switch {
		case i < 0:
			b.touch(p)
			p.serves = append(p.serves, share{s, list})
		case !slices.Equal(p.serves[i].ports, list):
			b.touch(p)
			p.serves[i].ports = list
		}
	}
	for _, p := range s.pods {
		if _, still := ports[b.prefix+p.name]; !still {
			b.touch(p)
			p.serves = slices.DeleteFunc(p.serves, func(x share) bool { return x.service == s })
		}
	}
	s.pods = pods
}

func (b *Builder) replaceListed(s *serviceState, list []*mesh.Workload) {
	had := s.listed
	s.listed = make(map[string]*mesh.Workload, len(list))
	for _, w := range list {
		if same := had[w.UID]; same != nil && reflect.DeepEqual(same, w) {
			w = same
		} else {
			b.batch.delta.Workloads = append(b.batch.delta.Workloads, w)
		}
		s.listed[w.UID] = w
	}
	for uid := range had {
		if s.listed[uid] == nil {
			b.batch.delta.Gone = append(b.batch.delta.Gone, uid)
		}
	}
}

// join puts together what pods are and what they serve.
func (b *Builder) join() {
	for p, was := range b.batch.was {
		p.workload = b.joined(p, was)
		switch {
		case p.workload == was.workload:
		case p.workload == nil:
			b.batch.delta.Gone = append(b.batch.delta.Gone, was.workload.UID)
		default:
			b.batch.delta.Workloads = append(b.batch.delta.Workloads, p.workload)
		}
		if p.known != nil {
			known := *p.known
			known.Workload = p.workload
			p.known = &known
			if was.known != nil && was.known.Workload == p.workload && reflect.DeepEqual(was.known, p.known) {
				p.known = was.known
			}
		}
		for _, k := range []*Pod{was.known, p.known} {
			if k != nil && p.known != was.known {
				b.batch.uids[k.UID] = struct{}{}
			}
		}
	}
}

// joined is the workload with what it serves, and its policies; the one before if that is the
// same.
func (b *Builder) joined(p *podState, was *podWas) *mesh.Workload {
	if p.workload == nil {
		b.police(p, nil)
		return nil
	}
	w := *p.workload
	w.Services, w.Ready = nil, isReady(p.object)
	for _, s := range p.serves {
		serveBy(&w, s.service.key, s.ports)
	}
	if len(p.serves) == 1 { // as most do, and their siblings do the same
		unify(&w.Services, &p.serves[0].service.alone)
	}
	b.setMode(p, &w)
	b.police(p, &w)
	if was.workload != nil && reflect.DeepEqual(*was.workload, w) {
		return was.workload
	}
	return &w
}

// readUIDs finds out which of the pods with one UID counts.
func (b *Builder) readUIDs() {
	for uid := range b.batch.uids {
		u := b.uid(uid)
		var all []Pod
		for _, p := range u.pods {
			if p.known != nil {
				all = append(all, *p.known)
			}
		}
		slices.SortFunc(all, Pod.compare)
		var first *Pod
		for i := range all {
			if i == 0 {
				first = b.pods[all[0].Namespace+"/"+all[0].Name].known
			} else {
				b.reader.notUnique(all[i], all[i-1])
			}
		}
		b.tell(u)
		switch {
		case first == u.known:
		case first == nil:
			b.batch.delta.GonePods = append(b.batch.delta.GonePods, uid)
		default:
			b.batch.delta.Pods = append(b.batch.delta.Pods, first)
		}
		u.known = first
	}
}

// readSpaces finds out in which namespaces a pod may have to be enrolled.
func (b *Builder) readSpaces() {
	for name := range b.batch.spaces {
		s := b.space(name)
		if on := s.enrolls > 0 || s.object != nil && b.reader.enrollsIn(name); on != b.enrolling[name] {
			b.batch.delta.Namespaces = true
			if b.enrolling[name] = on; !on {
				delete(b.enrolling, name)
			}
		}
	}
}

// sweep forgets what nothing is left of.
func (b *Builder) sweep() {
	for p := range b.batch.was {
		b.sweepPod(p)
	}
	for _, p := range b.batch.unnamed {
		b.sweepPod(p)
	}
	for name := range b.batch.spaces {
		if s := b.spaces[name]; s.object == nil && len(s.pods) == 0 {
			delete(b.spaces, name)
		}
	}
	for _, name := range b.batch.emptied {
		if n := b.nodes[name]; n != nil && n.object == nil && len(n.pods) == 0 {
			delete(b.nodes, name)
		}
	}
	for s := range b.batch.services {
		if s.object == nil && len(s.slices) == 0 {
			delete(b.services, s.name)
		}
	}
	for a := range b.batch.addresses {
		if x := b.addresses[a]; len(x.pods)+len(x.nodes)+len(x.services)+len(x.asked) == 0 {
			delete(b.addresses, a)
		}
	}
	for uid := range b.batch.uids {
		if len(b.uids[uid].pods) == 0 {
			delete(b.uids, uid)
		}
	}
}

func (b *Builder) sweepPod(p *podState) {
	if p.object == nil && len(p.asked) == 0 {
		delete(b.pods, p.name)
	}
}

// tell keeps what was noticed about a piece, and begins anew.
func (b *Builder) tell(piece any) {
	b.tally.set(piece, b.notes.findings)
	b.notes = notes{}
}

// Builder is around every object that it reads.

func (b *Builder) labels(namespace string) map[string]string {
	if s := b.spaces[namespace]; s != nil {
		return labelsOf(s.object)
	}
	return nil
}

func (b *Builder) zone(node string) string {
	if n := b.nodes[node]; n != nil && n.object != nil {
		return n.object.Labels[corev1.LabelTopologyZone]
	}
	return ""
}

func (b *Builder) told(uid string) []netip.Addr   { return b.said[uid].Told }
func (b *Builder) others(uid string) []netip.Addr { return b.said[uid].Others }
func (b *Builder) vouched(uid string) bool        { return b.said[uid].Vouched }

func (b *Builder) disputed(a netip.Addr) (d dispute, is bool) {
	x := b.addresses[a]
	if x == nil || !x.disputed {
		return d, false
	}
	if x.holder != nil {
		d.holder = x.holder.object
	}
	d.contested = x.place != nil
	return d, true
}

func (b *Builder) pod(name string) (*PodObject, *mesh.Workload) {
	p := b.namedPod(name)
	b.asks.pods[p] = struct{}{}
	return p.object, p.workload
}

func (b *Builder) at(a netip.Addr) *mesh.Workload {
	b.asks.addresses[a] = struct{}{}
	if x := b.addresses[a]; x != nil {
		for _, p := range x.pods {
			if w := p.workload; w != nil && !w.HostNetwork && slices.Contains(w.Addresses, a) && slices.Contains(podAddresses(p.object), a) {
				return w
			}
		}
	}
	return nil
}

func (b *Builder) isOurs(a netip.Addr) bool {
	if b.asks != nil { // of a pod it is known without
		b.asks.ranges = true
	}
	return b.ranges.has(a)
}
