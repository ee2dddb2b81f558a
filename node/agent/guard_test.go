package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	n.eventually("it is said that somebody changes them again and again", func() bool {
		return strings.Contains(n.agent.Dump()[0].Reason, "again and again")
	})
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

// A pod forwards for a container within it: that is refused, and control is told so once.
func TestForwardingPodIsPartlyProtected(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.CheckInterval = 200 * time.Millisecond })
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	inner, innerPath := namespace(t, "inner")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	if r := n.reports.until(t, "a", xds.Captured); r.Reason != "" {
		t.Errorf("at first: %q", r.Reason)
	}
	shell(t, ns, "ip link add up0 type veth peer name up1 && ip addr add 10.50.0.1/24 dev up0 && ip link set up1 up && ip link set up0 up && ip neigh add 10.50.0.9 lladdr 02:00:00:00:00:09 dev up0 && "+
		"ip link add in0 type veth peer name in1 netns "+innerPath+" && ip addr add 10.51.0.1/24 dev in0 && ip link set in0 up && "+
		"echo 1 >/proc/sys/net/ipv4/ip_forward")
	shell(t, inner, "ip addr add 10.51.0.2/24 dev in1 && ip link set in1 up && ip route add default via 10.51.0.1")
	refused := func() {
		t.Helper()
		err := inner.Do(func() error { _, err := net.DialTimeout("tcp", "10.50.0.9:80", limit); return err })
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("from within the pod: %v, want refused", err)
		}
	}
	// New interfaces are new rules, whose counters begin anew: so it is tried again.
	var told int
	n.eventually("the pod is said to be partly protected", func() bool {
		refused()
		n.reports.mu.Lock()
		defer n.reports.mu.Unlock()
		told = n.reports.count
		r := n.reports.last["a"]
		return r.State == xds.Captured && strings.Contains(r.Reason, "forwards")
	})
	before := n.agent.Dump()[0].Dropped["forwarded"]
	n.eventually("the next is counted", func() bool {
		refused()
		return n.agent.Dump()[0].Dropped["forwarded"] > before
	})
	n.reports.mu.Lock()
	if now := n.reports.count; now != told {
		t.Errorf("control is told %d times more", now-told)
	}
	n.reports.mu.Unlock()
	// Other exclusions: whether something is still refused is to be seen.
	w := word("a", true)
	w.ExcludeOutbound = []mesh.Exclusion{{Port: 80}}
	n.agent.Apply([]mesh.Pod{w})
	n.reports.untilIs(t, "the pod is protected", func() bool { r := n.reports.last["a"]; return r.State == xds.Captured && r.Reason == "" })
}

func shell(t *testing.T, ns *netns.NS, script string) {
	t.Helper()
	err := ns.Do(func() error {
		out, err := exec.Command("sh", "-c", script).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Addresses that a pod gets while it runs are told, and until the mesh knows them nobody gets in
// there.
func TestOtherAddressesAreTold(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	peer, peerPath := namespace(t, "peer")
	shell(t, ns, "ip link add up0 type veth peer name up1 netns "+peerPath+" && ip addr add 10.50.0.1/24 dev up0 && ip link set up0 up")
	shell(t, peer, "ip addr add 10.50.0.9/24 dev up1 && ip link set up1 up")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	add := addOf("a", path)
	add.Addresses = []netip.Addr{netip.MustParseAddr("10.50.0.1")}
	told := make(chan error, 1)
	go func() { told <- n.ask(add) }()
	n.reports.until(t, "a", xds.Captured)
	other := netip.MustParseAddr("10.50.0.2")
	shell(t, ns, "ip addr add 10.50.0.2/24 dev up0")
	r := n.reports.untilIs
	r(t, "the other address is told", func() bool { return slices.Equal(n.reports.last["a"].Others, []netip.Addr{other}) })
	dial := func() error {
		return peer.Do(func() error { _, err := net.DialTimeout("tcp", "10.50.0.2:80", 2*time.Second); return err })
	}
	if err := dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("before the mesh knows the address: %v, want refused", err)
	}
	w := word("a", true)
	w.Known = []netip.Addr{netip.MustParseAddr("10.50.0.1"), other}
	n.agent.Apply([]mesh.Pod{w})
	if err := <-told; err != nil {
		t.Fatal(err)
	}
	n.eventually("it is captured there", func() bool { return dial() == nil })
	shell(t, ns, "ip addr del 10.50.0.2/24 dev up0")
	r(t, "it is told that the address is gone", func() bool { return len(n.reports.last["a"].Others) == 0 })
}

// Who forwards again and again is told of once, and an hour after the last time no more.
func TestPartlyProtectedForAWhile(t *testing.T) {
	var g guard
	now := time.Now()
	for _, step := range []struct {
		after  time.Duration
		fresh  map[string]uint64
		partly bool
	}{
		{0, nil, false},
		{0, map[string]uint64{"outgoing": 1}, false},
		{time.Minute, map[string]uint64{"forwarded": 1}, true},
		{partlyFor, map[string]uint64{"forwarded": 1}, true},
		{2*partlyFor - time.Second, nil, true},
		{2 * partlyFor, nil, false},
		{3 * partlyFor, map[string]uint64{"other_address": 1}, true},
		{4 * partlyFor, nil, false},
	} {
		at := now.Add(step.after)
		g.noteRefused(step.fresh, at)
		if got := g.partly(at) != ""; got != step.partly {
			t.Errorf("after %v: %v", step.after, got)
		}
	}
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
