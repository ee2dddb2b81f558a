package memory

import (
	"context"
	"runtime/debug"
	"sync"
	"testing"
	"time"
)

func TestLeanByWhatIsInUse(t *testing.T) {
	l := lean{percent: leastPercent}
	for i, row := range []struct {
		inUse uint64 // in MB
		busy  bool
		want  int
	}{
		{0, true, 25}, {30, true, 25}, // it learns what there is
		{50, false, 32},  // a large one, with changes of the mesh coming in
		{50, true, 100},  // now it has better things to do
		{32, false, 50},  //
		{4, false, 100},  // a small one: there is nothing to save
		{999, false, 25}, // never less
		{999, true, 100}, // the beginning is over
	} {
		if got := l.next(row.inUse<<20, row.busy); got != row.want {
			t.Errorf("row %d: %d %%, want %d", i, got, row.want)
		}
		l.percent = row.want
	}
}

// A lean process begins with little garbage, and what it was before is as it was when Run ends.
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
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); now() != leastPercent; <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("garbage may be %d %%", now())
		}
	}
	cancel()
	wg.Wait()
	if got := now(); got != before {
		t.Errorf("%d %% afterwards: want %d", got, before)
	}
}
