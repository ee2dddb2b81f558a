package control

import (
	"sync"

	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

// inbox brings to the reconciling goroutine what others have to say. Of several events of
// an object only the latest counts, and of several reports about one pod; so it is
// bounded by the number of objects and nobody waits. It is safe for concurrent use.
type inbox struct {
	wake chan struct{} // one slot: something is there

	mu      sync.Mutex // guards what follows
	objects kube.Pending
	told    bool // somebody has spoken of objects, even if there are none
	nodes   map[string]*nodeInbox
}

// nodeInbox is what one agent said: all of it if list is not nil, then changes.
type nodeInbox struct {
	list    []xds.Report
	full    bool
	changes map[string]xds.Report
}

func newInbox() *inbox {
	return &inbox{wake: make(chan struct{}, 1), nodes: make(map[string]*nodeInbox)}
}

func (b *inbox) ring() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// putObjects adds what has changed since the objects were those of before.
func (b *inbox) putObjects(events []kube.Event, before kube.Set) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range events {
		b.objects.Put(e, before[e.Key] != nil)
	}
	b.told = true
	b.ring()
}

// putReports replaces everything that the node said before.
func (b *inbox) putReports(node string, all []xds.Report) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nodes[node] = &nodeInbox{list: all, full: true, changes: make(map[string]xds.Report)}
	b.ring()
}

// maxReports bounds what one node can say between two looks into the inbox; a
// kubelet runs some hundred pods at most.
const maxReports = 4096

// putReport keeps the latest report about a pod.
func (b *inbox) putReport(node string, r xds.Report) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.nodes[node]
	if n == nil {
		n = &nodeInbox{changes: make(map[string]xds.Report)}
		b.nodes[node] = n
	}
	if _, known := n.changes[r.UID]; known || len(n.changes) < maxReports {
		n.changes[r.UID] = r
	}
	b.ring()
}

// take empties the inbox. told tells whether objects were spoken of.
func (b *inbox) take() (events []kube.Event, told bool, nodes map[string]*nodeInbox) {
	b.mu.Lock()
	defer b.mu.Unlock()
	events, told, nodes = b.objects.Take(), b.told, b.nodes
	b.told, b.nodes = false, make(map[string]*nodeInbox)
	return events, told, nodes
}
