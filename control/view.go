package control

import (
	"context"
	"fmt"
	"log/slog"
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
	// awayAfter is how long an agent that is not connected to this leader is waited for,
	// before nobody knows about its pods.
	awayAfter = 30 * time.Second
	// enrollingAfter is how long an enrolment may take without a word about it: most
	// are done by then.
	enrollingAfter = 3 * time.Second
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

// view is what people should see that they do not.
func (r *roster) view(o outlook, nodes []xds.NodeStatus, trustDomain string, unsaved error) kube.View {
	v := kube.View{NoMesh: !r.result.Mesh.Found}
	summary := kube.Summary{Facts: r.result.Mesh, TrustDomain: trustDomain, Exceptions: r.result.Exceptions, Unsaved: unsaved}
	for _, p := range r.result.Pods {
		e := r.pods[p.UID]
		want := e.condition(o.now, r.away.long(e.pod.Node, o.now))
		if !want.Same(p.Shown) {
			v.Pods = append(v.Pods, kube.PodView{UID: p.UID, Namespace: p.Namespace, Name: p.Name, Is: p.Shown, Want: want})
		}
		e.count(want, &summary)
	}
	slices.SortFunc(summary.Unprotected, func(x, y kube.UnprotectedPod) int { return strings.Compare(x.Pod, y.Pod) })
	v.Untaint = r.ready(nodes, &summary.Nodes)
	if status, differs := summary.Status(o.now); differs && r.result.Mesh.Found {
		v.Mesh = &status
	}
	return v
}

// ready counts nodes, and names those that are ready and still tainted.
func (r *roster) ready(nodes []xds.NodeStatus, count *kube.NodeCounts) (untaint []kube.Node) {
	connected := make(map[string]bool)
	for _, n := range nodes {
		connected[n.Node] = n.Agent && n.Proxy
	}
	count.Total = int32(len(r.result.Nodes))
	for _, n := range r.result.Nodes {
		if !connected[n.Name] {
			continue
		}
		count.Ready++
		if n.Tainted() {
			untaint = append(untaint, n)
		}
	}
	return untaint
}

// condition is what the pod should show; unheard says that its agent is away for long.
func (e *enrolment) condition(now time.Time, unheard bool) kube.Condition {
	age := now.Sub(e.since)
	switch {
	case e.state == Outside, e.state == Releasing && !e.pod.Enrol && e.pod.Shown.Status == "":
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
func (e *enrolment) over() bool { return e.pod.Ending && e.word == free && e.reason == "" }

// count adds the pod to s.
func (e *enrolment) count(c kube.Condition, s *kube.Summary) {
	switch {
	case e.state == Withdrawing, e.state == Releasing:
		s.Pods.Leaving++
	case e.state == Outside, e.over():
	case c.Status == "True":
		s.Pods.Enrolled++
		s.Pods.Protected++
	default:
		s.Pods.Enrolled++
		s.Pods.Unprotected++
		s.Unprotected = append(s.Unprotected, kube.UnprotectedPod{Pod: e.pod.Namespace + "/" + e.pod.Name, Reason: c.Message})
	}
}

// unheard tells whether what a pod should show changes by time alone.
func (r *roster) unheard(now time.Time) bool {
	for node := range r.away {
		if !r.away.long(node, now) {
			return true
		}
	}
	for _, e := range r.pods {
		if e.state.enrol() && (e.word == silent || e.state == Enrolling) {
			return true
		}
	}
	return false
}
