package proxy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func addrs(s ...string) (a []netip.Addr) {
	for _, x := range s {
		a = append(a, netip.MustParseAddr(x))
	}
	return a
}

func TestFind(t *testing.T) {
	svc := &mesh.Service{Namespace: "default", Name: "web", Hostname: "web.default", Addresses: addrs("10.96.0.1", "fd96::1")}
	empty := &mesh.Service{Namespace: "default", Name: "empty", Hostname: "empty.default", Addresses: addrs("10.96.0.2")}
	four := &mesh.Service{Namespace: "default", Name: "four", Hostname: "four.default", Addresses: addrs("10.96.0.3", "fd96::3")}
	serves := func(s *mesh.Service) map[string][]mesh.Port {
		return map[string][]mesh.Port{s.Key(): {{Service: 80, Target: 8080}}}
	}
	self := &mesh.Workload{UID: "self", Name: "self", Direct: true, Ready: true, Addresses: addrs("10.1.0.1", "fd01::1"), Services: serves(svc)}
	peer := &mesh.Workload{UID: "peer", Name: "peer", Direct: true, ExcludeInbound: []uint16{9100}, Ready: true, Addresses: addrs("10.1.0.2"), Services: serves(four)}
	plain := &mesh.Workload{UID: "plain", Name: "plain", Ready: true, Addresses: addrs("10.1.0.3", "fd01::3")}
	gone := &mesh.Workload{UID: "gone", Name: "gone", Direct: true, Addresses: addrs("10.1.0.4"), Services: serves(four)}
	former := &mesh.Workload{UID: "former", Name: "former", Addresses: addrs("10.1.0.5")}
	before := mesh.NewWorld([]*mesh.Workload{former, peer}, nil)
	w := before.With(mesh.Changes{Workloads: []*mesh.Workload{self, plain, gone}, Services: []*mesh.Service{svc, empty, four}, Gone: []string{former.UID}}, time.Now())
	c := caller{addresses: self.Addresses, pick: rand.IntN}
	for _, row := range []struct {
		to     string
		want   string // address, or reason of the refusal
		direct bool
		inside bool
	}{
		{"10.1.0.2:80", "10.1.0.2:80", true, true},
		{"10.1.0.2:9100", "10.1.0.2:9100", false, true}, // not captured there
		{"10.1.0.4:80", "10.1.0.4:80", true, true},      // not ready, but dialled by its address
		{"10.1.0.3:80", "10.1.0.3:80", false, true},
		{"10.1.0.1:80", "10.1.0.1:80", false, true},
		{"192.0.2.1:443", "192.0.2.1:443", false, false},
		{"10.96.0.1:80", "10.1.0.1:8080", false, true}, // its own service leads to itself
		{"[fd96::1]:80", "[fd01::1]:8080", false, true},
		{"10.96.0.3:80", "10.1.0.2:8080", true, true},
		{"[fd96::3]:80", "no_endpoint", false, true}, // none of that family
		{"10.96.0.3:81", "no_endpoint", false, true},
		{"10.96.0.2:80", "no_endpoint", false, true},
		{"10.96.0.9:80", "10.96.0.9:80", false, false},
		{"10.1.0.5:80", "former_address", false, true},
		{"10.1.0.1:15106", "capture_port", false, false}, // the pod's own listeners
		{"127.0.0.1:15101", "capture_port", false, false},
		{"10.1.0.2:15101", "10.1.0.2:15101", true, true}, // servers elsewhere
		{"192.0.2.1:15106", "192.0.2.1:15106", false, false},
	} {
		r, err := c.find(w, netip.MustParseAddrPort(row.to))
		got := ""
		if err != nil {
			got = refusalOf(err).reason
		} else {
			got = r.targets[0].addr.String()
			if r.targets[0].direct != row.direct {
				t.Errorf("%s: direct %v", row.to, r.targets[0].direct)
			}
		}
		if got != row.want || r.inside != row.inside {
			t.Errorf("%s leads to %s (inside %v): want %s", row.to, got, r.inside, row.want)
		}
	}
}

// Of an address the World knows one of three things; this is what is done with each.
func TestFindKnowsThreeThings(t *testing.T) {
	serve := func(s *mesh.Service, target uint16) map[string][]mesh.Port {
		return map[string][]mesh.Port{s.Key(): {{Service: 80, Target: target}}}
	}
	ports := []mesh.Port{{Service: 80}}
	lb := &mesh.Service{Namespace: "d", Hostname: "lb", Addresses: addrs("10.96.0.1"), External: addrs("192.0.2.10", "172.16.0.1"), Ports: ports,
		NodePorts: []mesh.NodePort{{Node: 30080, Service: 80}}, Reach: mesh.SameNode}
	local := &mesh.Service{Namespace: "d", Hostname: "local", Addresses: addrs("10.96.0.2"), Ports: ports, NodeLocal: true,
		NodePorts: []mesh.NodePort{{Node: 30081, Service: 80}}}
	listed := &mesh.Service{Namespace: "d", Hostname: "listed", Addresses: addrs("10.96.0.3", "10.96.0.4", "10.96.0.5"), Ports: ports}
	second := &mesh.Service{Namespace: "d", Hostname: "second", Addresses: addrs("10.96.0.6"), Ports: ports}
	away := &mesh.Service{Namespace: "d", Hostname: "away", Addresses: addrs("10.96.0.7"), Ports: ports}
	healthy := &mesh.Service{Namespace: "d", Hostname: "healthy", HealthPort: 30090}
	gone := &mesh.Service{Namespace: "d", Hostname: "gone", Addresses: addrs("10.96.0.8"), External: addrs("192.0.2.11"), Ports: ports,
		NodePorts: []mesh.NodePort{{Node: 30082, Service: 80}}}
	a := &mesh.Workload{UID: "a", Node: "n1", Direct: true, Ready: true, Addresses: addrs("10.1.1.2"), Services: serve(lb, 8080)}
	b := &mesh.Workload{UID: "b", Node: "n2", Direct: true, Ready: true, Addresses: addrs("10.1.2.2"), Services: serve(local, 8081),
		HostPorts: []mesh.HostPort{{Port: 8443, Target: 443}, {Address: addrs("172.16.0.9")[0], Port: 8444, Target: 444}}}
	// Endpoints of hand-made slices, at addresses that lead on to pods.
	virtual := map[string]*mesh.Service{}
	var onward []*mesh.Workload
	for i, row := range []struct {
		name, addr string
		port       uint16
	}{
		{"own", "10.96.0.2", 80}, {"balancer", "192.0.2.10", 80}, {"nodePort", "172.16.0.2", 30081}, {"hostPort", "172.16.0.2", 8443},
		{"process", "172.16.0.2", 22}, {"circle", "172.16.0.2", 30083}, {"left", "192.0.2.11", 80},
		{"unknown", "172.16.0.2", 30099}, {"declared", "172.16.0.2", 31000},
	} {
		s := &mesh.Service{Namespace: "d", Hostname: row.name, Addresses: addrs(fmt.Sprintf("10.96.1.%d", i)), Ports: ports}
		if row.name == "circle" {
			s.NodePorts = []mesh.NodePort{{Node: 30083, Service: 80}}
		}
		virtual[row.name] = s
		onward = append(onward, &mesh.Workload{UID: row.name, Listed: true, Ready: true, Addresses: addrs(row.addr), Services: serve(s, row.port)})
	}
	ofPod := &mesh.Workload{UID: "l1", Listed: true, Ready: true, Addresses: addrs("10.1.2.2"), Services: serve(listed, 15106)}
	otherAddress := &mesh.Workload{UID: "l2", Listed: true, Of: "a", Ready: true, Addresses: addrs("10.9.9.9"), Services: serve(second, 8084)}
	exporter := &mesh.Workload{UID: "e", Node: "n2", HostNetwork: true, Ready: true, Addresses: addrs("172.16.0.2"), HostPorts: []mesh.HostPort{{Port: 31000, Target: 31000}}}
	outsider := &mesh.Workload{UID: "l3", Listed: true, Ready: true, Addresses: addrs("10.1.9.9"), Services: serve(away, 5432)}
	places := []*mesh.Place{
		{Name: "n1", Node: "n1", Addresses: addrs("172.16.0.1"), Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}},
		{Name: "n2", Node: "n2", Addresses: addrs("172.16.0.2", "10.1.2.1"), Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}},
		{Name: "cluster", Ranges: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("10.1.9.0/24")}, NodePorts: mesh.NodePorts{First: 30000, Last: 32767}},
		{Name: "contested", Contested: true, Addresses: addrs("10.1.1.66")},
	}
	w := mesh.NewWorld(nil, []*mesh.Service{gone}).With(mesh.Changes{
		Workloads: append(onward, a, b, ofPod, otherAddress, outsider, exporter), Places: places, Gone: []string{gone.Key()},
		Services: slices.AppendSeq([]*mesh.Service{lb, local, listed, second, away, healthy}, maps.Values(virtual)),
	}, time.Now())
	for _, row := range []struct {
		to     string
		node   string // of the caller
		want   string
		direct bool
	}{
		// Known: what leads to pods from outside of the cluster.
		{"192.0.2.10:80", "n9", "10.1.1.2:8080", true}, // though its own address is for the same node only
		{"10.96.0.1:80", "n9", "no_endpoint", false},
		{"172.16.0.1:80", "n9", "10.1.1.2:8080", true}, // an external address that is a node's
		{"172.16.0.2:30080", "n9", "10.1.1.2:8080", true},
		{"172.16.0.2:30081", "n9", "10.1.2.2:8081", true}, // of its own node
		{"172.16.0.1:30081", "n9", "no_endpoint", false},
		{"172.16.0.1:30081", "n1", "10.1.2.2:8081", true}, // from the node itself
		{"172.16.0.2:8443", "n9", "10.1.2.2:443", true},
		{"172.16.0.1:8443", "n9", "172.16.0.1:8443", false},   // not on that node
		{"172.16.0.2:8444", "n9", "172.16.0.2:8444", false},   // not at that address
		{"172.16.0.2:22", "n9", "172.16.0.2:22", false},       // a process of the node
		{"10.1.2.1:22", "n9", "10.1.2.1:22", false},           // the node's, in the range of its pods
		{"172.16.0.2:31000", "n9", "172.16.0.2:31000", false}, // a pod of the node's own network says that it listens there
		{"172.16.0.1:30090", "n9", "172.16.0.1:30090", false}, // kube-proxy itself
		{"172.16.0.1:29999", "n9", "172.16.0.1:29999", false},
		{"172.16.0.1:32768", "n9", "172.16.0.1:32768", false},
		{"192.0.2.1:30099", "n9", "192.0.2.1:30099", false}, // no node's
		// Known: what services list.
		{"10.96.0.3:80", "n9", "10.1.2.2:15106", true},
		{"10.96.0.6:80", "n9", "10.9.9.9:8084", true}, // another address of a pod's own
		{"10.96.0.7:80", "n9", "10.1.9.9:5432", false},
		// Known: what services list, and leads on. In the clear kube-proxy would lead it to a pod of the mesh.
		{"10.96.1.0:80", "n9", "no_endpoint", false}, // a service's own address: as with kube-proxy, nothing is behind it
		{"10.96.1.1:80", "n9", "10.1.1.2:8080", true},
		{"10.96.1.2:80", "n9", "10.1.2.2:8081", true},
		{"10.96.1.3:80", "n9", "10.1.2.2:443", true},
		{"10.96.1.4:80", "n9", "172.16.0.2:22", false},
		{"10.96.1.5:80", "n9", "no_endpoint", false}, // leads to itself
		{"10.96.1.6:80", "n9", "no_endpoint", false}, // to one that is gone
		{"10.96.1.7:80", "n9", "no_endpoint", false}, // to a port of the node's that nobody is known to have
		{"10.96.1.8:80", "n9", "172.16.0.2:31000", false},
		// Known not to be ours.
		{"192.0.2.10:81", "n9", "192.0.2.10:81", false},
		{"192.0.2.1:443", "n9", "192.0.2.1:443", false},
		// Not known.
		{"10.1.1.3:80", "n9", "unknown_address", false},
		{"10.1.9.9:5432", "n9", "unknown_address", false}, // listed as an endpoint, and known as nothing else
		{"10.96.0.99:80", "n9", "unknown_address", false},
		{"172.16.0.1:30099", "n9", "unknown_address", false},
		{"10.1.2.1:30000", "n9", "unknown_address", false},
		{"172.16.0.1:32767", "n9", "unknown_address", false},
		{"172.16.0.1:31000", "n9", "unknown_address", false}, // it listens at another node
		{"10.1.1.66:80", "n9", "contested_address", false},
		{"10.96.0.8:80", "n9", "former_address", false},
		{"192.0.2.11:80", "n9", "former_address", false},
		{"192.0.2.11:81", "n9", "192.0.2.11:81", false},
		{"172.16.0.2:30082", "n9", "former_address", false},
	} {
		c := caller{addresses: addrs("10.1.1.200"), node: row.node, pick: rand.IntN}
		r, err := c.find(w, netip.MustParseAddrPort(row.to))
		got, direct := "", false
		if err != nil {
			got = refusalOf(err).reason
		} else {
			got, direct = r.targets[0].addr.String(), r.targets[0].direct
		}
		if got != row.want || direct != row.direct {
			t.Errorf("%s from %s leads to %s, direct %v: want %s, direct %v", row.to, row.node, got, direct, row.want, row.direct)
		}
		if err == nil && row.to == "10.96.0.7:80" && r.targets[0].workload != nil {
			t.Errorf("an address that is no pod's is taken for %+v", r.targets[0].workload)
		}
	}
}

func TestSampleIsEvenAndDistinct(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	pick := rand.New(rand.NewPCG(seed, 1)).IntN
	first := make([]int, 10)
	for range 10_000 {
		s := sample(10, 4, pick)
		first[s[0]]++
		slices.Sort(s)
		if len(slices.Compact(s)) != 4 {
			t.Fatalf("sample %v", s)
		}
	}
	for i, n := range first {
		if n < 800 || n > 1200 {
			t.Errorf("%d was first %d times of 10000: want about 1000", i, n)
		}
	}
	if s := sample(0, 4, pick); len(s) != 0 {
		t.Errorf("sample of none: %v", s)
	}
	if s := sample(2, 4, pick); len(s) != 2 {
		t.Errorf("sample of two: %v", s)
	}
}
