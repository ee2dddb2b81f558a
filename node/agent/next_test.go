package agent

import "testing"

func TestNext(t *testing.T) {
	for _, c := range []struct {
		name string
		f    facts
		want step
	}{
		{"new, control silent", facts{}, wait},
		{"new, not to be enrolled", facts{known: true}, wait},
		{"to be enrolled", facts{known: true, enroll: true}, open},
		{"listening, no proxy", facts{known: true, enroll: true, open: true}, wait},
		{"listening", facts{known: true, enroll: true, open: true, connected: true}, tell},
		{"told", facts{known: true, enroll: true, open: true, connected: true, proxy: saidServe}, wait},
		{"ready", facts{known: true, enroll: true, open: true, connected: true, proxy: saysReady}, capture},
		{"captured", facts{known: true, enroll: true, open: true, connected: true, proxy: saysReady, rules: capturing}, wait},
		{"captured, proxy away", facts{known: true, enroll: true, open: true, rules: capturing}, wait},
		{"captured, new proxy", facts{known: true, enroll: true, open: true, rules: capturing, connected: true}, tell},
		{"captured, new agent", facts{known: true, enroll: true, rules: capturing}, open},
		{"rules changed, proxy away", facts{known: true, enroll: true, open: true, rules: stale}, capture},
		{"rules found again, control silent", facts{rules: stale}, wait},
		{"out: captured", facts{known: true, open: true, connected: true, proxy: saysReady, rules: capturing}, drain},
		{"out: rules changed", facts{known: true, open: true, connected: true, proxy: saysReady, rules: stale}, drain},
		{"out: draining", facts{known: true, open: true, connected: true, proxy: saysReady, rules: draining}, tellDrain},
		{"out: draining, not ready", facts{known: true, open: true, connected: true, proxy: saidServe, rules: draining}, tellDrain},
		{"out: told to drain", facts{known: true, open: true, connected: true, proxy: saidDrain, rules: draining}, wait},
		{"out: proxy away", facts{known: true, open: true, rules: draining}, wait},
		{"out: new proxy", facts{known: true, open: true, connected: true, rules: draining}, tell},
		{"out: new agent", facts{known: true, connected: true, rules: draining}, open},
		{"out: drained", facts{known: true, open: true, connected: true, proxy: saysDrained, rules: draining}, release},
		{"out: never captured", facts{known: true, open: true, connected: true, proxy: saidServe}, release},
		{"out: never captured, proxy away", facts{known: true, open: true}, release},
		{"in again while draining", facts{known: true, enroll: true, open: true, connected: true, proxy: saidDrain, rules: draining}, tell},
		{"in again, ready", facts{known: true, enroll: true, open: true, connected: true, proxy: saysReady, rules: draining}, capture},
		{"gone", facts{gone: true, known: true, enroll: true, open: true, rules: capturing}, forget},
		{"gone, control silent", facts{gone: true}, forget},
	} {
		if got := next(c.f); got != c.want {
			t.Errorf("%s: step %d, want %d", c.name, got, c.want)
		}
	}
}

// Whatever has happened before, following the steps leads to where control wants
// the pod, in few steps.
func TestNextArrives(t *testing.T) {
	for _, b := range []int{0, 1, 2, 3, 4, 5, 6, 7} {
		for _, r := range []rules{noRules, stale, capturing, draining} {
			for _, w := range []proxyWord{unsaid, saidServe, saysReady, saidDrain, saysDrained} {
				f := facts{known: true, enroll: b&1 != 0, open: b&2 != 0, gone: b&4 != 0, connected: true, rules: r, proxy: w}
				arrives(t, f)
			}
		}
	}
}

func arrives(t *testing.T, begin facts) {
	t.Helper()
	f := begin
	for range 8 {
		switch next(f) {
		case forget:
			return
		case open:
			f.open = true
		case tell:
			f.proxy = saidServe
		case capture:
			f.rules = capturing
		case drain:
			f.rules = draining
		case tellDrain:
			f.proxy = saidDrain
		case release:
			f.rules, f.open, f.proxy = noRules, false, unsaid
		case wait:
			switch f.proxy { // the proxy answers
			case saidServe:
				f.proxy = saysReady
			case saidDrain:
				f.proxy = saysDrained
			}
		}
	}
	in := f.rules == capturing && f.open && f.proxy == saysReady
	out := f.rules == noRules && !f.open
	if begin.gone || (f.enroll && !in) || (!f.enroll && !out) {
		t.Errorf("from %+v it stays at %+v", begin, f)
	}
}
