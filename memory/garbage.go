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
)

// Bound has Go collect garbage the more often the nearer it comes to so many bytes. What
// GOMEMLIMIT says in the environment is left as it is.
func Bound(bytes int64) {
	if os.Getenv("GOMEMLIMIT") == "" && bytes > 0 {
		debug.SetMemoryLimit(bytes)
	}
}

// percent is how much garbage a lean process may have, in percent of what is in use: it has
// allocated fresh bytes in that time.
func percent(inUse, fresh uint64, in time.Duration) int {
	if inUse == 0 || float64(fresh) > busy*in.Seconds() {
		return usual
	}
	return int(min(max(100*spare/inUse, leastPercent), usual))
}

// setPercent stops the world only if something is different.
func setPercent(before, now int) int {
	if now != before {
		debug.SetGCPercent(now)
	}
	return now
}

// inUse is what the last collection has found.
func inUse() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
