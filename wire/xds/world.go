package xds

import (
	"context"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// ClientConfig is what WorldClient and PodClient need.
type ClientConfig struct {
	// Conn leads to control; it is not closed by the client. Required.
	Conn *Conn
	// Node is the name of the node that the token proves. Required.
	Node string
	// Log may be nil: silence.
	Log *slog.Logger
	// Registry gets tacit_xds_*; may be nil.
	Registry prometheus.Registerer
	// Backoff bounds the wait between attempts.
	Backoff Backoff
}

// WorldClient keeps a proxy's World. It keeps what it knows while control is
// away, and is told only what differs when control is back.
type WorldClient struct {
	delta *delta[any]
}

// NewWorldClient starts nothing. apply is called by one goroutine, never
// concurrently, with what has changed; the first call is control's first word, also
// if it is of nothing. What comes fast is applied together; what does not fit a message
// comes as Parts, so that it never lies about as a whole. It should not block. When
// the channel that it returned is closed (nil means at once) nothing on the node acts
// on an older World any more, and control is told so, in order; later changes are
// applied meanwhile.
func NewWorldClient(cfg ClientConfig, apply func(mesh.Changes) (settled <-chan struct{})) *WorldClient {
	d := newDelta[any](cfg, addressType)
	var names builder
	d.decode = func(body *anypb.Any) (string, any, error) {
		name, v, err := unpackAddress(body)
		if w, ok := v.(*mesh.Workload); ok && err == nil && !d.synced {
			name = names.keep(name)
			w.UID = name
		}
		return name, v, err
	}
	d.apply = func(changed []any, gone []string) <-chan struct{} { return apply(newChanges(changed, gone)) }
	d.prepare = func(changed []any, gone []string) {
		c := newChanges(changed, gone)
		c.Part = true
		apply(c)
	}
	return &WorldClient{d}
}

// Run keeps the World until ctx is done. It connects again for ever, and returns
// only ctx's error, or one of the configuration. It may be called once.
func (c *WorldClient) Run(ctx context.Context) error { return c.delta.run(ctx) }

// Synced is closed at control's first word, that is after the first call of apply.
func (c *WorldClient) Synced() <-chan struct{} { return c.delta.first }

// unpackAddress opens what stands in the World's table.
func unpackAddress(body *anypb.Any) (string, any, error) {
	if body.GetTypeUrl() == policyType {
		return unpackPolicy(body)
	}
	m := &message.Address{}
	if err := unpack(body, addressType, m); err != nil {
		return "", nil, err
	}
	return decodeAddress(m)
}

func newChanges(changed []any, gone []string) mesh.Changes {
	c := mesh.Changes{}
	for _, name := range gone {
		if key, is := strings.CutPrefix(name, policyPrefix); is {
			c.GonePolicies = append(c.GonePolicies, key)
		} else {
			c.Gone = append(c.Gone, name)
		}
	}
	for _, v := range changed {
		switch v := v.(type) {
		case *mesh.Workload:
			c.Workloads = append(c.Workloads, v)
		case *mesh.Service:
			c.Services = append(c.Services, v)
		case *mesh.Place:
			c.Places = append(c.Places, v)
		case *mesh.Policy:
			c.Policies = append(c.Policies, v)
		}
	}
	return c
}

// builder puts strings that are kept close together. One by one they would lie among all
// that a message is decoded to, and hold its memory.
type builder struct{ strings.Builder }

// chunk is how much of the memory of strings that are given up one of them may hold.
const chunk = 8 << 10

func (b *builder) keep(s string) string {
	if b.Len()+len(s) > b.Cap() {
		b.Reset()
		b.Grow(max(chunk, len(s)))
	}
	from := b.Len()
	b.WriteString(s)
	return b.String()[from:]
}
