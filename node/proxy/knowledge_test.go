package proxy

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"weak"

	"tacit.dev/mesh"
)

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestWorldIsSettledWhenNoOlderDialIsLeft(t *testing.T) {
	k := newKnowledge()
	if !isClosed(k.apply(mesh.Changes{})) {
		t.Error("nothing was dialled, and the first World is not settled")
	}
	one := k.lease()
	second := k.apply(mesh.Changes{})
	two := k.lease()
	third := k.apply(mesh.Changes{})
	if isClosed(second) || isClosed(third) {
		t.Error("settled with a dial of the first World under way")
	}
	k.release(two)
	if isClosed(third) {
		t.Error("the third is settled before the second")
	}
	k.release(one)
	if !isClosed(second) || !isClosed(third) {
		t.Error("not settled without any dial")
	}
	if fresh := k.lease(); fresh != k.current.Load().epoch {
		t.Error("a lease is not of the current World")
	}
}

// What comes in parts decides when the last is there.
func TestAPartDecidesNothing(t *testing.T) {
	k := newKnowledge()
	at := addrs("10.0.0.1", "10.0.0.2")
	k.apply(mesh.Changes{Workloads: []*mesh.Workload{{UID: "a", Addresses: at[:1]}}, Part: true})
	if k.isKnown() || k.world().Workload(at[0]) != nil {
		t.Error("a part of the first World decides")
	}
	k.apply(mesh.Changes{Workloads: []*mesh.Workload{{UID: "b", Addresses: at[1:]}}})
	if !k.isKnown() || k.world().Workload(at[0]) == nil || k.world().Workload(at[1]) == nil {
		t.Error("the whole does not decide")
	}
}

// A dial that takes long holds up the acknowledgement of Worlds, and keeps none alive.
func TestALeaseKeepsNoWorldAlive(t *testing.T) {
	k := newKnowledge()
	k.apply(mesh.Changes{})
	lease := k.lease()
	worlds := []weak.Pointer[mesh.World]{weak.Make(k.world())}
	for range 3 {
		k.apply(mesh.Changes{})
		worlds = append(worlds, weak.Make(k.world()))
	}
	runtime.GC()
	for i, w := range worlds[:3] {
		if w.Value() != nil {
			t.Errorf("World %d is over, and still there", i)
		}
	}
	if worlds[3].Value() != k.world() {
		t.Error("the World of now is another one")
	}
	k.release(lease)
}

// Whatever the order, a settled World has no older lease, and in the end all are settled.
func TestWorldsSettleUnderLoad(t *testing.T) {
	k := newKnowledge()
	type held struct {
		e   *epoch
		seq int
	}
	order := map[*epoch]int{k.current.Load().epoch: 0}
	var mu sync.Mutex // guards order and open
	open := map[int]int{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			var mine []held
			for range 2000 {
				if len(mine) > 0 && rand.IntN(2) == 0 {
					i := rand.IntN(len(mine))
					mu.Lock()
					open[mine[i].seq]--
					mu.Unlock()
					k.release(mine[i].e)
					mine = append(mine[:i], mine[i+1:]...)
					continue
				}
				mu.Lock()
				e := k.lease()
				h := held{e, order[e]}
				open[h.seq]++
				mu.Unlock()
				mine = append(mine, h)
			}
			for _, h := range mine {
				mu.Lock()
				open[h.seq]--
				mu.Unlock()
				k.release(h.e)
			}
		})
	}
	var settled []<-chan struct{}
	for i := 1; i <= 200; i++ {
		mu.Lock()
		settled = append(settled, k.apply(mesh.Changes{}))
		order[k.current.Load().epoch] = i
		for j, s := range settled {
			for older := range j + 1 {
				if isClosed(s) && open[older] > 0 {
					t.Errorf("World %d is settled with %d dials of World %d", j+1, open[older], older)
				}
			}
		}
		mu.Unlock()
	}
	wg.Wait()
	for i, s := range settled {
		if !isClosed(s) {
			t.Errorf("World %d is never settled", i+1)
		}
	}
}
