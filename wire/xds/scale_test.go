package xds

import (
	"fmt"
	"runtime"
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// scales are what benchmarks compare within one run.
var scales = []int{10_000, 100_000}

func serverWith(n int) *Server {
	s := NewServer(ServerConfig{})
	s.Publish(workloads(n))
	return s
}

// bareStream is one that nothing carries.
func bareStream(s *Server, from mesh.Process) *stream {
	s.mu.Lock()
	s.node(from.Node).opened[from]++
	s.mu.Unlock()
	st := &stream{from: from, poke: make(chan struct{}, 1), subs: map[string]*subscription{}, refusals: map[string]string{}}
	s.join(st)
	return st
}

// connectBare makes a bare stream of a proxy that says what it holds.
func connectBare(t testing.TB, s *Server, node string, held *message.Held) *stream {
	t.Helper()
	st := bareStream(s, mesh.Process{Node: node})
	if err := s.take(st, &message.DeltaDiscoveryRequest{TypeUrl: addressType, Held: held}); err != nil {
		t.Fatal(err)
	}
	return st
}

// drain takes everything that is due, acknowledges it, and counts resources.
func drain(t testing.TB, s *Server, st *stream) (resources int) {
	t.Helper()
	for {
		resp, err := s.next(st)
		if err != nil {
			t.Fatal(err)
		}
		if resp == nil {
			return resources
		}
		resources += resp.count()
		if err := s.take(st, &message.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}); err != nil {
			t.Fatal(err)
		}
	}
}

func one(i int) Update {
	return Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{workload(i%1000, func(w *mesh.Workload) { w.CanonicalRevision = fmt.Sprint(i) })}}}
}

// An update allocates for what changes, whatever there is besides.
func TestUpdateCostsWhatChanges(t *testing.T) {
	cost := func(n int) float64 {
		s, i := serverWith(n), 0
		return testing.AllocsPerRun(100, func() { i++; s.Update(one(i)) })
	}
	small, large := cost(1000), cost(10_000)
	t.Logf("allocations: %v of 1,000, %v of 10,000", small, large)
	if large > 1.1*small {
		t.Errorf("%v allocations of 1,000, %v of 10,000", small, large)
	}
}

// A stream takes the same memory whatever there is, far less than 50 kB.
func TestStreamsAreSmall(t *testing.T) {
	s := serverWith(10_000)
	const n = 200
	before := heapNow()
	var streams []*stream
	for i := range n {
		st := connectBare(t, s, fmt.Sprint("n", i), &message.Held{})
		if got := drain(t, s, st); got != 10_000 {
			t.Fatalf("%d resources: want all", got)
		}
		streams = append(streams, st)
	}
	each := (heapNow() - before) / n
	t.Logf("%d bytes each", each)
	if each > 4<<10 {
		t.Errorf("%d bytes for a stream", each)
	}
	runtime.KeepAlive(streams)
	runtime.KeepAlive(s)
}

func heapNow() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// Who comes back is told what it lacks: by the server that it knows just that, by another
// one what is in buckets that differ.
func TestReconnectTellsWhatDiffers(t *testing.T) {
	s := serverWith(10_000)
	held := &message.Held{Origin: s.origin, Version: s.version}
	s.Update(one(7))
	if n := drain(t, s, connectBare(t, s, "n1", held)); n != 1 {
		t.Errorf("%d resources after one change: want 1", n)
	}
	held.Digests = heldBy(s).digests.marshal()
	other := serverWith(10_000)
	if n := drain(t, other, connectBare(t, other, "n1", held)); n == 0 || n > 40 {
		t.Errorf("another server, which lacks the change, tells %d resources: want one bucket", n)
	}
	other.Update(one(7))
	if n := drain(t, other, connectBare(t, other, "n1", held)); n != 0 {
		t.Errorf("another server that was told the same tells %d resources", n)
	}
}

// BenchmarkUpdate is one change, with a thousand streams to wake.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range scales {
		b.Run(fmt.Sprint(n, " pods"), func(b *testing.B) {
			s := serverWith(n)
			for i := range 1000 {
				connectBare(b, s, fmt.Sprint("n", i), &message.Held{Origin: s.origin, Version: s.version})
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s.Update(one(i))
			}
		})
	}
}

// BenchmarkDelta is one change, and one stream that is told of it and acknowledges.
func BenchmarkDelta(b *testing.B) {
	for _, n := range scales {
		b.Run(fmt.Sprint(n, " pods"), func(b *testing.B) {
			s := serverWith(n)
			st := connectBare(b, s, "n1", &message.Held{Origin: s.origin, Version: s.version})
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s.Update(one(i))
				drain(b, s, st)
			}
		})
	}
}

// BenchmarkReconnect is a stream that begins, until it knows that nothing differs, with the
// same server or another one that says the same, or has been told all.
func BenchmarkReconnect(b *testing.B) {
	for _, n := range scales {
		s := serverWith(n)
		same := &message.Held{Origin: s.origin, Version: s.version}
		other := &message.Held{Origin: []byte("another"), Digests: s.world.digests.marshal()}
		for name, held := range map[string]*message.Held{"same version": same, "other leader": other, "first": {}} {
			b.Run(fmt.Sprint(name, ", ", n, " pods"), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					st := connectBare(b, s, "n1", held)
					drain(b, s, st)
					s.leave(st)
				}
			})
		}
	}
}

// BenchmarkAck is one of so many proxies that acknowledges.
func BenchmarkAck(b *testing.B) {
	for _, n := range []int{50, 5000} {
		b.Run(fmt.Sprint(n, " nodes"), func(b *testing.B) {
			s := serverWith(1)
			var all []*stream
			for i := range n {
				all = append(all, connectBare(b, s, fmt.Sprint("n", i), &message.Held{}))
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s.noteAnswer(all[i%n], addressType, uint64(i), nil)
			}
		})
	}
}

// BenchmarkStreamMemory tells what a stream takes in the server, without what gRPC and TLS
// keep for its connection.
func BenchmarkStreamMemory(b *testing.B) {
	for _, n := range scales {
		b.Run(fmt.Sprint(n, " pods"), func(b *testing.B) {
			s := serverWith(n)
			for b.Loop() {
				before := heapNow()
				var all []*stream
				for i := range 20 {
					st := connectBare(b, s, fmt.Sprint("n", i), &message.Held{})
					drain(b, s, st)
					all = append(all, st)
				}
				b.ReportMetric(float64(heapNow()-before)/20, "B/stream")
				for _, st := range all {
					s.leave(st)
				}
			}
		})
	}
}
