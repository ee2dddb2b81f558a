package xds

import (
	"bytes"
	"compress/flate"
	"fmt"
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// reader is a bare stream whose client takes what is packed.
type reader struct {
	*stream
	holds map[string]string // versions by name
	packs []*pack
	bytes int
}

func newReader(t *testing.T, s *Server, node string) *reader {
	t.Helper()
	return &reader{stream: connectBare(t, s, node, &message.Held{Packed: true}), holds: map[string]string{}}
}

// read takes one response, and tells whether there was one.
func (r *reader) read(t *testing.T, s *Server) bool {
	t.Helper()
	resp, err := s.next(r.stream)
	if err != nil {
		t.Fatal(err)
	}
	if resp == nil {
		return false
	}
	data, err := newCodec().Marshal(resp)
	if err != nil {
		t.Fatal(err)
	}
	r.bytes += data.Len()
	r.packs = append(r.packs, resp.pack)
	m := resp.whole()
	if err := new(unpacker).unpack(m); err != nil {
		t.Fatal(err)
	}
	for _, one := range m.GetResources() {
		r.holds[one.GetName()] = one.GetVersion()
	}
	for _, name := range m.GetRemovedResources() {
		delete(r.holds, name)
	}
	if err := s.take(r.stream, &message.DeltaDiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResponseNonce: m.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	return true
}

// readAll takes everything, which has to be what there is.
func (r *reader) readAll(t *testing.T, s *Server) {
	t.Helper()
	for r.read(t, s) {
	}
	if len(r.holds) != s.world.live {
		t.Errorf("it holds %d resources: want %d", len(r.holds), s.world.live)
	}
	for name, version := range r.holds {
		if e := s.world.get(name); e == nil || e.hash.String() != version {
			t.Errorf("it holds another %s than there is: %v", name, e)
		}
	}
}

// What is told to all is written and deflated once, and is a small part of what it was.
func TestPacksAreShared(t *testing.T) {
	s := serverWith(5000)
	plain := 0
	for _, e := range s.world.entries {
		plain += e.size()
	}
	a, b := newReader(t, s, "a"), newReader(t, s, "b")
	a.readAll(t, s)
	b.readAll(t, s)
	t.Logf("%d bytes instead of %d, in %d responses", a.bytes, plain, len(a.packs))
	if 3*a.bytes > plain {
		t.Errorf("%d bytes instead of %d", a.bytes, plain)
	}
	u := Update{}
	for i := range 100 {
		u.Workloads = append(u.Workloads, workload(i, func(w *mesh.Workload) { w.CanonicalRevision = "next" }))
	}
	s.Update(u)
	a.readAll(t, s)
	b.readAll(t, s)
	for i, p := range a.packs {
		if p == nil || p != b.packs[i] {
			t.Errorf("response %d is not shared", i)
		}
	}
}

// A part in which little has changed is told as it was, and what has changed follows. One with
// a resource that is gone is not, even if nobody remembers that it is gone.
func TestPacksWhileTheWorldChanges(t *testing.T) {
	s := serverWith(1000)
	s.portion.bytes, s.world.least = 64<<10, 0
	first := newReader(t, s, "first")
	first.readAll(t, s)
	s.Update(one(7))
	second := newReader(t, s, "second")
	second.readAll(t, s)
	if second.packs[0] != first.packs[0] {
		t.Error("one change, and another part is told")
	}
	// Another change of it, so that the part knows neither what is gone now nor what was before.
	s.Update(one(1007))
	s.Update(Update{Changes: mesh.Changes{Gone: []string{workload(7, nil).UID}}})
	for i := range 5000 { // the removal is no longer remembered
		name := fmt.Sprint("short-lived", i)
		w := workload(1_000_000+i, func(w *mesh.Workload) { w.UID = name })
		s.Update(Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{w}}})
		s.Update(Update{Changes: mesh.Changes{Gone: []string{name}}})
	}
	if _, is := s.world.entries[workload(7, nil).UID]; is {
		t.Fatal("the removal is remembered as yet")
	}
	newReader(t, s, "third").readAll(t, s)
}

// Those of no use are dropped: what is kept does not grow with how much has changed.
func TestPacksDoNotPileUp(t *testing.T) {
	s := serverWith(1000)
	s.world.packs.least = 0
	r := newReader(t, s, "a")
	for i := range 2000 {
		s.Update(one(i))
		r.readAll(t, s)
	}
	if n := len(s.world.packs.parts); n > 100 {
		t.Errorf("%d parts are kept", n)
	}
}

// A response that unpacks to more than a message may have is refused.
func TestUnpackIsBounded(t *testing.T) {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	for range maxUnpacked>>20 + 1 {
		w.Write(make([]byte, 1<<20))
	}
	w.Close()
	for _, packed := range [][]byte{b.Bytes(), []byte("\xff\xff\xff")} {
		if err := new(unpacker).unpack(&message.DeltaDiscoveryResponse{Packed: packed}); err == nil {
			t.Errorf("%d bytes are taken", len(packed))
		}
	}
}
