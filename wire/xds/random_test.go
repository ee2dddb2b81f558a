package xds

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"tacit.dev/mesh"
)

// randomMesh changes a snapshot at random, as a cluster does.
type randomMesh struct {
	*rand.Rand
	workloads map[string]*mesh.Workload
	services  map[string]*mesh.Service
	policies  map[string]*mesh.Policy
	pods      map[string]map[string]mesh.Pod
}

func newRandomMesh(seed uint64) *randomMesh {
	return &randomMesh{
		Rand:      rand.New(rand.NewPCG(seed, 0)),
		workloads: map[string]*mesh.Workload{},
		services:  map[string]*mesh.Service{},
		policies:  map[string]*mesh.Policy{},
		pods:      map[string]map[string]mesh.Pod{"n1": {}, "n2": {}, "n3": {}},
	}
}

// step changes up to n things.
func (r *randomMesh) step(n int) {
	for range r.IntN(n + 1) {
		switch i := r.IntN(40); r.IntN(5) {
		case 0:
			w := r.workload(i)
			r.workloads[w.UID] = w
		case 4:
			p := r.policy(i % 10)
			r.policies[p.Key()] = p
			if r.IntN(3) == 0 {
				delete(r.policies, p.Key())
			}
		case 1:
			delete(r.workloads, r.workload(i).UID)
		case 2:
			s := r.service(i % 10)
			r.services[s.Key()] = s
			if r.IntN(3) == 0 {
				delete(r.services, s.Key())
			}
		case 3:
			p := r.pod(i)
			node := fmt.Sprintf("n%d", 1+i%3)
			r.pods[node][p.UID] = p
			if r.IntN(3) == 0 {
				delete(r.pods[node], p.UID)
			}
		}
	}
}

func (r *randomMesh) flip() bool { return r.IntN(2) == 0 }

func (r *randomMesh) workload(i int) *mesh.Workload {
	w := &mesh.Workload{
		UID: fmt.Sprintf("Kubernetes//Pod/default/p%d", i), Namespace: "default", Name: fmt.Sprintf("p%d", i), Node: "n1",
		ID:    mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: fmt.Sprintf("sa%d", r.IntN(3))},
		Ready: r.flip(), Direct: r.flip(), HostNetwork: r.IntN(10) == 0,
		OwnerName: "web", OwnerKind: []string{"deployment", "pod", "job", "cronjob"}[r.IntN(4)],
		CanonicalName: "web", CanonicalRevision: "v1", Cluster: "Kubernetes",
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})},
	}
	w.Enrolled = w.Direct || r.flip()
	if w.Direct && r.flip() {
		w.ExcludeInbound = []uint16{uint16(9000 + r.IntN(3)), 65535}
		w.MarkedPorts = r.flip()
		w.ExcludeOutbound = []mesh.Exclusion{{Port: 53}, {Prefix: netip.MustParsePrefix("10.0.0.0/8"), Port: uint16(r.IntN(3))}}
	}
	if r.flip() {
		w.Addresses = append(w.Addresses, netip.MustParseAddr(fmt.Sprintf("fd00::%x", i+1)))
	}
	if r.IntN(4) == 0 {
		w.HostPorts = []mesh.HostPort{{Port: 80, Target: uint16(8080 + r.IntN(3))}, {Address: netip.MustParseAddr("172.30.0.1"), Port: 443, Target: 8443}}
	}
	if !w.Enrolled && r.flip() {
		w.Listed, w.HostNetwork, w.ID, w.Of = true, false, mesh.ID{}, []string{"", "Kubernetes//Pod/default/p1"}[r.IntN(2)]
	}
	if r.flip() {
		w.Services = map[string][]mesh.Port{
			r.service(r.IntN(10)).Key(): {{Service: 80, Target: uint16(8080 + r.IntN(3))}, {Service: 443, Target: 8443}},
		}
	}
	for range r.IntN(3) {
		w.Policies = append(w.Policies, r.policy(r.IntN(10)).Key())
	}
	if r.IntN(4) == 0 {
		w.Mode = r.mode()
	}
	return w
}

// policy has the name of a service: nothing may take the one for the other.
func (r *randomMesh) policy(i int) *mesh.Policy {
	s := r.service(i)
	p := &mesh.Policy{Namespace: s.Namespace, Name: s.Hostname, Scope: []mesh.Scope{mesh.WholeMesh, mesh.WholeNamespace, mesh.Named}[r.IntN(3)],
		Action: []mesh.Action{mesh.Allow, mesh.Deny}[r.IntN(2)], DryRun: r.IntN(8) == 0}
	if p.Scope != mesh.Named && r.IntN(3) == 0 {
		p.Action, p.DryRun, p.Mode = mesh.Deny, false, r.mode()
		return p
	}
	for range r.IntN(3) {
		p.Rules = append(p.Rules, r.rule(p.Action))
	}
	return p
}

func (r *randomMesh) mode() *mesh.Mode {
	levels := []mesh.Level{mesh.Inherited, mesh.Permissive, mesh.Strict}
	m := &mesh.Mode{Inbound: levels[r.IntN(3)], Outbound: levels[r.IntN(3)], Outside: levels[r.IntN(3)]}
	for range r.IntN(3) {
		m.Ports = append(m.Ports, mesh.PortLevel{Port: uint16(1 + r.IntN(9000)), Level: levels[1+r.IntN(2)]})
		m.Admit = append(m.Admit, mesh.Admission{Port: uint16(r.IntN(2) * 80), From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::1/128")}[:r.IntN(3)]})
		m.Allowed = append(m.Allowed, mesh.Exclusion{Port: 443}, mesh.Exclusion{Prefix: netip.MustParsePrefix("192.0.2.0/24")})
	}
	for i := range m.Admit {
		if len(m.Admit[i].From) == 0 {
			m.Admit[i].From = nil
		}
	}
	return m
}

func (r *randomMesh) rule(action mesh.Action) (rule mesh.Rule) {
	if r.IntN(6) == 0 {
		rule.Unenforceable = "a field of HTTP"
		if action == mesh.Allow {
			rule.Clauses = []mesh.Clause{{{}}}
			return rule
		}
	}
	for range r.IntN(3) {
		c := mesh.Clause{}
		for range r.IntN(3) {
			c = append(c, r.match())
		}
		rule.Clauses = append(rule.Clauses, c)
	}
	return rule
}

func (r *randomMesh) match() (m mesh.Match) {
	patterns := func() (all []mesh.Pattern) {
		for range max(0, r.IntN(6)-3) {
			all = append(all, []mesh.Pattern{{Text: "a"}, {Kind: mesh.Prefix, Text: "a/"}, {Kind: mesh.Suffix, Text: "/b"}, {Kind: mesh.Present}}[r.IntN(4)])
		}
		return all
	}
	ranges := func() (all []netip.Prefix) {
		for range max(0, r.IntN(6)-3) {
			all = append(all, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("fd00::/64")}[r.IntN(3)])
		}
		return all
	}
	m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals = patterns(), patterns(), patterns(), patterns()
	m.SourceIPs, m.NotSourceIPs, m.DestinationIPs, m.NotDestinationIPs = ranges(), ranges(), ranges(), ranges()
	if r.flip() {
		m.DestinationPorts, m.NotDestinationPorts = []uint16{8080, 65535}, []uint16{1}
		m.ServiceAccounts, m.NotServiceAccounts = []mesh.ServiceAccount{{Namespace: "a", Name: "b"}}, []mesh.ServiceAccount{{Namespace: "c", Name: "d"}}
	}
	return m
}

func (r *randomMesh) service(i int) *mesh.Service {
	s := &mesh.Service{Namespace: "default", Name: fmt.Sprintf("s%d", i), Hostname: fmt.Sprintf("s%d.default.svc.cluster.local", i)}
	if r.flip() {
		s.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 31, 0, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:31::%x", i+1))}
	}
	if r.IntN(3) == 0 {
		s.External = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
		s.NodePorts, s.NodeLocal = []mesh.NodePort{{Node: uint16(30000 + i), Service: 80}}, r.flip()
	}
	s.HealthPort = uint16(r.IntN(2) * (30000 + i))
	if r.flip() {
		s.Ports = []mesh.Port{{Service: 80, Target: uint16(r.IntN(2) * 8080)}}
	}
	return s
}

func (r *randomMesh) place(i int) *mesh.Place {
	p := &mesh.Place{Name: fmt.Sprintf("Kubernetes//Node/n%d", i), Contested: r.flip()}
	if r.flip() {
		p.Node, p.Addresses = fmt.Sprintf("n%d", i), []netip.Addr{netip.AddrFrom4([4]byte{172, 30, 0, byte(i)})}
	}
	if r.flip() {
		p.Ranges = []netip.Prefix{netip.MustParsePrefix("10.30.0.0/16"), netip.MustParsePrefix("fd00:30::/64")}
	}
	if r.flip() {
		p.NodePorts = mesh.NodePorts{First: 30000, Last: uint16(30000 + r.IntN(3))}
	}
	if r.flip() {
		p.Trust = mesh.Trust{Revoked: []mesh.ID{{TrustDomain: "lab", Namespace: "a", ServiceAccount: fmt.Sprintf("sa-%d", r.IntN(3))}}, MaxAge: time.Duration(r.IntN(3)) * time.Hour}
	}
	return p
}

func (r *randomMesh) pod(i int) mesh.Pod {
	p := mesh.Pod{
		UID: fmt.Sprintf("uid-%d", i), Namespace: "default", Name: fmt.Sprintf("p%d", i),
		ID: mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "sa"}, Enroll: r.flip(),
	}
	if r.flip() {
		p.ExcludeInbound = []uint16{uint16(1 + r.IntN(65535))}
		p.ProbePorts = []uint16{uint16(1 + r.IntN(65535))}
		p.Known = []netip.Addr{netip.AddrFrom4([4]byte{10, 30, 0, byte(r.IntN(256))}), netip.MustParseAddr(fmt.Sprintf("fd00:30::%x", i+1))}
		p.ExcludeOutbound = []mesh.Exclusion{{Port: 53}, {Prefix: netip.MustParsePrefix("10.0.0.0/8")},
			{Prefix: netip.MustParsePrefix("fd00::/64"), Port: uint16(r.IntN(3))}}
	}
	return p
}

// snapshot is ordered, so that it can be compared.
func (r *randomMesh) snapshot() Snapshot {
	snap := Snapshot{Pods: map[string][]mesh.Pod{}}
	for _, w := range r.workloads {
		snap.Workloads = append(snap.Workloads, w)
	}
	slices.SortFunc(snap.Workloads, func(a, b *mesh.Workload) int { return cmp.Compare(a.UID, b.UID) })
	for _, s := range r.services {
		snap.Services = append(snap.Services, s)
	}
	slices.SortFunc(snap.Services, func(a, b *mesh.Service) int { return cmp.Compare(a.Key(), b.Key()) })
	for _, p := range r.policies {
		snap.Policies = append(snap.Policies, p)
	}
	slices.SortFunc(snap.Policies, func(a, b *mesh.Policy) int { return cmp.Compare(a.Key(), b.Key()) })
	for node, pods := range r.pods {
		for _, p := range pods {
			snap.Pods[node] = append(snap.Pods[node], p)
		}
		slices.SortFunc(snap.Pods[node], func(a, b mesh.Pod) int { return cmp.Compare(a.UID, b.UID) })
	}
	return snap
}
