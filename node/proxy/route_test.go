package proxy

import (
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
	self := &mesh.Workload{Name: "self", Direct: true, Ready: true, Addresses: addrs("10.1.0.1", "fd01::1"), Services: serves(svc)}
	peer := &mesh.Workload{Name: "peer", Direct: true, ExcludeInbound: []uint16{9100}, Ready: true, Addresses: addrs("10.1.0.2"), Services: serves(four)}
	plain := &mesh.Workload{Name: "plain", Ready: true, Addresses: addrs("10.1.0.3", "fd01::3")}
	gone := &mesh.Workload{Name: "gone", Direct: true, Addresses: addrs("10.1.0.4"), Services: serves(four)}
	former := &mesh.Workload{Name: "former", Addresses: addrs("10.1.0.5")}
	before := mesh.NewWorld([]*mesh.Workload{former, peer}, nil)
	w := mesh.NewWorld([]*mesh.Workload{self, peer, plain, gone}, []*mesh.Service{svc, empty, four}).After(before, time.Now())
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
		{"10.1.0.2:15101", "capture_port", false, false},
		{"192.0.2.1:15106", "capture_port", false, false},
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
