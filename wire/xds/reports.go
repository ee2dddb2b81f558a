package xds

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"tacit.dev/wire/xds/message"
)

// reports is the way back: the latest state of each pod of the node, never more
// than there are pods. A connection sends them all, then what changes.
type reports struct {
	cfg     ClientConfig
	metrics *clientMetrics
	poke    chan struct{} // one slot

	mu     sync.Mutex // guards all below
	last   uint64     // sequence of the last report
	latest map[string]numbered
	open   bool // a connection is there
}

type numbered struct {
	Report
	sequence uint64
}

func newReports(cfg ClientConfig, m *clientMetrics) *reports {
	return &reports{cfg: cfg, metrics: m, poke: make(chan struct{}, 1), latest: map[string]numbered{}}
}

// add replaces what was known of the pod. Without a connection a released pod is
// simply forgotten: the next connection's opening list says it by not naming it.
func (r *reports) add(report Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	r.latest[report.UID] = numbered{report, r.last}
	if !r.open && report.State == Released {
		delete(r.latest, report.UID)
	}
	select {
	case r.poke <- struct{}{}:
	default:
	}
}

func (r *reports) run(ctx context.Context) error {
	if r.cfg.Conn == nil {
		return fmt.Errorf("report to control as node %q: want a connection", r.cfg.Node)
	}
	return keepTrying(ctx, r.cfg, "report stream", r.metrics.failures.Inc, r.session)
}

func (r *reports) session(ctx context.Context, heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, err := message.NewEnrollmentClient(r.cfg.Conn).Report(ctx)
	if err != nil {
		return err
	}
	r.setOpen(true)
	defer r.setOpen(false)
	failed := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { failed <- r.ackLoop(g, heard) })
	defer wg.Wait()
	defer cancel()
	if err := r.sendLoop(ctx, g, failed); err != nil {
		return err
	}
	return <-failed
}

func (r *reports) setOpen(open bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = open
	if !open {
		r.forgetReleased(r.last)
	}
}

// forgetReleased is called with mu.
func (r *reports) forgetReleased(upTo uint64) {
	for uid, n := range r.latest {
		if n.State == Released && n.sequence <= upTo {
			delete(r.latest, uid)
		}
	}
}

// sendLoop sends all, the mark, then changes. It returns nil if the stream cannot
// be sent on any more: ackLoop knows why.
func (r *reports) sendLoop(ctx context.Context, g message.Enrollment_ReportClient, failed chan error) error {
	list, sent := r.since(0)
	for synced := false; ; {
		for _, n := range list {
			if g.Send(encodeReport(n.Report, n.sequence)) != nil {
				return nil
			}
		}
		if !synced {
			synced = true
			if g.Send(&message.PodReport{Sequence: sent, Synced: true}) != nil {
				return nil
			}
		}
		select {
		case <-r.poke:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
		list, sent = r.since(sent)
	}
}

// since lists what was reported after the sequence, in order, and up to where.
func (r *reports) since(sent uint64) ([]numbered, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []numbered
	for _, n := range r.latest {
		if n.sequence > sent {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b numbered) int { return cmp.Compare(a.sequence, b.sequence) })
	return list, r.last
}

func (r *reports) ackLoop(g message.Enrollment_ReportClient, heard func()) error {
	for {
		ack, err := g.Recv()
		if err != nil {
			return err
		}
		heard()
		r.mu.Lock()
		r.forgetReleased(ack.GetSequence())
		r.mu.Unlock()
	}
}
