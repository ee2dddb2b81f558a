package control

import (
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

// shelf keeps what is saved, in memory.
type shelf struct {
	shards [kube.PairShards][]byte
	writes int
	err    error
}

func (s *shelf) LoadPairs() ([kube.PairShards][]byte, error) { return s.shards, s.err }

func (s *shelf) SavePairs(i int, b []byte) error {
	if s.err == nil {
		s.shards[i] = b
		s.writes++
	}
	return s.err
}

func hostedOn(node, name, owner string) *mesh.Workload {
	return &mesh.Workload{Namespace: "shop", Name: name, OwnerName: owner, Node: node, ID: mesh.ID{TrustDomain: "lab", Namespace: "shop", ServiceAccount: owner}}
}

func testPairs(s *shelf, now *time.Time) *pairs {
	h := newHosts()
	h.replace(nil, hostedOn("n1", "web-1", "web"))
	h.replace(nil, hostedOn("n2", "db-1", "db"))
	p := newPairs(s, h, newPairMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	p.now = func() time.Time { return *now }
	return p
}

func workload(name string) mesh.Party {
	return mesh.Party{Where: mesh.AtWorkload, Namespace: "shop", Workload: name, Account: name}
}

func seenIn(source, destination string, port uint16, at time.Time) mesh.Pair {
	return mesh.Pair{
		Way:         mesh.Way{Source: workload(source), Destination: workload(destination), Port: port, Crossing: mesh.CrossedByTLS, Reporter: mesh.ByDestination},
		Connections: 1, Bytes: 10, First: at, Last: at,
	}
}

func told(p *pairs) string {
	var all []string
	for _, pair := range p.of {
		all = append(all, fmt.Sprintf("%s->%s:%d %d", pair.Source, pair.Destination, pair.Port, pair.Connections))
	}
	return strings.Join(all, ", ")
}

// A node is heard about workloads of which it has pods, by whatever name it knows them; also
// when the last one has just gone.
func TestANodeTellsOfItsOwnPods(t *testing.T) {
	now := time.Unix(1000, 0)
	p := testPairs(&shelf{}, &now)
	for _, row := range []struct {
		what, node string
		pair       mesh.Pair
		want       string
	}{
		{"a pod of another node", "n2", seenIn("db", "web", 80, now), ""},
		{"a pod that there is not", "n1", seenIn("db", "shop", 80, now), ""},
		{"a node that there is not", "n9", seenIn("db", "web", 80, now), ""},
		{"another account", "n1", func() mesh.Pair { x := seenIn("db", "web", 80, now); x.Destination.Account = "db"; return x }(), ""},
		{"its own", "n1", seenIn("db", "web", 80, now), "shop/db->shop/web:80 1"},
		{"its own by the name of the pod", "n1", func() mesh.Pair { x := seenIn("db", "web", 80, now); x.Destination.Workload = "web-1"; return x }(), "shop/db->shop/web:80 2"},
		{"the source, but as the destination's node", "n2", seenIn("db", "web", 80, now), "shop/db->shop/web:80 2"},
	} {
		p.put(row.node, mesh.Pairs{List: []mesh.Pair{row.pair}})
		if got := told(p); got != row.want {
			t.Errorf("%s: %q, want %q", row.what, got, row.want)
		}
	}
	h := newHosts()
	for i := range 2 * maxLeft {
		w := hostedOn("n1", "p", fmt.Sprint("w", i))
		h.replace(nil, w)
		if h.replace(w, nil); i == 0 {
			if _, is := h.find("n1", w.Party()); !is {
				t.Error("not heard about the pod that has just gone")
			}
		}
	}
	if n := len(h.on["n1"].called); n > maxLeft+1 {
		t.Errorf("%d workloads are remembered: want %d", n, maxLeft)
	}
	if h.forget("n1"); len(h.on) != 0 {
		t.Errorf("remembered of a node that is gone: %v", h.on)
	}
}

func TestPairsAreSummedUp(t *testing.T) {
	now := time.Unix(1000, 0)
	p := testPairs(&shelf{}, &now)
	ahead := seenIn("db", "web", 80, now.Add(time.Hour)) // a clock that is wrong
	p.put("n1", mesh.Pairs{List: []mesh.Pair{seenIn("db", "web", 80, now.Add(-time.Minute)), ahead}, Other: 5})
	got := p.of[ahead.Way]
	if got == nil || got.Connections != 2 || got.Bytes != 20 || !got.First.Equal(now.Add(-time.Minute)) || !got.Last.Equal(now) || p.other != 5 {
		t.Errorf("summed up: %+v, others %d", got, p.other)
	}
}

// The oldest leave first, of those workloads that are told of most: a node that makes up pairs
// drops its own.
func TestPairsOfAClusterAreBounded(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := testPairs(&shelf{}, &now)
	p.put("n2", mesh.Pairs{List: []mesh.Pair{seenIn("web", "db", 5432, now.Add(-100*time.Hour))}})
	for i := range maxPairs {
		p.put("n1", mesh.Pairs{List: []mesh.Pair{seenIn(fmt.Sprint("made-up-", i), "web", 80, now.Add(time.Duration(i-maxPairs)*time.Second))}})
	}
	if len(p.of) != fewPairs || p.dropped != maxPairs+1-fewPairs {
		t.Errorf("%d pairs, %d dropped", len(p.of), p.dropped)
	}
	if p.of[seenIn("web", "db", 5432, now).Way] == nil {
		t.Error("another workload's pair was dropped")
	}
	if p.of[seenIn("made-up-0", "web", 80, now).Way] != nil || p.of[seenIn(fmt.Sprint("made-up-", maxPairs-1), "web", 80, now).Way] == nil {
		t.Error("not the oldest were dropped")
	}
}

// What nodes saw outlives the process. What is new is saved soon, what only counts later, and
// nothing if nothing differs.
func TestPairsAreSaved(t *testing.T) {
	now, s := time.Unix(1000, 0), &shelf{}
	always := func() bool { return true }
	p := testPairs(s, &now)
	p.put("n1", mesh.Pairs{List: []mesh.Pair{seenIn("db", "web", 80, now), seenIn("x", "web", 80, now)}})
	want := func(what string, writes int) {
		t.Helper()
		if err := p.save(always); err != nil || s.writes != writes {
			t.Errorf("%s: %d writes (%v), want %d", what, s.writes, err, writes)
		}
	}
	if _ = p.save(func() bool { return false }); s.writes != 0 {
		t.Error("saved by a process that does not lead")
	}
	p.save(always)
	first := s.writes
	if first == 0 || first > 2 {
		t.Errorf("%d writes of two pairs", first)
	}
	want("nothing differs", first)
	p.put("n1", mesh.Pairs{List: []mesh.Pair{seenIn("db", "web", 80, now)}})
	want("only sums differ", first)
	now = now.Add(countPairsEvery)
	want("a while later", first+1)

	next := testPairs(s, &now)
	next.put("n1", mesh.Pairs{List: []mesh.Pair{seenIn("db", "web", 80, now)}, Other: 1})
	if err := next.load(); err != nil || len(next.of) != 2 || next.of[seenIn("db", "web", 80, now).Way].Connections != 3 {
		t.Errorf("after a restart: %s (%v)", told(next), err)
	}
	s.err = errors.New("no API server")
	if err := next.save(always); !errors.Is(err, s.err) {
		t.Errorf("saved without an API server: %v", err)
	}
	s.err = nil
	if err := next.save(always); err != nil || s.writes == first+1 {
		t.Errorf("not tried again: %v", err)
	}
	s.shards[3] = []byte("no gzip")
	if err := testPairs(s, &now).load(); err != nil {
		t.Errorf("a shard that is broken stops everything: %v", err)
	}
}

// No shard is larger than a ConfigMap takes, whatever names a node makes up.
func TestAShardFitsIntoAConfigMap(t *testing.T) {
	now, s := time.Unix(1_000_000, 0), &shelf{}
	p := testPairs(s, &now)
	name := func() string {
		b := make([]byte, 150)
		rand.Read(b)
		return strings.ToLower(base32.StdEncoding.EncodeToString(b))
	}
	for i := range 6000 {
		one := &keptPair{Pair: seenIn("x", "web", 80, now.Add(time.Duration(-i)*time.Second)), shard: 5}
		one.Source = mesh.Party{Where: mesh.AtWorkload, Namespace: name(), Workload: name(), Account: name()}
		p.of[one.Way] = one
	}
	p.shards[5].news = true
	if err := p.save(func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	if n := len(s.shards[5]); n == 0 || n > 1<<20 || p.dropped == 0 || len(p.of)+int(p.dropped) != 6000 {
		t.Errorf("a shard of %d bytes, %d pairs are left, %d dropped", n, len(p.of), p.dropped)
	}
	if got, err := kube.UnpackPairs(s.shards[5]); err != nil || len(got.Pairs) != len(p.of) {
		t.Errorf("unpacked %d pairs (%v), want %d", len(got.Pairs), err, len(p.of))
	}
}
