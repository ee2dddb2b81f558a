package xds

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// An update counts what changes, and nothing else.
func TestUpdateVersions(t *testing.T) {
	s := NewServer(ServerConfig{})
	a, b := workload(1, nil), workload(2, nil)
	pod := newRandomMesh(1).pod(1)
	world := func(gone []string, list ...*mesh.Workload) Update {
		return Update{Changes: mesh.Changes{Workloads: list, Gone: gone}}
	}
	pods := func(node string, gone []string, list ...mesh.Pod) Update {
		return Update{Pods: map[string]PodChanges{node: {Pods: list, Gone: gone}}}
	}
	for _, row := range []struct {
		name   string
		update Update
		want   uint64
	}{
		{"the first word", Update{}, 1},
		{"nothing", Update{}, 1},
		{"one", world(nil, a), 2},
		{"the same one", world(nil, a), 2},
		{"one that says the same", world(nil, workload(1, nil)), 2},
		{"one twice", world(nil, b, b), 3},
		{"gone and there", world([]string{b.UID}, b), 3},
		{"gone", world([]string{b.UID}), 4},
		{"gone twice, and who never was there", world([]string{a.UID, a.UID, "x"}), 5},
		{"a pod", pods("n1", nil, pod), 6},
		{"the same pod", pods("n1", nil, pod), 6},
		{"a pod that is on no node", pods("", nil, pod), 6},
		{"a pod that is gone", pods("n1", []string{pod.UID}), 7},
		{"namespaces", Update{Namespaces: []string{"a", "b"}}, 9},
		{"namespaces that are gone", Update{GoneNamespaces: []string{"a", "c"}}, 10},
	} {
		if got := s.Update(row.update); got != row.want {
			t.Errorf("%s: version %d: want %d", row.name, got, row.want)
		}
	}
	if len(s.pods) != 0 {
		t.Errorf("tables of %d nodes that have no pods and are not connected", len(s.pods))
	}
}

// What is invalid is told until it is repaired or gone.
func TestUpdateOfWhatIsInvalid(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := NewServer(ServerConfig{Registry: reg})
	bad := workload(1, func(w *mesh.Workload) { w.Name = "\xff" })
	for _, step := range []struct {
		update Update
		count  float64
	}{
		{Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{bad}}}, 1},
		{Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{bad}}}, 1},
		{Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{workload(1, nil)}}}, 1},
		{Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{bad}}}, 2},
		{Update{Changes: mesh.Changes{Gone: []string{bad.UID}}}, 2},
		{Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{bad}}}, 3},
	} {
		s.Update(step.update)
		if n := count(t, reg, "tacit_xds_invalid_resources_total"); n != step.count {
			t.Errorf("%v counted: want %v", n, step.count)
		}
	}
}

// A stream that is too far behind to be told what was removed ends, and begins again.
func TestTooFarBehind(t *testing.T) {
	s := serverWith(10)
	st := connectBare(t, s, "n1", &message.Held{Origin: s.origin, Version: s.version})
	drain(t, s, st)
	for i := range 10 * minGone {
		s.Update(Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{workload(100+i, nil)}}})
		s.Update(Update{Changes: mesh.Changes{Gone: []string{workload(100+i, nil).UID}}})
	}
	if resp, err := s.next(st); resp != nil || err == nil || !strings.Contains(err.Error(), "too far behind") {
		t.Errorf("%v, %v: want an end", resp, err)
	}
	held := &message.Held{Origin: s.origin, Version: 10, Digests: s.world.digests.marshal()}
	if n := drain(t, s, connectBare(t, s, "n1", held)); n != 0 {
		t.Errorf("%d resources for a node that holds all", n)
	}
}

// A node that has no pods is not behind, however late its agent came.
func TestAgentOfANodeWithoutPods(t *testing.T) {
	s := serverWith(10)
	st := bareStream(s, mesh.Process{Node: "n1", Agent: true})
	if err := s.take(st, &message.DeltaDiscoveryRequest{TypeUrl: podType, Held: &message.Held{}}); err != nil {
		t.Fatal(err)
	}
	if n := drain(t, s, st); n != 0 {
		t.Errorf("%d pods: want none", n)
	}
	s.Update(one(1))
	if n := drain(t, s, st); n != 0 {
		t.Errorf("%d pods: want none", n)
	}
	s.Update(Update{Pods: map[string]PodChanges{"n1": {Pods: []mesh.Pod{newRandomMesh(1).pod(1)}}}})
	if n := drain(t, s, st); n != 1 {
		t.Errorf("%d pods: want one", n)
	}
}

// Changed tells when the last node has come as far, and not at each ack.
func TestChangedTellsWhenAllHaveAcked(t *testing.T) {
	s := serverWith(1)
	var all []*stream
	for _, node := range []string{"n1", "n2", "n3"} {
		all = append(all, connectBare(t, s, node, &message.Held{}))
	}
	told := func() bool {
		select {
		case <-s.Changed():
			return true
		default:
			return false
		}
	}
	told()
	for i, st := range all {
		drain(t, s, st)
		if is, want := told(), i == len(all)-1; is != want {
			t.Errorf("after %d of %d acks it is told: %v", i+1, len(all), is)
		}
	}
	s.Update(one(1))
	s.Applied(func(node string) bool { return node != "n1" })
	for i, st := range all[1:] {
		drain(t, s, st)
		if is, want := told(), i == 1; is != want {
			t.Errorf("after %d of 2 that count it is told: %v", i+1, is)
		}
	}
}
