package memory

import (
	"context"
	"runtime/debug"
	"sync"
	"testing"
	"time"
)

func TestLeanByWhatIsInUse(t *testing.T) {
	var l lean
	l.begin()
	defer l.end()
	for i, row := range []struct {
		inUse uint64 // in MB
		busy  bool
		want  int
	}{
		{0, true, 100}, {16, true, 50}, {40, true, 20}, // it learns what there is
		{40, false, 20},  // changes of the mesh come in
		{40, true, 100},  // now it has better things to do
		{32, false, 25},  //
		{4, false, 100},  // a small one: there is nothing to save
		{999, false, 12}, // never less
		{999, true, 100}, // the beginning is over
	} {
		if l.look(row.inUse<<20, row.busy); l.percent != row.want {
			t.Errorf("row %d: %d %%, want %d", i, l.percent, row.want)
		}
	}
}

// A process that is always busy is not taken for one that learns for ever.
func TestLearningEnds(t *testing.T) {
	var l lean
	l.begin()
	defer l.end()
	for range learning {
		l.look(40<<20, true)
	}
	if l.percent == usual {
		t.Errorf("%d %% after %d looks", l.percent, learning)
	}
	if l.look(40<<20, true); l.percent != usual {
		t.Errorf("%d %% after one more", l.percent)
	}
}

// All is as before when Run ends.
func TestLean(t *testing.T) {
	now := func() int {
		p := debug.SetGCPercent(1000)
		debug.SetGCPercent(p)
		return p
	}
	before := now()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { Run(ctx, Config{Every: time.Hour, Lean: true}) })
	cancel()
	wg.Wait()
	if got := now(); got != before {
		t.Errorf("%d %% afterwards: want %d", got, before)
	}
}
