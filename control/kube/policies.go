package kube

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"tacit.dev/mesh"
)

// standIn is the name of the policy that denies in the stead of those of its namespace that
// are too many; unknownLabels is that of none, so that who names it is denied. No object can
// have either name.
const (
	standIn       = "_more-policies"
	unknownLabels = "_more-labels"
)

// policyState is an AuthorizationPolicy.
type policyState struct {
	object *AuthorizationPolicy
	// read is what it comes to, all zero before that is known.
	read   translation
	isRead bool
	beyond bool // one of too many
	counts podCounts
	facts  PolicyFacts // as they were told
}

// podCounts counts pods that a policy is for, and those of them that are not in the mesh by
// what their labels ask for.
type podCounts struct{ all, outside int }

// add tells whether it makes a difference to people.
func (c *podCounts) add(n int, outside bool) (tells bool) {
	was := *c
	if c.all += n; outside {
		c.outside += n
	}
	return (was.all == 0) != (c.all == 0) || (was.outside == 0) != (c.outside == 0) || (was.all == was.outside) != (c.all == c.outside)
}

// policed are the policies of a namespace.
type policed struct {
	policies map[string]*policyState // by name
	standIn  *mesh.Policy            // nil if there are not too many
}

// counted is what a pod counts for.
type counted struct {
	there, outside bool
	policies       []*policyState
}

func (b *Builder) takePolicy(e Event, o *AuthorizationPolicy) {
	x := find(b.policed, e.Namespace, func() *policed { return &policed{policies: make(map[string]*policyState)} })
	s := find(x.policies, e.Name, func() *policyState { return &policyState{} })
	s.object, s.isRead = o, false
	b.batch.policed[e.Namespace] = struct{}{}
}

// readPolicies reads those that are different, and touches the pods that they are for.
func (b *Builder) readPolicies() {
	for namespace := range b.batch.policed {
		x := b.policed[namespace]
		names := slices.Sorted(maps.Keys(x.policies))
		n := 0
		for _, name := range names {
			s := x.policies[name]
			now := translation{}
			beyond := n >= maxPolicies
			switch {
			case s.object == nil:
			case beyond:
				n++
				now = b.reader.beyond()
			case s.isRead && !s.beyond:
				n++
				continue
			default:
				n++
				now = b.reader.translate(s.object)
			}
			s.isRead, s.beyond = true, beyond
			if b.replacePolicy(s, namespace, now); s.object == nil {
				delete(x.policies, name)
			}
		}
		var stand *mesh.Policy
		if n > maxPolicies {
			stand = b.reader.standIn(namespace)
		}
		x.standIn = b.tellPolicy(x.standIn, stand)
		if len(x.policies) == 0 {
			delete(b.policed, namespace)
		}
	}
}

func (b *Builder) replacePolicy(s *policyState, namespace string, now translation) {
	had := s.read
	b.batch.shown[s] = struct{}{}
	now.policy = b.tellPolicy(had.policy, now.policy)
	s.read = now
	if s.object != nil {
		b.reader.tellFaults(s.object, now.faults)
	}
	b.tell(s)
	if !had.sameTargets(&now) {
		b.touchTargets(namespace, &had)
		b.touchTargets(namespace, &now)
	}
}

// tellPolicy puts a policy in the stead of another one, and returns the one that stands.
func (b *Builder) tellPolicy(had, now *mesh.Policy) *mesh.Policy {
	switch {
	case reflect.DeepEqual(had, now):
		return had
	case now == nil:
		b.batch.delta.GonePolicies = append(b.batch.delta.GonePolicies, had.Key())
	default:
		b.batch.delta.Policies = append(b.batch.delta.Policies, now)
	}
	return now
}

// touchTargets has the policies of those pods found out again that a policy is for.
func (b *Builder) touchTargets(namespace string, t *translation) {
	if !t.isNamed() {
		return
	}
	for _, name := range t.services {
		if s := b.services[name]; s != nil {
			for _, p := range s.pods {
				b.touch(p)
			}
		}
	}
	if t.labels == nil {
		return
	}
	if namespace == b.reader.cfg.RootNamespace {
		for _, p := range b.pods {
			b.touchLabeled(p, t)
		}
	} else if s := b.spaces[namespace]; s != nil {
		for p := range s.pods {
			b.touchLabeled(p, t)
		}
	}
}

func (b *Builder) touchLabeled(p *podState, t *translation) {
	if p.object != nil && (hasLabels(p.object, t.labels) || len(p.object.Labels) > maxPodLabels) {
		b.touch(p)
	}
}

// police gives the workload of a pod the names of its policies, and counts the pod. w is nil if
// others do not see it.
func (b *Builder) police(p *podState, w *mesh.Workload) {
	var now counted
	if w != nil {
		now.there, now.outside, w.Policies = true, p.known == nil || !p.known.Enroll, nil
		for _, from := range b.reader.policing(p.object.Namespace) {
			if x := b.policed[from]; x != nil {
				for _, s := range x.policies {
					if b.reader.isFor(&s.read, p.object, w, &w.Policies) {
						now.policies = append(now.policies, s)
					}
				}
			}
		}
		namePolicies(w)
	}
	b.count(p, &p.counted, -1)
	p.counted = now
	b.count(p, &p.counted, 1)
}

func (b *Builder) count(p *podState, c *counted, n int) {
	if !c.there {
		return
	}
	if b.counts.add(n, c.outside) {
		b.showBroad(b.reader.cfg.RootNamespace)
	}
	if namespace := namespaceOf(p.name); b.space(namespace).counts.add(n, c.outside) {
		b.showBroad(namespace)
	}
	for _, s := range c.policies {
		if s.counts.add(n, c.outside) {
			b.batch.shown[s] = struct{}{}
		}
	}
}

// showBroad has people see something else of the policies that no workload has to name.
func (b *Builder) showBroad(namespace string) {
	if x := b.policed[namespace]; x != nil {
		for _, s := range x.policies {
			if !s.read.isNamed() {
				b.batch.shown[s] = struct{}{}
			}
		}
	}
}

// tellPoliced comes last: what people see of a policy depends on how many pods it is for.
func (b *Builder) tellPoliced() {
	for s := range b.batch.shown {
		if s.object == nil {
			if s.facts.Name != "" {
				b.batch.delta.GonePoliced = append(b.batch.delta.GonePoliced, s.facts.Key())
			}
			continue
		}
		counts := s.counts
		switch namespace := s.object.Namespace; {
		case s.read.isNamed():
		case namespace == b.reader.cfg.RootNamespace:
			counts = b.counts
		default:
			counts = value(b.spaces[namespace]).counts
		}
		if now := factsOf(s.object, &s.read, counts); !reflect.DeepEqual(now, s.facts) {
			s.facts = now
			b.batch.delta.Policed = append(b.batch.delta.Policed, now)
		}
	}
}

// policing are the namespaces whose policies may be for pods of a namespace.
func (r *reader) policing(namespace string) []string {
	if root := r.cfg.RootNamespace; root != "" && root != namespace {
		return []string{namespace, root}
	}
	return []string{namespace}
}

// isFor tells whether workloads have to name the policy, and this one does; it adds the name to
// those that it names.
func (r *reader) isFor(t *translation, p *PodObject, w *mesh.Workload, names *[]string) bool {
	if !t.isNamed() {
		return false
	}
	if t.labels != nil && len(p.Labels) > maxPodLabels {
		*names = append(*names, p.Namespace+"/"+unknownLabels)
	}
	if !(t.labels != nil && hasLabels(p, t.labels)) && !slices.ContainsFunc(t.services, func(name string) bool { return w.Services[r.serviceKey(name)] != nil }) {
		return false
	}
	*names = append(*names, t.policy.Key())
	return true
}

func hasLabels(p *PodObject, want map[string]string) bool {
	for k, v := range want {
		if is, ok := p.Labels[k]; !ok || is != v {
			return false
		}
	}
	return true
}

// namePolicies puts names in order. A pod of the host's network is not in the mesh.
func namePolicies(w *mesh.Workload) {
	if w.HostNetwork {
		w.Policies = nil
	}
	slices.Sort(w.Policies)
	w.Policies = slices.Compact(w.Policies)
}

// beyond is what a policy comes to that is one of too many.
func (r *reader) beyond() translation {
	return translation{faults: []Fault{{
		"metadata.name", TooMuch, Denies, fmt.Sprintf("this namespace has more than %d policies: those that are last by name deny every connection to it", maxPolicies),
		"join policies: a policy can have several rules, and a rule several sources",
	}}}
}

func (r *reader) standIn(namespace string) *mesh.Policy {
	p := mesh.Policy{Namespace: namespace, Name: standIn, Scope: mesh.WholeNamespace}
	if namespace == r.cfg.RootNamespace {
		p.Scope = mesh.WholeMesh
	}
	return p.Refused(fmt.Sprintf("more than %d policies", maxPolicies))
}

func (r *reader) tellFaults(p *AuthorizationPolicy, faults []Fault) {
	for _, f := range faults[:min(len(faults), maxFaults)] {
		if f.Effect != Never {
			r.problem("AuthorizationPolicy", p.Namespace, p.Name, f.String())
		}
	}
}

// readPolicies is how Build does it.
func (b *build) readPolicies() {
	of := make(map[string][]*AuthorizationPolicy)
	for _, p := range b.objects.Policies {
		of[p.Namespace] = append(of[p.Namespace], p)
	}
	read := make(map[*AuthorizationPolicy]*translation)
	for namespace, list := range of {
		slices.SortFunc(list, func(x, y *AuthorizationPolicy) int { return cmp.Compare(x.Name, y.Name) })
		for i, p := range list {
			t := b.beyond()
			if i < maxPolicies {
				t = b.translate(p)
			}
			b.tellFaults(p, t.faults)
			if read[p] = &t; t.policy != nil {
				b.result.Policies = append(b.result.Policies, t.policy)
			}
		}
		if len(list) > maxPolicies {
			b.result.Policies = append(b.result.Policies, b.standIn(namespace))
		}
	}
	counts := b.police(of, read)
	for p, t := range read {
		b.result.Policed = append(b.result.Policed, factsOf(p, t, counts(p)))
	}
}

// police gives workloads the names of their policies, and counts.
func (b *build) police(of map[string][]*AuthorizationPolicy, read map[*AuthorizationPolicy]*translation) func(*AuthorizationPolicy) podCounts {
	named, spaces, all := make(map[*AuthorizationPolicy]*podCounts), make(map[string]*podCounts), &podCounts{}
	known := make(map[string]bool) // by UID of the workload: it is wanted in the mesh
	for _, p := range b.result.Pods {
		if p.Workload != nil {
			known[p.Workload.UID] = p.Enroll
		}
	}
	for _, p := range b.objects.Pods {
		w := b.workloads[b.podUID(p)]
		if w == nil {
			continue
		}
		outside := !known[w.UID]
		all.add(1, outside)
		find(spaces, p.Namespace, func() *podCounts { return &podCounts{} }).add(1, outside)
		for _, from := range b.policing(p.Namespace) {
			for _, o := range of[from] {
				if b.isFor(read[o], p, w, &w.Policies) {
					find(named, o, func() *podCounts { return &podCounts{} }).add(1, outside)
				}
			}
		}
		namePolicies(w)
	}
	return func(p *AuthorizationPolicy) podCounts {
		switch {
		case read[p].isNamed():
			return value(named[p])
		case p.Namespace == b.cfg.RootNamespace:
			return *all
		}
		return value(spaces[p.Namespace])
	}
}
