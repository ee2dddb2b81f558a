package xds

import (
	"slices"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	protobuf "google.golang.org/protobuf/proto"

	"tacit.dev/wire/xds/message"
)

// response is a DeltaDiscoveryResponse. Its resources are written once, when they are
// published, and lie in memory once, however many nodes are told of them.
type response struct {
	// What there is besides resources.
	*message.DeltaDiscoveryResponse
	told []mem.Buffer
	// pack is told as well, nil if there is none.
	pack *pack
}

// add takes up what is told, and what is gone. Called with told.
func (r *response) add(found []*entry) {
	r.told = make([]mem.Buffer, 0, len(found))
	for _, e := range found {
		if e.gone {
			r.RemovedResources = append(r.RemovedResources, e.name)
		} else {
			r.told = append(r.told, e.wire)
		}
	}
}

// spell makes what is told resources of the message, which may be changed.
func (r *response) spell() error {
	for _, wire := range r.told {
		if err := (protobuf.UnmarshalOptions{Merge: true}).Unmarshal(wire.ReadOnlyData(), r.DeltaDiscoveryResponse); err != nil {
			return err
		}
	}
	r.told = nil
	return nil
}

// count is of how many resources it tells something.
func (r *response) count() int {
	n := len(r.told) + len(r.Resources) + len(r.RemovedResources)
	if r.pack != nil {
		n += len(r.pack.found)
	}
	return n
}

// codec is that of protobuf, which knows a response, too.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal strings together what is written already: nothing of it is copied.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*response)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	parts, err := c.CodecV2.Marshal(r.DeltaDiscoveryResponse)
	if err != nil {
		return nil, err
	}
	all := slices.Concat(parts, r.told)
	if r.pack != nil {
		all = append(all, r.pack.deflated())
	}
	return all, nil
}

// The fields of a DeltaDiscoveryResponse, of a Resource in it, and of an Any in that.
const (
	fieldResources protowire.Number = 2

	fieldVersion  protowire.Number = 1
	fieldResource protowire.Number = 2
	fieldName     protowire.Number = 3

	fieldTypeURL protowire.Number = 1
	fieldValue   protowire.Number = 2
)

// writeResource writes a resource as it stands in a response.
func writeResource(typeURL, name string, h hash, body []byte) mem.Buffer {
	version := h.String()
	anySize := sizeOf(len(typeURL)) + sizeOf(len(body))
	size := sizeOf(len(version)) + sizeOf(anySize) + sizeOf(len(name))
	b := make([]byte, 0, sizeOf(size))
	b = appendHead(b, fieldResources, size)
	b = append(appendHead(b, fieldVersion, len(version)), version...)
	b = appendHead(b, fieldResource, anySize)
	b = append(appendHead(b, fieldTypeURL, len(typeURL)), typeURL...)
	b = append(appendHead(b, fieldValue, len(body)), body...)
	b = append(appendHead(b, fieldName, len(name)), name...)
	return mem.SliceBuffer(b)
}

// sizeOf is what a field of so many bytes takes; the numbers of all are small.
func sizeOf(n int) int { return 1 + protowire.SizeBytes(n) }

// appendHead begins a field of so many bytes.
func appendHead(b []byte, field protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(n))
}
