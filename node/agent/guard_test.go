package agent

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/xds"
)

// Somebody deletes the rules: they are back at once, without an interval's wait.
func TestChangedRulesAreRepaired(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	k, err := redirect.NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for i := range 3 {
		// What goes while the agent still puts the last time right is part of that time.
		n.eventually("the repair is counted", func() bool {
			if k.Check(t.Context(), ns, redirect.Config{}) == nil {
				if err := k.Remove(t.Context(), ns); err != nil {
					t.Fatal(err)
				}
			}
			return n.metric("tacit_agent_rules_repaired_total") > float64(i)
		})
		n.eventually("the rules are back", func() bool { return k.Check(t.Context(), ns, redirect.Config{}) == nil })
	}
}

// Somebody flushes the rules again and again: the first repair is at once, the next ones
// are not, and the pod is said to be unprotected until it is at rest.
func TestRepairsBackOff(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	n.reports.until(t, "a", xds.Captured)
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		n.eventually("there are rules", func() bool { return hasRules(t, ns) || time.Now().After(end) })
		flush(t, ns)
	}
	if n := n.metric("tacit_agent_rules_repaired_total"); n < 2 || n > 7 {
		t.Errorf("put right %v times in 4 s", n)
	}
	n.reports.until(t, "a", xds.Unprotected)
	if r := n.agent.Dump()[0].Reason; !strings.Contains(r, "again and again") {
		t.Errorf("reason %q", r)
	}
	n.reports.until(t, "a", xds.Captured)
}

func flush(t *testing.T, ns *netns.NS) {
	t.Helper()
	if err := ns.Do(func() error { return exec.Command("nft", "flush", "ruleset").Run() }); err != nil {
		t.Fatal(err)
	}
}

func hasRules(t *testing.T, ns *netns.NS) (has bool) {
	t.Helper()
	err := ns.Do(func() error {
		out, err := exec.Command("nft", "list", "tables").Output()
		has = strings.Contains(string(out), "inet tacit\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return has
}

// A guard's counters begin anew with each ruleset; what was dropped is added up.
func TestGuardCountersAddUp(t *testing.T) {
	var g guard
	for _, step := range []struct {
		now   map[string]uint64
		fresh uint64
	}{
		{map[string]uint64{"outgoing": 0}, 0},
		{map[string]uint64{"outgoing": 3}, 3},
		{nil, 0}, // could not be read
		{map[string]uint64{"outgoing": 5}, 2},
		{map[string]uint64{"outgoing": 1}, 1}, // other rules
	} {
		if got := g.see(step.now)["outgoing"]; got != step.fresh {
			t.Errorf("%v: %d new, want %d", step.now, got, step.fresh)
		}
	}
	if g.dropped["outgoing"] != 6 {
		t.Errorf("%d in all, want 6", g.dropped["outgoing"])
	}
}
