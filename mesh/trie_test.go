package mesh

import (
	"maps"
	"math/rand/v2"
	"testing"
)

// A trie is a map, also while its pages are split, and one that others were made of stays
// what it was.
func TestTrieIsAMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	type state struct {
		trie trie[int, int]
		want map[int]int
	}
	states := []state{{want: map[int]int{}}}
	for e := era(1); e <= 60; e++ {
		s := states[len(states)-1]
		s.want = maps.Clone(s.want)
		for range r.IntN(2000) {
			k, v := r.IntN(5000), r.Int()
			if r.IntN(3) == 0 {
				s.trie.del(e, k)
				delete(s.want, k)
				continue
			}
			s.trie.set(e, k, v)
			s.want[k] = v
		}
		states = append(states, s)
	}
	for i, s := range states {
		got := maps.Collect(s.trie.all())
		if !maps.Equal(got, s.want) {
			t.Fatalf("seed %d: state %d has %d entries: want others, %d", seed, i, len(got), len(s.want))
		}
		for k := range 5000 {
			v, ok := s.trie.get(k)
			if want, is := s.want[k]; ok != is || v != want {
				t.Fatalf("seed %d: state %d has %d, %v at %d: want %d, %v", seed, i, v, ok, k, want, is)
			}
		}
	}
	for range states[len(states)-1].trie.all() {
		break // whoever has enough may stop
	}
}
