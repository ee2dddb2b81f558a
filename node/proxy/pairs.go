package proxy

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

const (
	// maxPairs bounds the pairs that a node tells apart.
	maxPairs = 4096
	// pairIdle is how long a pair is kept without a connection, once control has it, if
	// another one needs its room.
	pairIdle = time.Minute
	// sweepPairsEvery is how often room is looked for at most.
	sweepPairsEvery = time.Second
)

// Pairs sums up between whom connections are, for control: it is a wire/xds.Observer. A connection
// looks once for its pair when it begins, and keeps it until it ends. It is safe for
// concurrent use.
type Pairs struct {
	world func() *mesh.World
	// untold counts the connections for which there was no room.
	untold prometheus.Counter

	// mu guards what follows.
	mu    sync.RWMutex
	of    map[mesh.Way]*pairCount
	most  int // maxPairs, but in tests
	swept time.Time
	other uint64 // of them, what control does not have

	// taken is what Take returned last; otherTaken counts of it what has no pair. Only Take and
	// Kept use them.
	taken      []taken
	otherTaken uint64
}

// pairCount is one of them. What was kept belongs to Pairs.mu.
type pairCount struct {
	way                      mesh.Way
	first                    time.Time
	open, connections, bytes atomic.Int64
	last                     atomic.Int64 // Unix milliseconds
	kept                     sums
}

// sums are what control has of a pair.
type sums struct{ connections, bytes, last int64 }

type taken struct {
	*pairCount
	sums
}

func newPairs(reg *prometheus.Registry, world func() *mesh.World) *Pairs {
	s := &Pairs{world: world, of: make(map[mesh.Way]*pairCount), most: maxPairs, untold: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "tacit_pairs_untold_total",
		Help: "Connections that control is told of only as a number, because the node has as many pairs of workloads as it may.",
	})}
	reg.MustRegister(s.untold)
	return s
}

// begin counts a connection that has begun, or was denied. It returns nil for one that has no
// pair: end takes that.
func (s *Pairs) begin(f *mesh.Flow) *pairCount {
	var way mesh.Way
	if way.Crossing = crossing(f); way.Crossing == "" {
		return nil
	}
	w := s.world()
	way.Source = w.Party(f.Source, f.SourceAddr.Addr())
	way.Destination = w.Party(f.Destination, f.DestinationAddr.Addr())
	way.Port, way.Reporter = f.DestinationAddr.Port(), f.Reporter
	s.mu.RLock()
	p := s.of[way]
	if p != nil {
		p.open.Add(1)
	}
	s.mu.RUnlock()
	if p == nil {
		if p = s.add(&way, f.Opened); p == nil {
			return nil
		}
	}
	p.connections.Add(1)
	p.last.Store(f.Opened.UnixMilli())
	return p
}

// crossing is how f counts, "" if it does not: what ended before it was there, and was not
// denied; and what the other side tells.
func crossing(f *mesh.Flow) mesh.Crossing {
	out := f.Reporter == mesh.BySource
	switch {
	case out && f.Security == mesh.MutualTLS:
		return ""
	case f.Flags == flagDenied:
		return mesh.Denied
	case f.Flags != "":
		return ""
	case f.Security == mesh.MutualTLS:
		return mesh.CrossedByTLS
	case out:
		return mesh.PlaintextOut
	}
	return mesh.PlaintextIn
}

// end counts what the connection has carried.
func (s *Pairs) end(p *pairCount, f *mesh.Flow) {
	if p == nil {
		return
	}
	p.bytes.Add(f.Sent + f.Received)
	p.last.Store(f.Closed.UnixMilli())
	p.open.Add(-1)
}

// add makes a pair, with one connection that is open, or returns nil if there is no room.
func (s *Pairs) add(way *mesh.Way, now time.Time) *pairCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.of[*way]
	if p == nil {
		if !s.hasRoomLocked(now) || (&mesh.Pair{Way: *way, First: now, Last: now}).Check() != nil {
			s.other++
			s.untold.Inc()
			return nil
		}
		p = &pairCount{way: *way, first: now}
		s.of[*way] = p
	}
	p.open.Add(1)
	return p
}

// hasRoomLocked makes room by forgetting what control has, and nobody has used for a while.
func (s *Pairs) hasRoomLocked(now time.Time) bool {
	if len(s.of) < s.most {
		return true
	}
	if now.Sub(s.swept) < sweepPairsEvery {
		return false
	}
	s.swept = now
	for way, p := range s.of {
		if p.open.Load() == 0 && p.now() == p.kept && now.Sub(time.UnixMilli(p.kept.last)) > pairIdle {
			delete(s.of, way)
		}
	}
	return len(s.of) < s.most
}

func (p *pairCount) now() sums { return sums{p.connections.Load(), p.bytes.Load(), p.last.Load()} }

// Take is wire/xds.Observer's.
func (s *Pairs) Take(most int) (seen mesh.Pairs, more bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.taken, s.otherTaken = s.taken[:0], s.other
	seen.Other = s.other
	for _, p := range s.of {
		now := p.now()
		if now == p.kept || now.connections == 0 { // it is about to be counted
			continue
		}
		if len(seen.List) == most {
			return seen, true
		}
		s.taken = append(s.taken, taken{p, now})
		one := mesh.Pair{
			Way: p.way, Connections: uint64(now.connections - p.kept.connections), Bytes: uint64(now.bytes - p.kept.bytes),
			First: p.first, Last: time.UnixMilli(now.last),
		}
		if one.Last.Before(one.First) {
			one.Last = one.First
		}
		seen.List = append(seen.List, one)
	}
	return seen, false
}

// Kept is wire/xds.Observer's.
func (s *Pairs) Kept() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.taken {
		t.pairCount.kept = t.sums
	}
	s.other -= s.otherTaken
	s.taken, s.otherTaken = nil, 0
}
