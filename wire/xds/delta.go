package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/wire/xds/message"
)

// maxAnswers bounds the answers that wait for the node to settle. Control sends no
// more than maxUnacked without one; a foreign one that does is not read meanwhile.
const maxAnswers = maxUnacked + maxUnapplied

// delta keeps what control says of one type, over as many connections as it
// takes. All but first belongs to the goroutine of run.
type delta[T any] struct {
	cfg     ClientConfig
	typeURL string
	metrics *clientMetrics
	// decode gives the name that the resource must have come under.
	decode func(*anypb.Any) (name string, v T, err error)
	// apply gets the values, ordered by name, and owns the slice.
	apply func([]T) (settled <-chan struct{})

	held     map[string]held[T]
	rejected map[string]string // name → why
	dirty    bool              // held differs from what was applied
	first    chan struct{}     // closed after the first apply
	synced   bool
	settled  <-chan struct{} // of the last apply
}

type held[T any] struct {
	version string
	value   T
}

// answer is an ack, or a nack if refusal is not empty, that is due when settled is
// closed.
type answer struct {
	nonce   string
	refusal string
	settled <-chan struct{}
}

// isSettled reports whether nothing holds the answer up by itself.
func (a answer) isSettled() bool {
	select {
	case <-a.settled:
		return true
	default:
		return false
	}
}

func orAtOnce(settled <-chan struct{}) <-chan struct{} {
	if settled == nil {
		return atOnce
	}
	return settled
}

// atOnce is the settled of answers that wait for nothing.
var atOnce = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func newDelta[T any](cfg ClientConfig, typeURL string) *delta[T] {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &delta[T]{
		cfg: cfg, typeURL: typeURL, metrics: newClientMetrics(cfg.Registry),
		held: map[string]held[T]{}, rejected: map[string]string{}, first: make(chan struct{}),
	}
}

// run connects until ctx is done.
func (d *delta[T]) run(ctx context.Context) error {
	if d.cfg.Conn == nil || d.cfg.Node == "" {
		return fmt.Errorf("follow control as node %q: want a node and a connection", d.cfg.Node)
	}
	return keepTrying(ctx, d.cfg, "control", d.metrics.failures.Inc, d.session)
}

// keepTrying runs session again and again. heard resets the backoff. A failure is
// logged when it begins or changes, not at each attempt.
func keepTrying(ctx context.Context, cfg ClientConfig, what string, failed func(), session func(ctx context.Context, heard func()) error) error {
	failures, last, up := 0, "", false
	heard := func() {
		if !up {
			cfg.Log.Info(what+" connected", "node", cfg.Node)
		}
		failures, last, up = 0, "", true
	}
	for {
		up = false
		err := session(ctx, heard)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		failures++
		failed()
		if text := fmt.Sprint(err); text != last {
			cfg.Log.Warn(what+" lost, keeping what is known", "node", cfg.Node, "error", err)
			last = text
		}
		if !cfg.Backoff.wait(ctx, failures) {
			return ctx.Err()
		}
	}
}

// session is one stream: say what is held, then take what differs.
func (d *delta[T]) session(ctx context.Context, heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	g, err := message.NewAggregatedDiscoveryServiceClient(d.cfg.Conn).DeltaAggregatedResources(ctx)
	if err != nil {
		cancel()
		return err
	}
	if err := g.Send(d.hello()); err != nil {
		cancel()
		return errors.Join(err, ended(g))
	}
	answers := make(chan answer, maxUnapplied)
	var wg sync.WaitGroup
	wg.Go(func() { answerLoop(ctx, g, d.typeURL, answers) })
	defer wg.Wait()
	defer cancel()
	defer d.metrics.connected.Set(0)
	for {
		resp, err := g.Recv()
		if err != nil {
			return err
		}
		heard()
		d.metrics.connected.Set(1)
		select {
		case answers <- d.take(resp):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

type deltaClientStream = message.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// ended is why a stream cannot be sent on any more; only Recv knows.
func ended(g deltaClientStream) error {
	_, err := g.Recv()
	return err
}

func (d *delta[T]) hello() *message.DeltaDiscoveryRequest {
	clear(d.rejected) // it is no version of held, and so comes again if it is still there
	versions := make(map[string]string, len(d.held))
	for name, h := range d.held {
		versions[name] = h.version
	}
	return &message.DeltaDiscoveryRequest{
		Node: &message.Node{Id: d.cfg.Node}, TypeUrl: d.typeURL, InitialResourceVersions: versions,
	}
}

// answerLoop sends the answers in order, each when the node has settled, and of those
// that have to wait for it, at once, that they decide by now. Recv tells if the stream
// fails.
func answerLoop(ctx context.Context, g deltaClientStream, typeURL string, answers <-chan answer) {
	var waiting []answer
	for {
		var settled <-chan struct{}
		more := answers
		if len(waiting) > 0 {
			settled = waiting[0].settled
		}
		if len(waiting) == maxAnswers {
			more = nil
		}
		var req *message.DeltaDiscoveryRequest
		select {
		case a := <-more:
			waiting = append(waiting, a)
			if a.refusal != "" || a.isSettled() {
				continue
			}
			req = &message.DeltaDiscoveryRequest{TypeUrl: typeURL, AppliedNonce: a.nonce}
		case <-settled:
			req = &message.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: waiting[0].nonce}
			if r := waiting[0].refusal; r != "" {
				req.ErrorDetail = &message.Status{Code: int32(codes.InvalidArgument), Message: r}
			}
			waiting = waiting[1:]
		case <-ctx.Done():
			return
		}
		if g.Send(req) != nil {
			return
		}
	}
}

// take holds what a response brings, and applies it if its publication is complete.
func (d *delta[T]) take(resp *message.DeltaDiscoveryResponse) answer {
	d.metrics.received.Add(float64(len(resp.GetResources()) + len(resp.GetRemovedResources())))
	for _, r := range resp.GetResources() {
		d.hold(r)
	}
	for _, name := range resp.GetRemovedResources() {
		if _, ok := d.held[name]; ok {
			delete(d.held, name)
			d.dirty = true
		}
		delete(d.rejected, name)
	}
	if strings.HasSuffix(resp.GetSystemVersionInfo(), more) {
		return answer{resp.GetNonce(), d.refusal(), atOnce}
	}
	if d.dirty || !d.synced {
		d.settled = d.apply(d.values())
		d.dirty = false
	}
	if !d.synced {
		d.synced = true
		close(d.first)
	}
	return answer{resp.GetNonce(), d.refusal(), orAtOnce(d.settled)}
}

// hold takes a resource, or refuses it and keeps the last good one.
func (d *delta[T]) hold(r *message.Resource) {
	name, v, err := d.decode(r.GetResource())
	if err == nil && name != r.GetName() {
		err = fmt.Errorf("it is named %q within", name)
	}
	if err != nil {
		d.metrics.rejected.Inc()
		d.rejected[r.GetName()] = err.Error()
		d.cfg.Log.Error("resource refused, last good one kept", "node", d.cfg.Node, "type", d.typeURL, "resource", r.GetName(), "error", err)
		return
	}
	delete(d.rejected, name)
	d.held[name] = held[T]{r.GetVersion(), v}
	d.dirty = true
}

func (d *delta[T]) values() []T {
	out := make([]T, 0, len(d.held))
	for _, name := range slices.Sorted(maps.Keys(d.held)) {
		out = append(out, d.held[name].value)
	}
	return out
}

// refusal names what is refused as yet, in at most about 2 kB, or "". It is said
// with every answer until it is repaired, for control must not think that the node
// has settled.
func (d *delta[T]) refusal() string {
	var b strings.Builder
	for i, name := range slices.Sorted(maps.Keys(d.rejected)) {
		if b.Len() > 1536 {
			fmt.Fprintf(&b, "; and %d more", len(d.rejected)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%.256s: %.256s", name, d.rejected[name])
	}
	return b.String()
}

// unpack opens an Any of the type that was asked for, and of no other.
func unpack(body *anypb.Any, typeURL string, m proto.Message) error {
	if body.GetTypeUrl() != typeURL {
		return fmt.Errorf("type %q: want %q", body.GetTypeUrl(), typeURL)
	}
	return proto.Unmarshal(body.GetValue(), m)
}
