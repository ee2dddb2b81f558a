package control

import (
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

// behindAfter is how long a node may be behind what was told last before people are shown that.
const behindAfter = 3 * time.Second

// lag is since when a node has been behind with the same version.
type lag struct {
	version uint64
	since   time.Time
}

// lags are those of the nodes that are behind, by name.
type lags map[string]lag

// behind are the nodes that have been behind for long. again says that time alone, or an
// acknowledgement of which nobody is told, may change that.
func (l *lags) behind(nodes []xds.NodeStatus, isNode func(string) bool, now time.Time) (list []kube.BehindNode, again bool) {
	next := make(lags)
	for _, n := range nodes { // by name
		away := !n.Proxy && !n.GoneSince.IsZero()
		if !n.Behind && !away || !isNode(n.Node) {
			continue
		}
		had, is := (*l)[n.Node]
		if !is || had.version != n.Acked {
			had = lag{n.Acked, now}
		}
		if away {
			had.since = n.GoneSince
		}
		next[n.Node] = had
		long := now.Sub(had.since) >= behindAfter
		if again = again || n.Proxy || !long; long {
			b := kube.BehindNode{Node: n.Node, Connected: n.Proxy, Version: n.Acked}
			b.Since.Time = had.since
			list = append(list, b)
		}
	}
	*l = next
	return list, again
}
