package memory

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
)

const (
	// spare is how much garbage a lean process may have besides what is in use, but for
	// leastPercent of that: less would cost too much time.
	spare        = 8 << 20
	leastPercent = 12
	// usual is Go's own: as much garbage as there is in use.
	usual = 100
	// busy is how many bytes a second a process allocates that has better things to do than to
	// collect garbage often.
	busy = 16 << 20
	// learning is for how many looks a busy process is taken for one that has just begun, and
	// closer how often what is in use is asked for meanwhile, in one look.
	learning = 6
	closer   = 100
)

// Bound has Go collect garbage the more often the nearer it comes to so many bytes. What
// GOMEMLIMIT says in the environment is left as it is.
func Bound(bytes int64) {
	if os.Getenv("GOMEMLIMIT") == "" && bytes > 0 {
		debug.SetMemoryLimit(bytes)
	}
}

// lean collects garbage early where much is in use, as long as the process is not busy.
type lean struct {
	before, percent int
	looks           int
	// learned: the beginning is over. A process that is busy before that is learning what it
	// will keep, and that lies the closer together the less garbage is among it.
	learned bool
}

func (l *lean) begin() { l.before = debug.SetGCPercent(usual); l.percent = usual }

func (l *lean) end() { debug.SetGCPercent(l.before) }

// look decides whether the process has better things to do.
func (l *lean) look(inUse uint64, isBusy bool) {
	l.looks++
	l.learned = l.learned || !isBusy || l.looks > learning
	if l.learned && isBusy {
		l.set(usual)
		return
	}
	l.fit(inUse)
}

// fit lets there be so much garbage besides what is in use as a lean process may have.
func (l *lean) fit(inUse uint64) {
	if inUse > 0 {
		l.set(int(min(max(100*spare/inUse, leastPercent), usual)))
	}
}

func (l *lean) set(percent int) {
	if percent != l.percent { // it stops the world
		l.percent = percent
		debug.SetGCPercent(percent)
	}
}

// inUse is what the last collection has found.
func inUse() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
