package control

import (
	"maps"
	"slices"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

const (
	// awayAfter is how long an agent that is not connected to this leader is waited for,
	// before nobody knows about its pods.
	awayAfter = 30 * time.Second
	// waitedAfter is how long a withdrawal takes before people are told which nodes it waits
	// for: most are done by then.
	waitedAfter = 3 * time.Second
)

// agents takes in which agents have come or gone. While nodes gather around a new leader,
// nobody is away.
func (r *roster) agents(moved map[string]bool, gathering bool, now time.Time) {
	for node, is := range moved {
		if !is {
			delete(r.connected, node)
			r.miss(node, now)
			continue
		}
		r.connected[node] = true
		if long := r.isAway(node, now); long {
			r.touchNode(node)
		}
		delete(r.away, node)
	}
	if r.gathering && !gathering {
		r.gathering = false
		for node := range r.on {
			r.miss(node, now)
		}
	}
}

// miss notes since when the agent of a node with pods is not connected.
func (r *roster) miss(node string, now time.Time) {
	if _, known := r.away[node]; known || r.gathering || r.connected[node] || r.on[node] == nil {
		return
	}
	r.away[node] = now
	r.timers.push(timer{at: now.Add(awayAfter), node: node})
}

// isAway tells whether the agent of a node is away for so long that nobody knows any more
// how its pods are.
func (r *roster) isAway(node string, now time.Time) bool {
	since, is := r.away[node]
	return is && now.Sub(since) >= awayAfter
}

// lost is the mark by which somebody has said of a node that it is lost. It is spent when the
// node connects: what it loses after that, nobody has spoken of.
type lost struct {
	mark          string
	heeded, spent bool
}

// mark notes what an object says of its node.
func (r *roster) mark(n kube.Node) {
	switch {
	case n.Lost == "":
		delete(r.lost, n.Name)
	case r.lost[n.Name].mark != n.Lost:
		r.lost[n.Name] = lost{mark: n.Lost}
	}
}

// forget lets nobody wait for nodes that are lost.
func (r *roster) forget(forget func(node string) bool) {
	for node, l := range r.lost {
		switch is := !l.spent && forget(node); {
		case is && !l.heeded:
			l.heeded = true
			r.log.Info("node is lost, nothing waits for it", "node", node)
		case !is && !l.spent:
			l.spent = true
			r.log.Warn("node is said to be lost, and is connected", "node", node)
		}
		r.lost[node] = l
	}
}

// tellLost names the nodes that are lost, and those whose mark is spent, by name.
func (r *roster) tellLost() (names []string, spent []kube.Node) {
	for _, node := range slices.Sorted(maps.Keys(r.lost)) {
		if r.lost[node].spent {
			spent = append(spent, r.nodes[node])
		} else {
			names = append(names, node)
		}
	}
	return names, spent
}

// waited names the nodes that the oldest withdrawal waits for, if it has waited for long.
func (r *roster) waited(acked func(version uint64) []string, nodes []xds.NodeStatus, now time.Time) (list []kube.WaitedNode) {
	if len(r.withdrawing) == 0 {
		return nil
	}
	first := r.withdrawing[0]
	since := first.pod.since
	if now.Sub(since) < waitedAfter {
		return nil
	}
	connected := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		connected[n.Node] = n.Proxy
	}
	for _, node := range acked(first.version) {
		w := kube.WaitedNode{Node: node, Connected: connected[node]}
		w.Since.Time = since
		list = append(list, w)
	}
	return list
}
