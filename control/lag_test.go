package control

import (
	"strings"
	"testing"
	"time"

	"tacit.dev/wire/xds"
)

// A node that stays behind is shown, with its version; one that keeps up is not.
func TestBehind(t *testing.T) {
	now := time.Now()
	var l lags
	isNode := func(name string) bool { return name != "stranger" }
	at := func(after time.Duration, nodes ...xds.NodeStatus) (names string, again bool) {
		list, again := l.behind(nodes, isNode, now.Add(after))
		for _, n := range list {
			names += n.Node + " "
		}
		return strings.TrimSpace(names), again
	}
	slow := xds.NodeStatus{Node: "slow", Proxy: true, Behind: true, Acked: 4}
	for _, row := range []struct {
		after time.Duration
		nodes []xds.NodeStatus
		want  string
		again bool
	}{
		{0, []xds.NodeStatus{slow, {Node: "fine", Proxy: true, Acked: 5}}, "", true},
		{time.Second, []xds.NodeStatus{slow, {Node: "moves", Proxy: true, Behind: true, Acked: 5}}, "", true},
		{behindAfter, []xds.NodeStatus{slow, {Node: "moves", Proxy: true, Behind: true, Acked: 6}}, "slow", true},
		{behindAfter + time.Second, []xds.NodeStatus{{Node: "slow", Proxy: true, Behind: true, Acked: 5}}, "", true},
		{2 * behindAfter, []xds.NodeStatus{{Node: "away", GoneSince: now.Add(behindAfter), Acked: 3}, {Node: "gone", GoneSince: now.Add(2 * behindAfter)}}, "away", true},
		{2 * behindAfter, []xds.NodeStatus{{Node: "stranger", GoneSince: now}}, "", false},
		{3 * behindAfter, nil, "", false},
	} {
		if got, again := at(row.after, row.nodes...); got != row.want || again != row.again {
			t.Errorf("after %s: %q, again %v, want %q, %v", row.after, got, again, row.want, row.again)
		}
	}
	if len(l) != 0 {
		t.Errorf("left over: %v", l)
	}
}
