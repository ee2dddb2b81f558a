package xds

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// whole is the response as a client reads it.
func (r *response) whole() *message.DeltaDiscoveryResponse {
	if r == nil {
		return nil
	}
	m := &message.DeltaDiscoveryResponse{}
	data, err := newCodec().Marshal(r)
	if err == nil {
		err = proto.Unmarshal(data.Materialize(), m)
	}
	if err != nil {
		panic(err)
	}
	return m
}

// address is what was published.
func (e *entry) address(t *testing.T) *message.Address {
	t.Helper()
	r := &response{DeltaDiscoveryResponse: &message.DeltaDiscoveryResponse{}, told: []mem.Buffer{e.wire}}
	m := &message.Address{}
	if err := r.whole().GetResources()[0].GetResource().UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
	return m
}

// What is strung together is what protobuf would have written.
func TestResponsesAreProtobufs(t *testing.T) {
	r := &response{DeltaDiscoveryResponse: &message.DeltaDiscoveryResponse{TypeUrl: addressType, Nonce: "7", Origin: []byte("me"), SystemVersionInfo: "12+"}}
	want := proto.Clone(r.DeltaDiscoveryResponse).(*message.DeltaDiscoveryResponse)
	var found []*entry
	for i, size := range []int{1, 100, 200, 20_000} {
		w := workload(i, func(w *mesh.Workload) { w.CanonicalRevision = fmt.Sprintf("%0*d", size, i) })
		m, err := encodeWorkload(w)
		if err != nil {
			t.Fatal(err)
		}
		body, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		e, err := newEntry([]byte("secret"), addressType, w.UID, m)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, e)
		want.Resources = append(want.Resources, &message.Resource{Name: w.UID, Version: e.hash.String(), Resource: &anypb.Any{TypeUrl: addressType, Value: body.GetValue()}})
	}
	r.add(append(found, &entry{name: "gone", gone: true}))
	want.RemovedResources = []string{"gone"}
	if got := r.whole(); !proto.Equal(got, want) {
		t.Errorf("%v: want %v", got, want)
	}
}

// A response that is large takes no memory of its own for what it tells: 32 of them wait at once
// for nodes that read slowly, and a thousand when all nodes come back.
func TestResponsesTakeNoMemory(t *testing.T) {
	s := serverWith(10_000)
	var all []mem.BufferSlice
	c := newCodec()
	before := heapNow()
	for i := range 32 {
		resp, err := s.next(connectBare(t, s, fmt.Sprint("n", i), nil))
		if err != nil {
			t.Fatal(err)
		}
		data, err := c.Marshal(resp)
		if err != nil {
			t.Fatal(err)
		}
		if data.Len() < chunkBytes/2 {
			t.Fatalf("a response of %d bytes: want a large one", data.Len())
		}
		all = append(all, data)
	}
	each := (heapNow() - before) / len(all)
	runtime.KeepAlive(s)
	runtime.KeepAlive(all)
	t.Logf("%d bytes for each", each)
	if each > chunkBytes/8 {
		t.Errorf("%d bytes for a response", each)
	}
}
