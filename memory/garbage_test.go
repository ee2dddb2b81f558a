package memory

import (
	"context"
	"runtime/debug"
	"sync"
	"testing"
	"time"
)

func TestPercent(t *testing.T) {
	for _, row := range []struct {
		inUse, fresh uint64 // in MB, the latter in 10 s
		want         int
	}{
		{0, 0, 100},     // nothing is known yet
		{4, 0, 100},     // a small process: there is nothing to save
		{32, 1, 50},     //
		{50, 150, 32},   // a large one, with changes of the mesh coming in
		{50, 200, 100},  // and one that is busy
		{1000, 100, 25}, // never less
	} {
		if got := percent(row.inUse<<20, row.fresh<<20, 10*time.Second); got != row.want {
			t.Errorf("%d MB in use, %d allocated: %d %%, want %d", row.inUse, row.fresh, got, row.want)
		}
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
