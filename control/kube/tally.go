package kube

import (
	"cmp"
	"slices"
)

// tally keeps problems by what they were noticed at, so that each of them can go. What is told
// of them is put together when somebody asks, of the namespaces where something differs.
type tally struct {
	at     map[any][]finding
	spaces map[string]*spaceTally
	old    map[string]bool // namespaces whose list is not up to date
	list   []Problem
	untold int
}

type spaceTally struct {
	at    map[any][]finding
	list  []Problem
	count int
}

// set replaces what was noticed at a piece.
func (t *tally) set(piece any, now []finding) {
	had := t.at[piece]
	if slices.Equal(had, now) {
		return
	}
	if t.at == nil {
		t.at, t.spaces, t.old = make(map[any][]finding), make(map[string]*spaceTally), make(map[string]bool)
	}
	for _, f := range had {
		delete(t.spaces[f.namespace].at, piece)
		t.old[f.namespace] = true
	}
	for _, f := range now {
		s := find(t.spaces, f.namespace, func() *spaceTally { return &spaceTally{at: make(map[any][]finding)} })
		s.at[piece] = append(s.at[piece], f)
		t.old[f.namespace] = true
	}
	if t.at[piece] = now; len(now) == 0 {
		delete(t.at, piece)
	}
}

// stale tells whether told may return something else than when it was called last.
func (t *tally) stale() bool { return len(t.old) > 0 }

// told is as of problems.
func (t *tally) told() ([]Problem, int) {
	if !t.stale() {
		return t.list, t.untold
	}
	for namespace := range t.old {
		if s := t.spaces[namespace]; len(s.at) == 0 {
			delete(t.spaces, namespace)
		} else {
			s.sum()
		}
	}
	clear(t.old)
	t.list, t.untold = nil, 0
	for _, s := range t.spaces {
		t.list = append(t.list, s.list...)
		t.untold += s.count
	}
	slices.SortFunc(t.list, Problem.compare)
	t.list = slices.Clip(t.list[:min(len(t.list), maxProblems)])
	for _, p := range t.list {
		t.untold -= 1 + p.More
	}
	return t.list, t.untold
}

func (s *spaceTally) sum() {
	var all problems
	for _, findings := range s.at {
		for _, f := range findings {
			all.add(f)
		}
	}
	s.list, _ = all.told()
	s.count = all.count
}

func (p Problem) compare(q Problem) int {
	return cmp.Or(cmp.Compare(p.Object, q.Object), cmp.Compare(p.Text, q.Text))
}
