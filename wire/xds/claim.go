package xds

import (
	"bytes"

	"tacit.dev/wire/xds/message"
)

// claim is what a client says, when its stream begins, that it holds. Ours say it by
// digests of buckets, foreign ones name everything.
type claim struct {
	upTo uint64 // the version that was the last then: of what followed it knows nothing
	// differing are buckets in which something differs, for ours.
	differing buckets
	// most: so much differs that all is told.
	most bool
	// versions are those of a foreign client, by name, that were not compared yet.
	versions map[string]string
}

// begin takes the claim of a client that asks for a type. One that holds a version of
// ours, since when every removal is remembered, needs none.
func (s *Server) begin(sub *subscription, node string, req *message.DeltaDiscoveryRequest) (err error) {
	s.told.RLock()
	defer s.told.RUnlock()
	t := s.tableFor(node, sub.typeURL)
	held := req.GetHeld()
	sub.whole = held != nil && sub.interest == nil
	sub.packs = sub.whole && held.GetPacked()
	switch {
	case sub.interest != nil:
		sub.position = s.version // what it asks for is told apart
	case t == nil || held == nil:
		sub.claim = &claim{upTo: s.version, versions: req.GetInitialResourceVersions()}
	case bytes.Equal(held.GetOrigin(), s.origin) && held.GetVersion() >= max(t.since, 1) && held.GetVersion() <= s.version:
		sub.position = held.GetVersion()
	default:
		sub.claim = &claim{upTo: s.version}
		sub.claim.differing, err = t.digests.compare(held.GetDigests())
		sub.claim.most = 2*sub.claim.differing.count() > len(t.digests)
		if sub.claim.differing.isEmpty() {
			sub.position = s.version // nothing has to be looked for
		}
	}
	return err
}

func (c *claim) isCompared() bool { return c != nil && c.differing != nil }

// holds reports whether the client needs not be told of what stands at a.
func (c *claim) holds(a slot) bool {
	if c == nil {
		return false
	}
	e, recent := a.entry, a.version > c.upTo
	if c.isCompared() {
		// What is not told of a bucket that differs, it takes for gone.
		return !recent && (!c.differing.has(a.bucket) || e.gone)
	}
	had, knows := c.versions[e.name]
	delete(c.versions, e.name)
	if e.gone {
		return !recent && !knows
	}
	return knows && had == e.hash.String()
}

// finish adds to the last response what a foreign client holds and nobody knows, as much as
// fits, and reports whether that was all.
func (c *claim) finish(resp *message.DeltaDiscoveryResponse) bool {
	if c == nil {
		return true
	}
	size := 0
	for name := range c.versions {
		if size >= chunkBytes {
			return false
		}
		delete(c.versions, name)
		resp.RemovedResources = append(resp.RemovedResources, name)
		size += len(name) + 4
	}
	return true
}
