package memory

import (
	"context"
	"sync"
	"testing"
	"time"
)

func TestWhenItIsDue(t *testing.T) {
	const mb = 1 << 20
	var k keeper
	for i, row := range []struct {
		allocated uint64 // in MB
		want      bool
	}{
		{1, false}, {1, false}, {1, true}, // a process that does nothing
		{100, false}, {180, false}, // a burst
		{181, true}, {182, true}, // over, and once more for what lay in pools
		{183, false}, {184, false}, {185, true}, // now and then
		{200, false}, {201, true}, {202, true}, {203, false},
	} {
		if got := k.isDue(reading{allocated: row.allocated * mb}); got != row.want {
			t.Errorf("row %d: %v, want %v", i, got, row.want)
		}
	}
}

// What a burst has taken, and a pool holds, is given back when it is over.
func TestABurstIsGivenBack(t *testing.T) {
	const size = 64 << 20
	pool := sync.Pool{New: func() any { return new([size]byte) }}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { Run(ctx, Config{Every: 10 * time.Millisecond}) })
	b := pool.Get().(*[size]byte)
	for i := range b {
		b[i] = 1
	}
	pool.Put(b)
	full := look().held
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); look().held > full-size*3/4; <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are held, of %d before: want %d less", look().held, full, size)
		}
	}
}
