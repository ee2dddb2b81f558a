package xds

import (
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"tacit.dev/mesh"
)

// come lets the proxy of a node connect, and returns how it leaves.
func (s *Server) come(name string) (leave func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.node(name)
	p := s.arrive(name)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.depart(p)
	}
}

// A new Server counts nobody as gone as long as nodes come that an earlier one has told
// something: with many nodes that takes longer than any of them is waited for.
func TestNobodyIsGoneWhileNodesAreComing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(ServerConfig{GoneAfter: 30 * time.Second, Expect: []string{"n1", "n2", "n3", "n4"}})
		s.Register(grpc.NewServer())
		expect := func(after time.Duration, want ...string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			if got := s.Acked(0); !slices.Equal(got, want) {
				t.Errorf("waiting for %q, want %q", got, want)
			}
		}
		expect(20*time.Second, "n1", "n2", "n3", "n4")
		leave := s.come("n1")
		expect(20*time.Second, "n2", "n3", "n4")
		leave() // as one does that is cut while all come at once
		s.come("n2")
		expect(25*time.Second, "n1", "n3", "n4")
		s.come("n3")
		expect(29*time.Second, "n1", "n4")
		expect(2 * time.Second) // nobody came for as long as a node is waited for
		s.come("n1")()
		expect(29*time.Second, "n1")
		expect(2 * time.Second)
	})
}

// Who comes a few at a time does not hold up everybody for ever.
func TestNodesAreExpectedForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var names []string
		for c := range 100 {
			names = append(names, string(rune('0'+c/10))+string(rune('0'+c%10)))
		}
		s := NewServer(ServerConfig{GoneAfter: 30 * time.Second, Expect: names})
		s.Register(grpc.NewServer())
		began := time.Now()
		for i := 0; len(s.Acked(0)) > 0; i++ {
			time.Sleep(25 * time.Second)
			s.come(names[i])
		}
		if took := time.Since(began); took < 5*time.Minute || took > 6*time.Minute {
			t.Errorf("gone after %v, want about 5 min", took)
		}
	})
}

// A node that somebody knows to be lost is not waited for, also by a Server that never saw it;
// one that is connected is.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(ServerConfig{GoneAfter: time.Hour, Expect: []string{"n0", "n1", "n2"}})
		if !s.Forget("n0") || !s.Forget("unknown") {
			t.Error("what has left is not forgotten")
		}
		s.Register(grpc.NewServer())
		from := mesh.Process{Node: "n1"}
		s.mu.Lock()
		s.node("n1").opened[from] = 1
		s.mu.Unlock()
		leave := s.come("n1")
		if s.Forget("n1") {
			t.Error("a node that is connected is forgotten")
		}
		leave()
		s.dismiss(from)
		if got := s.Acked(0); !slices.Equal(got, []string{"n1", "n2"}) || s.Applied(everybody) != 0 {
			t.Errorf("waiting for %q: want n1 and n2", got)
		}
		if !s.Forget("n1") || !s.Forget("n2") || len(s.Acked(0)) > 0 || s.Applied(everybody) != math.MaxUint64 || len(s.Nodes()) > 0 {
			t.Errorf("waiting for %q, known %+v: want nobody", s.Acked(0), s.Nodes())
		}
		if <-s.Changed(); s.Gathering() {
			t.Error("nobody else is expected")
		}
	})
}
