package xds

import (
	"context"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// PodClient keeps an agent's list of pods, and tells control what became of them.
type PodClient struct {
	delta   *delta[mesh.Pod]
	reports *reports
}

// NewPodClient starts nothing. apply is called by one goroutine, never
// concurrently, with all pods of the node, ordered by UID, whenever one changed.
// The first call is control's first word; it comes also if there are no pods.
// Before it nothing is known, and nothing should be released. The slice is the
// callee's, what the pods point to is not.
func NewPodClient(cfg ClientConfig, apply func([]mesh.Pod)) *PodClient {
	d := newDelta[mesh.Pod](cfg, podType)
	d.decode = unpackPod
	d.apply = inWhole(func(p mesh.Pod) string { return p.UID }, apply)
	return &PodClient{d, newReports(d.cfg, d.metrics)}
}

// Run keeps the list and sends reports until ctx is done. It connects again for
// ever, and returns only ctx's error, or one of the configuration. It may be
// called again when it has returned; what is known then is kept.
func (c *PodClient) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.delta.run(ctx) })
	g.Go(func() error { return c.reports.run(ctx) })
	return g.Wait()
}

// Synced is closed at control's first word, that is after the first call of apply.
func (c *PodClient) Synced() <-chan struct{} { return c.delta.first }

// Report takes note of a pod's state and sends it when it can. It does not
// block and may be called at any time, by anybody. Each connection begins with
// the latest report of every pod, and control takes it that a pod which is not
// among them is not captured: so an agent reports, before Run, what it finds
// captured when it starts. A Released report is forgotten once control has it.
func (c *PodClient) Report(r Report) { c.reports.add(r) }

func unpackPod(body *anypb.Any) (string, mesh.Pod, error) {
	m := &message.Pod{}
	if err := unpack(body, podType, m); err != nil {
		return "", mesh.Pod{}, err
	}
	p, err := decodePod(m)
	return p.UID, p, err
}
