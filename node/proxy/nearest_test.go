package proxy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func endpointsOf(words ...string) (list []mesh.Endpoint) {
	for _, w := range words { // NAME@NODE/ZONE
		name, place, _ := strings.Cut(w, "@")
		node, zone, _ := strings.Cut(place, "/")
		list = append(list, mesh.Endpoint{Workload: (&mesh.Workload{UID: name, Node: node, Zone: zone}).Peer(), Port: 80})
	}
	return list
}

func namesOf(list []mesh.Endpoint) string {
	var names []string
	for _, e := range list {
		names = append(names, e.Workload.UID)
	}
	return strings.Join(names, " ")
}

// The caller is on node n1 of zone z1.
func TestNearAsKubeProxy(t *testing.T) {
	for _, row := range []struct {
		reach     mesh.Reach
		endpoints string
		want      string
	}{
		{mesh.Everywhere, "a@n1/z1 b@n2/z1 c@n3/z2", "a b c"},
		{mesh.SameNode, "a@n1/z1 b@n2/z1 c@n3/z2", "a"},
		{mesh.SameNode, "b@n2/z1 c@n3/z2", ""},
		{mesh.PreferNode, "a@n1/z1 b@n2/z1 c@n3/z2", "a"},
		{mesh.PreferNode, "b@n2/z1 c@n3/z2", "b"},
		{mesh.PreferNode, "c@n3/z2", "c"},
		{mesh.PreferZone, "a@n1/z1 b@n2/z1 c@n3/z2", "a b"},
		{mesh.PreferZone, "c@n3/z2 d@n4/z3", "c d"},
		{mesh.PreferZone, "a@n1/z1 c@n3/z2 d@n4", "a c d"}, // a zone is not known
	} {
		if got := namesOf(near(&mesh.Service{Reach: row.reach}, endpointsOf(strings.Fields(row.endpoints)...), "n1", "z1")); got != row.want {
			t.Errorf("%q of %s: %q, want %q", row.reach, row.endpoints, got, row.want)
		}
	}
}

func TestAffinity(t *testing.T) {
	a, s := newAffinity(), &mesh.Service{Namespace: "ns", Hostname: "s", Affinity: time.Hour}
	to, now := netip.MustParseAddrPort("10.96.0.1:80"), time.Now()
	all := endpointsOf("a@n1", "b@n1", "c@n1", "d@n1", "e@n1", "f@n1")
	dial := func(endpoints []mesh.Endpoint, now time.Time) string {
		chosen := a.first(s, to, endpoints, sample(len(endpoints), maxTargets, rand.IntN), now)
		if len(chosen) != min(len(endpoints), maxTargets) {
			t.Fatalf("chose %v of %d", chosen, len(endpoints))
		}
		return endpoints[chosen[0]].Workload.UID
	}
	kept := dial(all, now)
	for i := range 100 { // each connection begins the time anew
		if got := dial(all, now.Add(time.Duration(i)*59*time.Minute)); got != kept {
			t.Fatalf("connection %d goes to %s, want %s", i, got, kept)
		}
	}
	var others []mesh.Endpoint
	for _, e := range all {
		if e.Workload.UID != kept {
			others = append(others, e)
		}
	}
	second := dial(others, now)
	if got := dial(all, now); got != second {
		t.Errorf("after %s was gone for a while: %s, want to stay with %s", kept, got, second)
	}
	seen := map[string]bool{}
	for i := range 200 { // expired each time
		seen[dial(all, now.Add(time.Duration(i)*2*time.Hour))] = true
	}
	if len(seen) < len(all) {
		t.Errorf("after the time new ones are chosen among %v, want all", seen)
	}
	for i := range 3 * maxKept {
		s := &mesh.Service{Namespace: "ns", Hostname: fmt.Sprint(i), Affinity: time.Hour}
		a.first(s, to, all, []int{0}, now)
	}
	if len(a.kept) > maxKept {
		t.Errorf("%d kept, want at most %d", len(a.kept), maxKept)
	}
}
