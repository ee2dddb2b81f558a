package xds

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

func TestReachAndAffinityTravel(t *testing.T) {
	for _, r := range []mesh.Reach{mesh.Everywhere, mesh.SameNode, mesh.PreferNode, mesh.PreferZone} {
		s := &mesh.Service{Namespace: "ns", Name: "s", Hostname: "s.ns", Reach: r, Affinity: 3 * time.Hour}
		m, err := encodeService(s)
		if err != nil {
			t.Fatal(err)
		}
		_, got, err := decodeAddress(m)
		if diff := cmp.Diff(any(s), got); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got)\n%s", r, err, diff)
		}
	}
	w := &mesh.Workload{UID: "u", Namespace: "ns", Zone: "z1", ID: mesh.ID{TrustDomain: "lab", Namespace: "ns", ServiceAccount: "a"}}
	m, err := encodeWorkload(w)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err := decodeAddress(m); err != nil || got.(*mesh.Workload).Zone != "z1" {
		t.Errorf("zone of %+v, %v: want z1", got, err)
	}
}

// What Istio says beyond our words is no preference; an affinity that cannot be read
// is refused.
func TestForeignBalancing(t *testing.T) {
	for _, m := range []*message.LoadBalancing{nil, {}, {Mode: message.LoadBalancing_PASSTHROUGH},
		{Mode: message.LoadBalancing_STRICT, RoutingPreference: []message.LoadBalancing_Scope{message.LoadBalancing_NETWORK}}} {
		if r := decodeReach(m); r != mesh.Everywhere {
			t.Errorf("%v: %q, want no preference", m, r)
		}
	}
	if _, err := decodeAffinity([]*message.Extension{{Name: affinityExtension}}); err == nil {
		t.Error("an affinity without a value was taken")
	}
}
