package memory

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// spare is how much garbage a lean process may have besides what is in use, but for
	// leastPercent of that: less would cost too much time.
	spare        = 16 << 20
	leastPercent = 25
	// usual is Go's own: as much garbage as there is in use.
	usual = 100
	// busy is how many bytes a second a process allocates that has better things to do than to
	// collect garbage often.
	busy = 16 << 20
	// learning is for how many looks a busy process is taken for one that has just begun.
	learning = 6
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
}

// begin: what is learned at first is kept, and lies the closer together the less garbage is
// among it.
func (l *lean) begin() {
	l.percent = leastPercent
	l.before = debug.SetGCPercent(l.percent)
}

func (l *lean) end() { debug.SetGCPercent(l.before) }

// look is told what is in use, and what was allocated since the last look.
func (l *lean) look(inUse, fresh uint64, since time.Duration) {
	if next := l.next(inUse, float64(fresh) > busy*since.Seconds()); next != l.percent {
		l.percent = next
		debug.SetGCPercent(next)
	}
}

// next is how much garbage there may be, in percent of what is in use. Who is busy in the
// beginning is learning.
func (l *lean) next(inUse uint64, isBusy bool) int {
	l.looks++
	switch {
	case isBusy && l.percent == leastPercent && l.looks <= learning:
		return leastPercent
	case isBusy || inUse == 0:
		return usual
	}
	return int(min(max(100*spare/inUse, leastPercent), usual))
}

// inUse is what the last collection has found.
func inUse() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
