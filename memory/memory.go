// Package memory keeps a process small: it gives back to the kernel what a burst took, and
// lets little garbage lie about. It stands beside what a process does, and refuses to have a
// part in it: it slows down nobody who is busy, unless his container is nearly full.
//
// Go gives memory back as it collects garbage, and collects as memory is allocated. A
// process that is quiet after a burst allocates next to nothing: it collects every two
// minutes, its pools keep their buffers for two collections, and what is free by then is
// given back down to what the burst had made the goal of the heap.
package memory

import (
	"context"
	"log/slog"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// quiet is how many bytes a process may allocate between two looks and still count as
	// quiet: who allocates more collects on its own.
	quiet = 8 << 20
	// passes are how many collections come as soon as it is quiet: what lies in a sync.Pool
	// survives the first.
	passes = 2
	// calm is at which look after another one follows: what was in use is let go without a noise.
	calm = 3
)

// Config is what Run needs.
type Config struct {
	// Every is how often is looked. Default 10 s: what a burst took is back in 20 to 60 s.
	Every time.Duration
	// Lean has garbage collected early where much is in use, as long as the process is not busy.
	Lean bool
	// Registry gets the metrics. nil means none.
	Registry prometheus.Registerer
	// Log tells of each time at level debug. nil means nowhere.
	Log *slog.Logger
}

// Run gives memory back whenever the process is quiet, until ctx ends. One per process is enough.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Every == 0 {
		cfg.Every = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	given := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_memory_given_back_bytes_total", Help: "Bytes that were given back to the kernel when the process was quiet.",
	})
	if cfg.Registry != nil {
		cfg.Registry.MustRegister(given, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tacit_memory_held_bytes", Help: "Bytes that the Go runtime has from the kernel: in use, or not given back yet.",
		}, func() float64 { return float64(look().held) }))
		if _, told := sockets(cgroups); told {
			cfg.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "tacit_memory_sockets_bytes", Help: "Bytes in buffers of sockets that the kernel charges to the container of this process.",
			}, func() float64 { n, _ := sockets(cgroups); return n }))
		}
	}
	var l lean
	var often <-chan time.Time // nil once it has learned
	if cfg.Lean {
		l.begin()
		defer l.end()
		t := time.NewTicker(max(cfg.Every/closer, time.Millisecond))
		defer t.Stop()
		often = t.C
	}
	tick := time.NewTicker(cfg.Every)
	defer tick.Stop()
	var k keeper
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-often:
			l.fit(inUse())
			continue
		case <-tick.C:
		}
		now := look()
		if cfg.Lean {
			if l.look(inUse(), float64(now.allocated-k.last) > busy*cfg.Every.Seconds()); l.learned {
				often = nil
			}
		}
		if !k.isDue(now) {
			continue
		}
		debug.FreeOSMemory()
		after := look()
		given.Add(float64(now.held - min(now.held, after.held)))
		cfg.Log.Debug("memory given back", "held", now.held, "left", after.held)
	}
}

// reading is what the runtime tells.
type reading struct {
	// allocated counts all bytes that ever were.
	allocated uint64
	// held is what the process has from the kernel.
	held uint64
}

func look() reading {
	s := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(s)
	return reading{allocated: s[0].Value.Uint64(), held: s[1].Value.Uint64() - s[2].Value.Uint64()}
}

// keeper decides when.
type keeper struct {
	// last is what was allocated at the last look.
	last uint64
	// left is how many passes are to come at once, and rested how many looks there was none.
	left, rested int
}

// isDue reports whether memory is to be given back now: the process is quiet.
func (k *keeper) isDue(now reading) bool {
	fresh := now.allocated - k.last
	k.last = now.allocated
	if fresh > quiet {
		k.left, k.rested = passes, 0
		return false
	}
	if k.rested++; k.left == 0 && k.rested < calm {
		return false
	}
	k.left, k.rested = max(k.left-1, 0), 0
	return true
}
