package xds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/wire/xds/message"
)

// maxAnswers bounds the answers that wait for the node to settle. Control sends no
// more than maxUnacked without one; a foreign one that does is not read meanwhile.
const maxAnswers = maxUnacked + maxUnapplied

// together is how long what comes fast is gathered to be applied at once. What comes
// after a pause of so long is applied without a wait.
const together = 20 * time.Millisecond

// delta keeps what control says of one type, over as many connections as it
// takes. All but first belongs to the goroutine of run.
type delta[T any] struct {
	cfg     ClientConfig
	typeURL string
	metrics *clientMetrics
	// decode gives the name that the resource must have come under.
	decode func(*anypb.Any) (name string, v T, err error)
	// apply gets what has changed since it was last called, ordered by name, and the names
	// of what is gone. It owns the slices.
	apply func(changed []T, gone []string) (settled <-chan struct{})
	// prepare gets the same of a part of a publication, of which apply gets the last. nil
	// means that apply gets it all.
	prepare func(changed []T, gone []string)

	unpacker unpacker
	held     *holding
	changed  map[string]*T     // not applied as yet, nil if it is gone
	complete bool              // changed is whole publications
	prepared bool              // prepare has had what is not applied as yet
	waiting  []answer          // those that are due once changed is applied
	last     time.Time         // of the last apply
	rejected map[string]string // name → why
	first    chan struct{}     // closed after the first apply
	synced   bool
	settled  <-chan struct{} // of the last apply
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
		held: newHolding(typeURL), changed: map[string]*T{}, rejected: map[string]string{}, first: make(chan struct{}),
		settled: atOnce,
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
	answers, responses := make(chan answer, maxUnapplied), make(chan *message.DeltaDiscoveryResponse)
	var wg sync.WaitGroup
	wg.Go(func() { answerLoop(ctx, g, d.typeURL, answers) })
	wg.Go(func() { defer cancel(); err = receiveLoop(ctx, g, responses) })
	refused := d.follow(ctx, responses, answers, heard)
	cancel()
	wg.Wait()
	d.metrics.connected.Set(0)
	return cmp.Or(refused, err)
}

// receiveLoop hands on what comes until the stream fails.
func receiveLoop(ctx context.Context, g deltaClientStream, responses chan<- *message.DeltaDiscoveryResponse) error {
	defer close(responses)
	for {
		resp, err := g.Recv()
		if err != nil {
			return err
		}
		select {
		case responses <- resp:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// follow takes responses until there are no more, or one makes no sense. A publication is
// applied whole, and what comes fast together.
func (d *delta[T]) follow(ctx context.Context, responses <-chan *message.DeltaDiscoveryResponse, answers chan<- answer, heard func()) error {
	var due <-chan time.Time
	flush := func() {
		due = nil
		for _, a := range d.applyChanges() {
			select {
			case answers <- a:
			case <-ctx.Done():
			}
		}
	}
	defer flush()
	for {
		select {
		case resp, ok := <-responses:
			if !ok {
				return nil
			}
			heard()
			d.metrics.connected.Set(1)
			isPart := strings.HasSuffix(resp.GetSystemVersionInfo(), more)
			if isPart || len(d.waiting) == maxUnapplied {
				flush() // a part of what follows is not for the same World
			}
			if err := d.take(resp, !isPart); err != nil {
				return err
			}
			switch {
			case isPart:
				flush()
			case due == nil:
				due = time.After(time.Until(d.last.Add(together)))
			}
		case <-due:
			flush()
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
	held := d.held.claim(len(d.rejected) > 0)
	clear(d.rejected) // it comes again if it is still there
	return &message.DeltaDiscoveryRequest{Node: &message.Node{Id: d.cfg.Node}, TypeUrl: d.typeURL, Held: held}
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

// take holds what a response brings, and its answer until that is applied.
func (d *delta[T]) take(resp *message.DeltaDiscoveryResponse, complete bool) error {
	if err := d.unpacker.unpack(resp); err != nil {
		return err
	}
	d.metrics.received.Add(float64(len(resp.GetResources()) + len(resp.GetRemovedResources())))
	d.complete = false
	if err := d.held.begin(resp); err != nil {
		return err
	}
	for _, r := range resp.GetResources() {
		if !d.held.has(r.GetName(), r.GetVersion()) || d.rejected[r.GetName()] != "" {
			d.hold(r)
		}
	}
	for _, name := range resp.GetRemovedResources() {
		d.drop(name)
	}
	d.waiting = append(d.waiting, answer{nonce: resp.GetNonce(), refusal: d.refusal()})
	if !complete {
		return nil
	}
	for name := range d.held.doubted {
		d.drop(name)
	}
	d.complete = true
	return d.held.complete(resp, len(d.rejected) > 0)
}

func (d *delta[T]) drop(name string) {
	if d.held.remove(name) {
		d.changed[name] = nil
	}
	delete(d.rejected, name)
}

// applyChanges applies what has changed, if that is whole, and returns the answers that
// waited for it. Those to parts wait for nothing.
func (d *delta[T]) applyChanges() []answer {
	settled := atOnce
	if !d.complete && d.prepare != nil && len(d.changed) > 0 {
		d.prepare(d.changes())
		d.prepared = true
	}
	if d.complete {
		if len(d.changed) > 0 || d.prepared || !d.synced {
			d.settled = orAtOnce(d.apply(d.changes()))
			d.last, d.prepared = time.Now(), false
		}
		if !d.synced {
			d.synced = true
			close(d.first)
		}
		settled = d.settled
	}
	due := d.waiting
	d.waiting = nil
	for i := range due {
		due[i].settled = settled
	}
	return due
}

// changes gives what has changed, ordered by name, and forgets it.
func (d *delta[T]) changes() (changed []T, gone []string) {
	for _, name := range slices.Sorted(maps.Keys(d.changed)) {
		if v := d.changed[name]; v != nil {
			changed = append(changed, *v)
		} else {
			gone = append(gone, name)
		}
	}
	d.changed = map[string]*T{}
	return changed, gone
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
	d.held.set(name, r.GetVersion())
	d.changed[name] = &v
}

// inWhole makes of what changed everything that there is, ordered by name, for who has little.
func inWhole[T any](name func(T) string, apply func([]T)) func(changed []T, gone []string) <-chan struct{} {
	all := map[string]T{}
	return func(changed []T, gone []string) <-chan struct{} {
		for _, name := range gone {
			delete(all, name)
		}
		for _, v := range changed {
			all[name(v)] = v
		}
		list := make([]T, 0, len(all))
		for _, name := range slices.Sorted(maps.Keys(all)) {
			list = append(list, all[name])
		}
		apply(list)
		return nil
	}
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
