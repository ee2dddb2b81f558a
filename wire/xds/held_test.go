package xds

import (
	"bytes"
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// heldBy is what a node holds that has been told everything.
func heldBy(s *Server) *holding {
	h := newHolding(addressType)
	for name, e := range s.world.entries {
		if !e.gone {
			h.set(name, e.hash.String())
		}
	}
	return h
}

// FuzzClaim: whatever a client says that it holds, it is told all that it does not hold.
func FuzzClaim(f *testing.F) {
	s := NewServer(ServerConfig{})
	s.Publish(workloads(20))
	s.Publish(workloads(10))
	have := heldBy(s).digests.marshal()
	f.Add([]byte{1}, s.version, have)
	f.Add([]byte{}, s.version-1, []byte{})
	f.Add([]byte{2}, s.version+1, have[:16])
	f.Add(bytes.Repeat([]byte{3}, 16), uint64(0), bytes.Repeat([]byte{7}, len(have)))
	f.Fuzz(func(t *testing.T, origin []byte, version uint64, digests []byte) {
		sub := &subscription{typeURL: addressType}
		held := &message.Held{Origin: origin, Version: version, Digests: digests}
		if s.begin(sub, "n1", &message.DeltaDiscoveryRequest{Held: held}) != nil {
			return
		}
		resp, done, err := s.cut(sub, "n1")
		if err != nil || !done {
			t.Fatalf("done: %v, error: %v", done, err)
		}
		told := map[string]bool{}
		for _, r := range resp.whole().GetResources() {
			told[r.GetName()] = true
		}
		for name, e := range s.world.entries {
			i := s.world.digests.bucket(e.name) * digestBytes
			same := len(digests) > 0 && bytes.Equal(digests[i:i+digestBytes], have[i:i+digestBytes])
			if !e.gone && told[name] == same {
				t.Fatalf("%s is told: %v, though its bucket is the same: %v", name, told[name], same)
			}
		}
	})
}

// FuzzCompared: whatever control says of buckets, nothing that it did not tell stays of one
// that differs; or the stream ends.
func FuzzCompared(f *testing.F) {
	s := NewServer(ServerConfig{})
	s.Publish(workloads(20))
	all, err := s.world.digests.compare(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{1}, []byte(all), "1")
	f.Add([]byte{}, []byte{}, "x")
	f.Add([]byte{1}, []byte{255}, "2+")
	f.Fuzz(func(t *testing.T, origin, differing []byte, version string) {
		d := newDelta[any](ClientConfig{}, addressType)
		d.held = heldBy(s)
		d.hello()
		resp := &message.DeltaDiscoveryResponse{Origin: origin, SystemVersionInfo: version, Compared: &message.Compared{Differing: differing}}
		if d.take(resp, true) != nil {
			return
		}
		for name := range s.world.entries {
			if _, _, is := d.held.find(name); is && (len(origin) == 0 || buckets(differing).has(s.world.digests.bucket(name))) {
				t.Fatalf("%s is held", name)
			}
		}
	})
}

// Digests tell what is there, and not how it came; and nothing to who has no secret.
func TestDigests(t *testing.T) {
	s := NewServer(ServerConfig{})
	s.Publish(workloads(500))
	for i := range 300 {
		s.Update(Update{Changes: mesh.Changes{Workloads: []*mesh.Workload{workload(i, func(w *mesh.Workload) { w.Ready = false })}}})
	}
	s.Publish(workloads(400))
	if !bytes.Equal(heldBy(s).digests.marshal(), s.world.digests.marshal()) {
		t.Error("those of a node that holds the same differ")
	}
	fresh := NewServer(ServerConfig{})
	fresh.Publish(workloads(400))
	if !bytes.Equal(fresh.world.digests.marshal(), s.world.digests.marshal()) {
		t.Error("those of a server that was told at once differ")
	}
	other := NewServer(ServerConfig{Secret: []byte("s")})
	other.Publish(workloads(400))
	differ, err := fresh.world.digests.compare(other.world.digests.marshal())
	if err != nil || !differ.has(fresh.world.digests.bucket(workload(7, nil).UID)) {
		t.Errorf("with a secret they are the same: %v", err)
	}
	if _, err := fresh.world.digests.compare([]byte{1}); err == nil {
		t.Error("one byte of digests is taken")
	}
}
