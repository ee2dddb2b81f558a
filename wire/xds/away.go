package xds

import "time"

// A node whose proxy has left may still act on what it knows, and so is waited for:
//
//	          depart           GoneAfter
//	connected ──────► away ──────────────► gone: nobody waits for it
//	    ▲             │  ▲       Forget      ▲
//	    └─────────────┘  │ ──────────────────┘
//	       arrive     Expect
//
// While nodes gather around a new Server, nobody becomes gone but by Forget: many nodes need longer
// for it than any of them is waited for.

// gatherAtMost is for how many times GoneAfter nodes gather at most, should the last come ever so
// slowly.
const gatherAtMost = 10

// Gathering reports whether it is still to be seen who is there: nodes cannot come yet, or
// of those of Expect one has come less than GoneAfter ago, and another one has not. Changed tells of the end.
func (s *Server) Gathering() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gathering
}

// gather lets time begin: nodes can come. Called with mu.
func (s *Server) gather() {
	s.gatherLimit = time.Now().Add(gatherAtMost * s.cfg.GoneAfter)
	s.gatherTimer = time.AfterFunc(s.cfg.GoneAfter, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !time.Now().Before(s.gatherBy) { // nobody has come meanwhile
			s.gathered()
		}
	})
	s.gatherOn()
}

// gatherOn waits for another one, if there is any. Called with mu.
func (s *Server) gatherOn() {
	wait := min(s.cfg.GoneAfter, time.Until(s.gatherLimit))
	s.gatherBy = time.Now().Add(wait)
	if s.gatherTimer.Reset(wait); len(s.expected) == 0 {
		s.gatherTimer.Stop()
		s.gathered()
	}
}

// gathered lets the time of those begin that are away. Called with mu.
func (s *Server) gathered() {
	s.gathering = false
	for name := range s.away {
		s.await(name)
	}
	s.notify()
}

// await sees to it that a node that is away counts as gone in time. Called with mu.
func (s *Server) await(name string) {
	n := s.nodes[name]
	s.away[name] = true
	if s.gathering {
		return
	}
	n.timer = time.AfterFunc(s.cfg.GoneAfter-time.Since(n.gone), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.nodes[name] == n && !n.gone.IsZero() { // it has not returned meanwhile
			s.release(name)
		}
	})
}

// release waits no longer for a node, and has Changed tell. Called with mu.
func (s *Server) release(name string) {
	delete(s.away, name)
	s.forget(name)
	s.notify()
}

// Forget waits no longer for a node that has left, since somebody knows that it does not act any
// more. It reports false, and changes nothing, if the node is connected.
func (s *Server) Forget(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[name]
	if n != nil && len(n.opened) > 0 {
		return false
	}
	if s.away[name] {
		s.release(name)
	}
	delete(s.expected, name)
	if s.gatherTimer != nil && s.gathering && len(s.expected) == 0 {
		s.gatherOn()
	}
	return true
}
