package xds

import (
	"slices"
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// Who asks for names is told of these, also that one is not there, and of nothing else.
func TestInterest(t *testing.T) {
	s := serverWith(10)
	name := func(i int) string { return workload(i, nil).UID }
	st := bareStream(s, mesh.Process{Node: "n1"})
	ask := func(subscribe, leave []string) {
		t.Helper()
		req := &message.DeltaDiscoveryRequest{TypeUrl: addressType, ResourceNamesSubscribe: subscribe, ResourceNamesUnsubscribe: leave}
		if err := s.take(st, req); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what string, told, gone []string) {
		t.Helper()
		resp, err := s.next(st)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, r := range resp.whole().GetResources() {
			names = append(names, r.GetName())
		}
		slices.Sort(names)
		if removed := resp.whole().GetRemovedResources(); !slices.Equal(names, told) || !slices.Equal(removed, gone) {
			t.Errorf("%s: told of %v, and that %v are gone: want %v and %v", what, names, removed, told, gone)
		}
		if len(resp.whole().GetDigest()) > 0 {
			t.Errorf("%s: a digest of what it was not told", what)
		}
	}
	ask([]string{name(1), name(77)}, nil)
	expect("first", []string{name(1)}, []string{name(77)})
	s.Update(one(2))
	expect("another one has changed", nil, nil)
	s.Update(one(1))
	expect("it has changed", []string{name(1)}, nil)
	s.Update(Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{workload(77, nil)}, Gone: []string{name(1), name(3)}}})
	expect("one came and one went", []string{name(77)}, []string{name(1)})
	ask([]string{name(4), name(5)}, []string{name(77)})
	s.Update(one(4))
	s.Update(one(77))
	expect("two more, one of which has changed since", []string{name(4), name(5)}, nil)
	expect("nothing more", nil, nil)
}
