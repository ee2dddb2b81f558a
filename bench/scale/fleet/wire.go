package fleet

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"tacit.dev/wire/xds"
)

// What the nodes speak is that of wire/xds/message, read and written field by field: of a
// resource a simulated node needs the name and the version.
const (
	deltas  = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	reports = "/tacit.node.v1.Enrollment/Report"

	addressType   = "type.googleapis.com/istio.workload.Address"
	podType       = "type.googleapis.com/tacit.node.v1.Pod"
	namespaceType = "type.googleapis.com/tacit.node.v1.Namespace"
)

// receiver takes a message; what it is given is not its own.
type receiver func([]byte) error

// raw passes bytes through: a message that is sent is a []byte, one that is received goes
// to a receiver.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	return v.(receiver)(b.ReadOnlyData())
}

// open opens a stream of both directions.
func open(ctx context.Context, conn *xds.Conn, method string) (grpc.ClientStream, error) {
	return conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(raw{}))
}

func appendString(b []byte, field number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

func appendBytes(b []byte, field number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), v)
}

func appendNumber(b []byte, field number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

func ack(typeURL string, nonce []byte) []byte {
	return appendBytes(appendString(nil, 2, typeURL), 6, nonce)
}

// report is a PodReport of a pod that is captured, or let go of.
func report(sequence uint64, p *pod, uid string, captured bool) []byte {
	b := appendString(appendNumber(nil, 1, sequence), 3, uid)
	if !captured {
		return appendNumber(b, 6, 2)
	}
	b = appendNumber(b, 6, 1)
	for _, a := range p.addresses {
		b = appendBytes(b, 8, a.AsSlice())
	}
	return b
}

func synced(sequence uint64) []byte { return appendNumber(appendNumber(nil, 1, sequence), 2, 1) }

// number is that of a field.
type number = protowire.Number

// response is a DeltaDiscoveryResponse without its resources; its slices are those of the message.
type response struct {
	version, nonce, origin, digest []byte
	packed                         []byte
	partial                        bool // others of its publication follow
	compared                       bool // the claim of the stream was compared
	differing                      []byte
}

// resource is one of it.
type resource struct{ name, version, body []byte }

// fields calls f with each field of a message that is bytes.
func fields(b []byte, f func(field number, v []byte) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("read a message: %w", protowire.ParseError(n))
		}
		b = b[n:]
		if kind == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return fmt.Errorf("read a message: %w", protowire.ParseError(n))
			}
			if err := f(field, v); err != nil {
				return err
			}
			b = b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(field, kind, b); n < 0 {
			return fmt.Errorf("read a message: %w", protowire.ParseError(n))
		}
		b = b[n:]
	}
	return nil
}

// readHead reads a response but for its resources.
func readHead(b []byte) (r response, err error) {
	err = fields(b, func(field number, v []byte) error {
		switch field {
		case 1:
			r.version = v
			r.partial = len(v) > 0 && v[len(v)-1] == '+'
		case 5:
			r.nonce = v
		case 15010:
			r.origin = v
		case 15011:
			r.compared = true
			return fields(v, func(_ number, v []byte) error { r.differing = v; return nil })
		case 15012:
			r.digest = v
		case 15013:
			r.packed = v
		}
		return nil
	})
	return r, err
}

func readResource(b []byte) (r resource, err error) {
	err = fields(b, func(field number, v []byte) error {
		switch field {
		case 1:
			r.version = v
		case 2:
			return fields(v, func(field number, v []byte) error {
				if field == 2 {
					r.body = v
				}
				return nil
			})
		case 3:
			r.name = v
		}
		return nil
	})
	return r, err
}

// told is a tacit.node.v1.Pod.
type told struct {
	namespace, name, identity string
	enroll, known             bool
}

func readPod(b []byte) (t told, err error) {
	err = fields(b, func(field number, v []byte) error {
		switch field {
		case 2:
			t.namespace = string(v)
		case 3:
			t.name = string(v)
		case 4:
			t.identity = string(v)
		case 9:
			t.known = true
		}
		return nil
	})
	t.enroll = err == nil && flag(b, 5)
	return t, err
}

// flag is a bool of a message that was read already.
func flag(b []byte, field number) bool {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if number == field && kind == protowire.VarintType {
			v, _ := protowire.ConsumeVarint(b[n:])
			return v != 0
		}
		b = b[n+protowire.ConsumeFieldValue(number, kind, b[n:]):]
	}
	return false
}
