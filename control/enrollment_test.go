package control

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"tacit.dev/mesh"
)

// rule is one line of the state machine as a person would write it: "-" is any.
type rule struct {
	from                State
	wanted, word, acked string
	// passed: "-", or how long it is in its state: new, rested, settled
	passed string
	to     State
}

// Every combination of what decides meets exactly one of these.
var rules = []rule{
	{Outside, "yes", "-", "-", "-", Enrolling},
	{Outside, "no", "captured", "-", "-", Releasing}, // nobody asked: control may have forgotten
	{Outside, "no", "silent", "-", "-", Outside},
	{Outside, "no", "stale", "-", "-", Outside},
	{Outside, "no", "free", "-", "-", Outside},

	{Enrolling, "no", "-", "-", "-", Releasing}, // never announced: nobody has to acknowledge
	{Enrolling, "yes", "captured", "-", "-", Announced},
	{Enrolling, "yes", "silent", "-", "-", Enrolling},
	{Enrolling, "yes", "free", "-", "-", Enrolling},
	{Enrolling, "yes", "stale", "-", "new", Enrolling},
	{Enrolling, "yes", "stale", "-", "rested", Enrolling},
	{Enrolling, "yes", "stale", "-", "settled", Announced}, // it was captured all the time

	{Announced, "yes", "-", "-", "-", Announced}, // whatever the agent says
	{Announced, "no", "-", "-", "-", Withdrawing},

	{Withdrawing, "yes", "-", "-", "-", Announced}, // it was never told to leave
	{Withdrawing, "no", "-", "no", "-", Withdrawing},
	{Withdrawing, "no", "-", "yes", "-", Releasing},

	{Releasing, "-", "-", "-", "new", Releasing}, // what was said may have crossed with the release
	{Releasing, "-", "free", "-", "rested", Outside},
	{Releasing, "-", "silent", "-", "rested", Releasing},
	{Releasing, "-", "captured", "-", "rested", Releasing},
	{Releasing, "-", "stale", "-", "rested", Releasing},
	{Releasing, "-", "free", "-", "settled", Outside},
	{Releasing, "-", "silent", "-", "settled", Outside},      // it was never captured
	{Releasing, "no", "captured", "-", "settled", Releasing}, // still drained
	{Releasing, "no", "stale", "-", "settled", Releasing},
	{Releasing, "yes", "captured", "-", "settled", Outside},
	{Releasing, "yes", "stale", "-", "settled", Outside},
}

func (r rule) meets(s State, v situation) bool {
	is := func(want string, have bool) bool {
		return want == "-" || want == "yes" && have || want == "no" && !have
	}
	passed := "new"
	if v.settled {
		passed = "settled"
	} else if v.rested {
		passed = "rested"
	}
	return r.from == s && is(r.wanted, v.wanted) && is(r.acked, v.acked) &&
		(r.passed == "-" || r.passed == passed) && (r.word == "-" || r.word == string(v.word))
}

func TestEveryStateAndSituation(t *testing.T) {
	count := 0
	for _, s := range []State{Outside, Enrolling, Announced, Withdrawing, Releasing} {
		for _, w := range []word{silent, captured, stale, free} {
			for bits := range 12 {
				checkStep(t, s, situation{wanted: bits&1 != 0, word: w, acked: bits&2 != 0, rested: bits >= 4, settled: bits >= 8})
				count++
			}
		}
	}
	if count != 240 {
		t.Errorf("%d combinations, want 240", count)
	}
}

func checkStep(t *testing.T, s State, v situation) {
	t.Helper()
	var met []rule
	for _, r := range rules {
		if r.meets(s, v) {
			met = append(met, r)
		}
	}
	if len(met) != 1 {
		t.Fatalf("%s %+v: meets %d rules, want one", s, v, len(met))
	}
	if got := s.after(v); got != met[0].to {
		t.Errorf("%s %+v: after it is %s, want %s", s, v, got, met[0].to)
	}
}

// What is told follows from the state alone, and keeps the order: announced
// implies enrolled, and no step goes from announced to not enrolled at once.
func TestWhatIsTold(t *testing.T) {
	for _, row := range []struct {
		state                   State
		enroll, direct, mayDial bool
	}{
		{Outside, false, false, false}, {Enrolling, true, false, true}, {Announced, true, true, true}, {Withdrawing, true, false, true}, {Releasing, false, false, true},
	} {
		if row.state.enroll() != row.enroll || row.state.direct() != row.direct || row.state.mayDial() != row.mayDial {
			t.Errorf("%s: enroll %v direct %v may dial %v, want %v %v %v", row.state,
				row.state.enroll(), row.state.direct(), row.state.mayDial(), row.enroll, row.direct, row.mayDial)
		}
	}
	for _, r := range rules {
		if r.from.direct() && !r.to.enroll() || !r.from.enroll() && r.to.direct() {
			t.Errorf("%s goes to %s at once", r.from, r.to)
		}
	}
}

// The machine cannot turn in circles within one moment.
func TestMachineComesToRest(t *testing.T) {
	for _, s := range []State{Outside, Enrolling, Announced, Withdrawing, Releasing} {
		for _, w := range []word{silent, captured, stale, free} {
			for _, wanted := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%s/%v", s, w, wanted), func(t *testing.T) {
					e := enrollment{state: s, word: w, withdrawn: 1}
					e.pod.Enroll = wanted
					o := outlook{now: e.since.Add(2 * settleAfter),
						acked: func(uint64) bool { return true }, connected: map[string]bool{e.pod.Node: true}}
					e.advance(o) // hangs if not
					if e.advance(o) {
						t.Errorf("still changes, to %s", e.state)
					}
				})
			}
		}
	}
}

// Where every node knows a pod stays so while they hear of more addresses of it.
func TestKnownWhileMoreSpreads(t *testing.T) {
	first, second := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1")
	e := &enrollment{state: Announced}
	applied := uint64(0)
	for version, step := range []struct{ at, before, after []netip.Addr }{
		{[]netip.Addr{first}, nil, []netip.Addr{first}},
		{[]netip.Addr{first, second}, []netip.Addr{first}, []netip.Addr{first, second}},
		{[]netip.Addr{second}, []netip.Addr{second}, []netip.Addr{second}},
	} {
		e.pod.Workload = &mesh.Workload{Addresses: step.at}
		if !e.announced(uint64(version) + 1) {
			t.Errorf("%v: not announced", step.at)
		}
		e.spread(func() uint64 { return applied })
		if !slices.Equal(e.everywhere, step.before) {
			t.Errorf("%v is known before every node knows it: %v, want %v", step.at, e.everywhere, step.before)
		}
		applied = uint64(version) + 1
		e.spread(func() uint64 { return applied })
		if !slices.Equal(e.everywhere, step.after) {
			t.Errorf("%v is known to every node: %v, want %v", step.at, e.everywhere, step.after)
		}
	}
	e.state = Withdrawing
	if e.announced(9); e.everywhere != nil {
		t.Errorf("withdrawn, and known at %v", e.everywhere)
	}
}
