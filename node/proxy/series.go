package proxy

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

const (
	// maxSeries bounds how many label sets the traffic metrics may have. What comes
	// above is counted under unknown workloads.
	maxSeries = 4096
	// seriesIdle is how long a label set without a connection is kept. If others need its
	// room, it is seriesIdleFull, which is longer than between two scrapes, and nothing if
	// it is of what the World has no more.
	seriesIdle, seriesIdleFull = 15 * time.Minute, time.Minute
	// spareFor is how long a search for room is good for, unless there is another World.
	spareFor = time.Second
)

// series are the counters of one label set.
type series struct {
	key                            seriesKey
	opened, closed, sent, received prometheus.Counter
	// open counts the connections that have it, and without which it may be dropped; used
	// is when one last came or went, in Unix nanoseconds.
	open, used atomic.Int64
	// dead says that the World had no more what it is of. It is guarded by telemetry.mu.
	dead bool
}

// leave ends what take began.
func (s *series) leave(now time.Time) {
	s.used.Store(now.UnixNano())
	s.open.Add(-1)
}

// take returns the counters of a label set. They are not dropped until leave.
func (t *telemetry) take(k *seriesKey, now time.Time) *series {
	t.mu.RLock()
	s, ok := t.series[*k]
	if ok {
		s.open.Add(1)
	}
	t.mu.RUnlock()
	if !ok {
		s = t.add(k, now)
	}
	s.used.Store(now.UnixNano())
	return s
}

// add makes a label set known; above the bound it is made one of the few
// that say nothing of workloads, and those are always let in.
func (t *telemetry) add(want *seriesKey, now time.Time) *series {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := *want
	if _, known := t.series[k]; !known && len(t.series) >= t.most && !t.makeRoomLocked(now) {
		t.refused.Inc()
		k = seriesKey{reporter: k.reporter, security: k.security, flags: k.flags}
	}
	s, ok := t.series[k]
	if !ok {
		v := k.values()
		s = &series{key: k, opened: t.opened.WithLabelValues(v...), closed: t.closed.WithLabelValues(v...),
			sent: t.sent.WithLabelValues(v...), received: t.received.WithLabelValues(v...)}
		t.series[k] = s
	}
	s.open.Add(1)
	return s
}

// makeRoomLocked drops one label set that may go, and reports whether there was one.
func (t *telemetry) makeRoomLocked(now time.Time) bool {
	if in := weak.Make(t.world()); in != t.spareIn || now.Sub(t.spareFrom) >= spareFor {
		t.findSpareLocked(now)
		t.spareIn, t.spareFrom = in, now
	}
	i := slices.IndexFunc(t.spare, func(s *series) bool {
		return s.open.Load() <= 0 && (s.dead || s.isIdle(now.Add(-seriesIdleFull)))
	})
	if i < 0 {
		return false
	}
	t.dropLocked(t.spare[i])
	t.spare = slices.Delete(t.spare, i, i+1)
	return true
}

// findSpareLocked looks for what may go: first what the World has no more, also while it
// has a connection, which may end; then what is idle. Of both, first what was used longest ago.
func (t *telemetry) findSpareLocked(now time.Time) {
	there := livingIn(t.world())
	var dead, idle []*series
	for _, s := range t.series {
		if s.dead = !there.has(s.key); s.dead {
			dead = append(dead, s)
		} else if s.isIdle(now.Add(-seriesIdleFull)) {
			idle = append(idle, s)
		}
	}
	byUse := func(a, b *series) int { return cmp.Compare(a.used.Load(), b.used.Load()) }
	slices.SortFunc(dead, byUse)
	slices.SortFunc(idle, byUse)
	t.spare = append(dead, idle...)
}

// trim drops the label sets of what seems to be gone. It is called at intervals.
func (t *telemetry) trim(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.series {
		if s.isIdle(now.Add(-seriesIdle)) {
			t.dropLocked(s)
		}
	}
	t.spare, t.spareFrom = nil, time.Time{}
}

// isIdle reports whether no connection has it now, nor had it after since.
func (s *series) isIdle(since time.Time) bool {
	return s.open.Load() <= 0 && s.used.Load() <= since.UnixNano()
}

func (t *telemetry) dropLocked(s *series) {
	v := s.key.values()
	for _, c := range []*prometheus.CounterVec{t.opened, t.closed, t.sent, t.received} {
		c.DeleteLabelValues(v...)
	}
	delete(t.series, s.key)
}

// living are the names that label sets have for what a World has.
type living struct {
	parties  map[party]bool
	services map[seriesKey]bool
}

func livingIn(w *mesh.World) living {
	l := living{parties: make(map[party]bool), services: map[seriesKey]bool{{}: true}}
	for wl := range w.Workloads() {
		l.parties[partyOf(wl, mesh.ID{})] = true
		l.parties[partyOf(wl, wl.ID)] = true
	}
	for s := range w.Services() {
		l.services[keyOf(&mesh.Flow{Service: s})] = true
	}
	return l
}

// has reports whether all that k names is there.
func (l living) has(k seriesKey) bool {
	for _, p := range []party{k.source, k.destination} {
		if p.workload != "" && !l.parties[p] {
			return false
		}
	}
	return l.services[seriesKey{service: k.service, serviceName: k.serviceName, serviceNamespace: k.serviceNamespace}]
}
