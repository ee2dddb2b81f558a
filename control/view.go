package control

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/pause"
	"tacit.dev/wire/xds"
)

const (
	// showEvery is how often people are shown something new at most.
	showEvery = 500 * time.Millisecond
	// enrollingAfter is how long an enrollment may take without a word about it: most
	// are done by then.
	enrollingAfter = 3 * time.Second
	// maxShown bounds the pods of one view. Their conditions are written at a rate, and the status
	// of the Mesh, and the nodes that lose their taint, wait for that.
	maxShown = 500
)

// Display shows people how far the mesh is, where they look for it. Show writes
// what differs; what it could not write is in its error. One goroutine calls it.
type Display interface {
	Show(ctx context.Context, v kube.View) error
}

// noDisplay is for sources where nobody looks.
type noDisplay struct{}

func (noDisplay) Show(context.Context, kube.View) error { return nil }

// presenter carries the latest view to a display, no faster than it can.
type presenter struct {
	display Display
	latest  atomic.Pointer[kube.View]
	poke    chan struct{} // one slot
	log     *slog.Logger
}

func newPresenter(d Display, log *slog.Logger) *presenter {
	if d == nil {
		d = noDisplay{}
	}
	return &presenter{display: d, poke: make(chan struct{}, 1), log: log}
}

// put replaces the view; one that was not shown yet was out of date.
func (p *presenter) put(v kube.View) {
	p.latest.Store(&v)
	select {
	case p.poke <- struct{}{}:
	default:
	}
}

// run shows until ctx ends. What fails is tried again with the view of then.
func (p *presenter) run(ctx context.Context) error {
	last := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.poke:
		}
		if err := p.display.Show(ctx, *p.latest.Load()); err == nil {
			last = ""
		} else if ctx.Err() == nil {
			if text := err.Error(); text != last {
				p.log.Warn("not shown, will try again", "error", err)
				last = text
			}
			pause.For(ctx, retryAfter)
			p.put(*p.latest.Load())
		}
		pause.For(ctx, showEvery)
	}
}

// view is what people should see that they do not, of what the roster knows and the rest of
// the summary. It costs a look at each node, and at each pod that is not protected.
func (r *roster) view(now time.Time, summary kube.Summary, nodes []xds.NodeStatus) kube.View {
	v := kube.View{NoMesh: !summary.Facts.Found}
	for _, p := range r.views { // in no order: one that cannot be written keeps no other from its turn
		if len(v.Pods) == maxShown {
			break
		}
		v.Pods = append(v.Pods, p)
	}
	v.Policies = slices.SortedFunc(maps.Values(r.policed), func(x, y kube.PolicyView) int { return strings.Compare(x.Key(), y.Key()) })
	summary.Lost, v.Returned = r.tellLost()
	summary.Pods = r.counts.pods
	summary.Unprotected = first(maps.Values(r.counts.unprotected), kube.MostListed, func(x, y kube.UnprotectedPod) int { return strings.Compare(x.Pod, y.Pod) })
	v.Untaint = r.ready(nodes, &summary.Nodes)
	if status, differs := summary.Status(now); differs && summary.Facts.Found {
		v.Mesh = &status
	}
	return v
}

// first are the n least of all, in order. Most of many are looked at once.
func first[T any](all iter.Seq[T], n int, compare func(x, y T) int) (list []T) {
	settled := false // list has n or more, of which the first n are in order
	settle := func() {
		slices.SortFunc(list, compare)
		settled, list = len(list) >= n, list[:min(len(list), n)]
	}
	for v := range all {
		if settled && compare(v, list[n-1]) >= 0 {
			continue
		}
		if list = append(list, v); len(list) == 2*n {
			settle()
		}
	}
	settle()
	return list
}

// ready counts nodes, and names those that are ready and still tainted.
func (r *roster) ready(nodes []xds.NodeStatus, count *kube.NodeCounts) (untaint []kube.Node) {
	count.Total = int32(len(r.nodes))
	for _, n := range nodes { // by name
		node, is := r.nodes[n.Node]
		if !is || !n.Agent || !n.Proxy {
			continue
		}
		count.Ready++
		if node.Tainted() {
			untaint = append(untaint, node)
		}
	}
	return untaint
}

// condition is what the pod should show; unheard says that its agent is away for long.
func (e *enrollment) condition(now time.Time, unheard bool) kube.Condition {
	age := now.Sub(e.since)
	switch {
	case e.state == Outside, e.state == Releasing && !e.pod.Enroll && e.pod.Shown.Status == "":
		return kube.Condition{}
	case e.state == Withdrawing, e.state == Releasing:
		return kube.Condition{Status: "False", Reason: kube.Leaving, Message: "it is being released: its connections go on in plaintext"}
	case e.word == free && e.reason != "":
		return kube.Condition{Status: "False", Reason: kube.NotCaptured, Message: e.reason}
	case e.state == Announced && e.unkept:
		return kube.Condition{Status: "False", Reason: kube.Enrolling, Message: "it is captured, and not announced: control cannot save what it must remember of it"}
	case e.pod.Contested:
		return kube.Condition{Status: "False", Reason: kube.Contested, Message: "other objects claim its address: connections to it are refused"}
	case e.over():
		return e.pod.Shown
	case e.word == free && e.state == Announced:
		return kube.Condition{Status: "False", Reason: kube.NotCaptured, Message: "its agent does not hold it any more"}
	case unheard:
		return kube.Condition{Status: "Unknown", Reason: kube.AgentAway, Message: fmt.Sprintf("the agent of node %s is not connected", e.pod.Node)}
	case e.state == Announced && e.word == captured && e.reason != "":
		return kube.Condition{Status: "True", Reason: kube.PartlyProtected, Message: e.reason}
	case e.state == Announced && e.word != silent:
		return kube.Condition{Status: "True", Reason: kube.Captured, Message: "captured, and reached by mutual TLS"}
	case e.state == Announced, e.pod.Shown.Status == "" && age < enrollingAfter:
		return e.pod.Shown // its agent has not come to this leader yet, or is about to capture it
	}
	return kube.Condition{Status: "False", Reason: kube.Enrolling, Message: fmt.Sprintf("the agent of node %s has not captured it yet", e.pod.Node)}
}

// over: the pod is being deleted, and its agent has let go of it when its sandbox was
// taken down. Only its object is left.
func (e *enrollment) over() bool { return e.pod.Ending && e.word == free && e.reason == "" }
