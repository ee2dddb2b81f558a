package mesh

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

// Any sequence of changes, in any batches, leads to the World that is made of everything at
// once; and a World that others were made of stays what it was.
func TestWithEqualsTruth(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range 1000 {
		r := &dice{rand.New(rand.NewPCG(seed, uint64(i)))}
		if err := r.sequence(); err != nil {
			t.Fatalf("seed %d, sequence %d: %v", seed, i, err)
		}
	}
}

// dice makes up a small mesh in which everything gets in the way of everything else.
type dice struct{ *rand.Rand }

// sequence changes a World several times. Now and then it goes on from an earlier one.
func (r *dice) sequence() error {
	type state struct {
		now   time.Time
		known map[string]any
		world *World
		truth *truth
	}
	states := []state{{time.Now(), map[string]any{}, &World{}, newTruth(nil, nil)}}
	for range 8 {
		s := states[len(states)-1]
		if r.IntN(8) == 0 {
			s = states[r.IntN(len(states))]
		}
		s.known, s.now = maps.Clone(s.known), s.now.Add(time.Duration(r.IntN(100))*time.Second)
		c := r.changes(s.known)
		for parts := r.parts(c); len(parts) > 1; parts = parts[1:] {
			s.world, c = s.world.With(parts[0], s.now), parts[1]
		}
		s.world = s.world.With(c, s.now)
		s.truth = truthOf(s.known).After(s.truth, s.now)
		states = append(states, s)
	}
	for i, s := range states {
		for _, later := range []time.Duration{0, time.Minute, formerFor - time.Second, formerFor} {
			if err := differ(s.world, s.truth, s.now.Add(later)); err != nil {
				return fmt.Errorf("World %d, %v later: %w", i, later, err)
			}
		}
		if got, want := s.world.All(), inOrder(s.known); !reflect.DeepEqual(got, want) {
			return fmt.Errorf("World %d has %+v: want %+v", i, got, want)
		}
		if err := s.world.isLean(); err != nil {
			return fmt.Errorf("World %d: %w", i, err)
		}
	}
	return nil
}

func truthOf(known map[string]any) *truth {
	all := inOrder(known)
	t := newTruth(all.Workloads, all.Services, all.Places...)
	t.policies = all.Policies
	return t
}

func inOrder(known map[string]any) (all Changes) {
	for _, name := range slices.Sorted(maps.Keys(known)) {
		switch x := known[name].(type) {
		case *Workload:
			all.Workloads = append(all.Workloads, x)
		case *Service:
			all.Services = append(all.Services, x)
		case *Place:
			all.Places = append(all.Places, x)
		case *Policy:
			all.Policies = append(all.Policies, x)
		}
	}
	return all
}

// changes makes up some, and does the same to known.
func (r *dice) changes(known map[string]any) (c Changes) {
	done := map[string]bool{}
	for range r.IntN(8) {
		name := r.name()
		if done[name] {
			continue
		}
		done[name] = true
		switch r.IntN(9) {
		case 8:
			p := r.policy(name)
			key := "policy " + p.Key()
			_, had := known[key]
			switch {
			case done[key]:
			case had && r.flip():
				c.GonePolicies = append(c.GonePolicies, p.Key())
				delete(known, key)
			default:
				c.Policies = append(c.Policies, p)
				known[key] = p
			}
			done[key] = true
		case 0, 1:
			c.Gone = append(c.Gone, name)
			delete(known, name)
		case 2, 3:
			s := r.service(name)
			c.Services = append(c.Services, s)
			known[name] = s
		case 4:
			p := r.place(name)
			c.Places = append(c.Places, p)
			known[name] = p
		default:
			w := r.workload(name)
			c.Workloads = append(c.Workloads, w)
			known[name] = w
		}
	}
	return c
}

// parts divides changes into one or several.
func (r *dice) parts(c Changes) []Changes {
	if r.flip() {
		return []Changes{c}
	}
	i, j, k, l := r.IntN(len(c.Workloads)+1), r.IntN(len(c.Services)+1), r.IntN(len(c.Places)+1), r.IntN(len(c.Gone)+1)
	m, n := r.IntN(len(c.Policies)+1), r.IntN(len(c.GonePolicies)+1)
	part := Changes{c.Workloads[:i], c.Services[:j], c.Places[:k], c.Policies[:m], c.Gone[:l], c.GonePolicies[:n], true}
	return append([]Changes{part}, r.parts(Changes{c.Workloads[i:], c.Services[j:], c.Places[k:], c.Policies[m:], c.Gone[l:], c.GonePolicies[n:], false})...)
}

// name is one that anything may have: what was a pod may be a service next.
func (r *dice) name() string { return fmt.Sprintf("d/%d", r.IntN(10)) }

func (r *dice) flip() bool { return r.IntN(2) == 0 }

var (
	testAddresses = []netip.Addr{addr("10.0.0.1"), addr("10.0.0.2"), addr("10.0.1.1"), addr("10.0.1.2"), addr("::ffff:10.0.0.1"), addr("fd00::1"), addr("fd00::2"), addr("0.0.0.0")}
	testPorts     = []uint16{80, 81, 443}
	testNodes     = []string{"", "n1", "n2"}
	testRanges    = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.1.1/24"), netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd00::/64")}
)

var testRevoked = []ID{{"t", "d", "a"}, {"t", "d", "b"}, {"t", "e", "a"}}

func pick[T any](r *dice, most int, from []T) (some []T) {
	for range r.IntN(most + 1) {
		some = append(some, from[r.IntN(len(from))])
	}
	return some
}

func (r *dice) port() uint16 { return testPorts[r.IntN(len(testPorts))] }

func (r *dice) workload(uid string) *Workload {
	w := &Workload{
		UID: uid, Namespace: "d", Name: []string{uid[2:], "x"}[r.IntN(2)], Node: testNodes[r.IntN(3)], Zone: []string{"", "z"}[r.IntN(2)],
		Addresses: pick(r, 2, testAddresses), ID: ID{"lab", "d", fmt.Sprint(r.IntN(2))}, Direct: r.flip(), Enrolled: r.flip(), Ready: r.IntN(3) > 0,
		MarkedPorts: r.IntN(4) == 0, HostNetwork: r.IntN(8) == 0, OwnerName: []string{"", "web"}[r.IntN(2)], Cluster: "c",
	}
	if r.IntN(4) == 0 {
		w.ExcludeInbound, w.ExcludeOutbound = pick(r, 2, testPorts), []Exclusion{{Port: r.port()}}
	}
	if r.IntN(4) == 0 {
		w.Listed, w.Of = true, []string{"", r.name()}[r.IntN(2)]
	}
	for range r.IntN(3) {
		if w.Services == nil {
			w.Services = map[string][]Port{}
		}
		w.Services[r.name()] = []Port{{r.port(), r.port()}, {r.port(), r.port()}}[:1+r.IntN(2)]
	}
	for range r.IntN(3) {
		w.Policies = append(w.Policies, r.name())
	}
	if r.IntN(4) == 0 {
		w.Mode = &Mode{Inbound: []Level{Inherited, Permissive, Strict}[r.IntN(3)], Admit: []Admission{{Port: r.port()}}}
	}
	for range r.IntN(2) {
		p := HostPort{Port: r.port(), Target: uint16(8000 + r.IntN(9))}
		if r.flip() {
			p.Address = testAddresses[r.IntN(4)]
		}
		w.HostPorts = append(w.HostPorts, p)
	}
	return w
}

func (r *dice) service(key string) *Service {
	s := &Service{Namespace: "d", Hostname: key[2:], Addresses: pick(r, 2, testAddresses), External: pick(r, 2, testAddresses), NodeLocal: r.flip()}
	for range r.IntN(3) {
		s.Ports = append(s.Ports, Port{r.port(), r.port()})
	}
	for range r.IntN(2) {
		s.NodePorts = append(s.NodePorts, NodePort{r.port(), r.port()})
	}
	if r.IntN(4) == 0 {
		s.HealthPort = r.port()
	}
	return s
}

// policy has a name that anything else may have, too.
func (r *dice) policy(key string) *Policy {
	p := &Policy{Namespace: "d", Name: key[2:], Scope: []Scope{WholeMesh, WholeNamespace, Named}[r.IntN(3)], Action: []Action{Allow, Deny}[r.IntN(2)]}
	if r.flip() {
		p.Namespace = "other"
	}
	return p
}

func (r *dice) place(name string) *Place {
	p := &Place{Name: name, Node: testNodes[r.IntN(3)], Addresses: pick(r, 3, testAddresses), Contested: r.IntN(3) == 0, Ranges: pick(r, 2, testRanges)}
	if r.flip() {
		p.NodePorts = NodePorts{r.port(), 443}
	}
	p.Trust = Trust{Revoked: pick(r, 2, testRevoked), MaxAge: time.Duration(r.IntN(3)) * time.Hour}
	return p
}

// differ says how the two answer differently, nil if they do not.
func differ(w *World, want *truth, now time.Time) error {
	for _, a := range testAddresses {
		if a.IsUnspecified() {
			continue
		}
		if err := differAt(w, want, a, now); err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
	}
	for i := range 10 {
		key := fmt.Sprintf("d/%d", i)
		s := &Service{Namespace: "d", Hostname: key[2:]}
		if got, want := w.ServiceNamed(key), want.ServiceNamed(key); got != want {
			return fmt.Errorf("service %s is %+v: want %+v", key, got, want)
		}
		for _, port := range testPorts {
			if got, want := endpoints(w.Endpoints(s, port)), endpointsTold(want.Endpoints(s, port)); !slices.Equal(got, want) {
				return fmt.Errorf("endpoints of %s:%d: %v, want %v", key, port, got, want)
			}
		}
	}
	for p := range w.Workloads() {
		got, unknown := w.PoliciesOf(p)
		if all, none := want.PoliciesOf(p); !reflect.DeepEqual(got, all) || !slices.Equal(unknown, none) {
			return fmt.Errorf("policies of %s: %v and unknown %v, want %v and %v", p.UID, got, unknown, all, none)
		}
	}
	for _, id := range testRevoked {
		if got, want := w.IsRevoked(id), slices.Contains(want.trust.Revoked, id); got != want {
			return fmt.Errorf("%s revoked %v: want %v", id, got, want)
		}
	}
	if got := w.MaxAge(); got != want.trust.MaxAge {
		return fmt.Errorf("connections may be %s old: want %s", got, want.trust.MaxAge)
	}
	if got, want := w.HasStrict(), slices.ContainsFunc(slices.Collect(w.Workloads()), func(p *Peer) bool { return p.Mode != nil && p.Mode.Inbound == Strict }); got != want {
		return fmt.Errorf("a workload is strict: %v", got)
	}
	for _, p := range testRanges {
		if got, want := w.HasNodeIn(p), want.HasNodeIn(p); got != want {
			return fmt.Errorf("a node in %s: %v", p, got)
		}
	}
	if got, want := len(slices.Collect(w.Services())), len(want.named); got != want {
		return fmt.Errorf("%d services: want %d", got, want)
	}
	return nil
}

func differAt(w *World, want *truth, a netip.Addr, now time.Time) error {
	if got, want := w.Workload(a), want.Workload(a); !is(got, want) {
		return fmt.Errorf("pod %+v: want %+v", got, want)
	}
	if got, want := w.Service(a), want.Service(a); got != want {
		return fmt.Errorf("service %+v: want %+v", got, want)
	}
	if w.IsNode(a) != want.IsNode(a) || w.Contested(a) != want.Contested(a) {
		return fmt.Errorf("a node's %v, contested %v", w.IsNode(a), w.Contested(a))
	}
	for _, port := range testPorts {
		to := netip.AddrPortFrom(a, port)
		in, ok := w.Inlet(to)
		wantIn, wantOK := want.Inlet(to)
		if in != wantIn || ok != wantOK {
			return fmt.Errorf("port %d leads to %+v: want %+v", port, in, wantIn)
		}
		pod, target := w.HostPort(to)
		wantPod, wantTarget := want.HostPort(to)
		if !is(pod, wantPod) || target != wantTarget {
			return fmt.Errorf("port %d leads to %+v at %d: want %+v at %d", port, pod, target, wantPod, wantTarget)
		}
		if got, want := w.IsOurs(to), want.IsOurs(to); got != want {
			return fmt.Errorf("port %d ours %v: want %v", port, got, want)
		}
		if got, want := w.Former(to, now), want.Former(to, now); got != want {
			return fmt.Errorf("port %d former %v: want %v", port, got, want)
		}
	}
	return nil
}

// is reports whether the Peer is the workload.
func is(p *Peer, w *Workload) bool {
	if p == nil || w == nil {
		return p == nil && w == nil
	}
	return reflect.DeepEqual(p.Workload(), w)
}

func endpoints(list []Endpoint) (all []string) {
	for _, e := range list {
		all = append(all, fmt.Sprint(e.Workload.UID, e.Port))
	}
	return all
}

func endpointsTold(list []told) (all []string) {
	for _, e := range list {
		all = append(all, fmt.Sprint(e.workload.UID, e.port))
	}
	return all
}

// isLean reports an error if the World shares less than it may, or has left over what
// nothing leads to.
func (w *World) isLean() error {
	kinds, spots := map[*Kind]int{}, map[*Spot]int{}
	for p := range w.Workloads() {
		kinds[p.Kind]++
		spots[p.Spot]++
	}
	for _, u := range w.kinds.all.all() {
		if kinds[u.value] != u.count {
			return fmt.Errorf("%d have the kind %+v: counted %d", kinds[u.value], u.value, u.count)
		}
	}
	for _, u := range w.spots.all.all() {
		if spots[u.value] != u.count {
			return fmt.Errorf("%d have the spot %+v: counted %d", spots[u.value], u.value, u.count)
		}
		delete(spots, u.value)
	}
	if len(spots) > 0 {
		return fmt.Errorf("spots that are not shared: %v", spots)
	}
	return nil
}
