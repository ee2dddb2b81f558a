package xds

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"tacit.dev/wire/xds/message"
)

// holding is what a client has of one type, by hashes: 16 bytes and a name for each.
type holding struct {
	// shelves are those of the digests' buckets, each ordered by name: a map of 100,000 names
	// takes half as much again.
	shelves [][]labeled
	count   int
	digests digests
	// origin and version are the last publication that it has had whole, none if it has had
	// part of another server's since.
	origin  []byte
	version uint64
	// doubted are those that are gone unless they are told before the publication is
	// complete.
	doubted map[string]bool
	// compared: the beginning of this stream was compared by digests.
	begun, compared bool
}

// labeled is one that is held.
type labeled struct {
	name string
	hash hash
}

func newHolding(typeURL string) *holding {
	d := newDigests(typeURL)
	return &holding{shelves: make([][]labeled, len(d)), digests: d}
}

// find tells in which bucket a name belongs, where in that, and whether it is there.
func (h *holding) find(name string) (bucket, at int, is bool) {
	bucket = h.digests.bucket(name)
	at, is = slices.BinarySearchFunc(h.shelves[bucket], name, func(l labeled, name string) int { return strings.Compare(l.name, name) })
	return bucket, at, is
}

// claim begins a stream. Where something was refused, nothing is said of versions: control
// then tells it again.
func (h *holding) claim(refused bool) *message.Held {
	h.begun, h.compared, h.doubted = false, false, nil
	if refused {
		h.origin, h.version = nil, 0
	}
	held := &message.Held{Origin: h.origin, Version: h.version, Packed: true}
	if h.count > 0 {
		held.Digests = h.digests.marshal()
	}
	return held
}

// begin looks, at the first response of a stream, at what control made of the claim. A
// foreign one made nothing of it and tells everything.
func (h *holding) begin(resp *message.DeltaDiscoveryResponse) error {
	if h.begun {
		return nil
	}
	h.begun = true
	h.compared = resp.GetCompared() != nil || len(resp.GetOrigin()) == 0
	if !h.compared && !bytes.Equal(resp.GetOrigin(), h.origin) {
		return errors.New("control goes on where another one ended")
	}
	if !h.compared {
		return nil
	}
	h.origin, h.version = nil, 0
	differing := buckets(resp.GetCompared().GetDiffering())
	if len(resp.GetOrigin()) > 0 && len(differing) != (len(h.digests)+7)/8 {
		return fmt.Errorf("control compared %d bytes of buckets: want %d", len(differing), (len(h.digests)+7)/8)
	}
	h.doubted = map[string]bool{}
	for bucket, shelf := range h.shelves {
		if len(resp.GetOrigin()) > 0 && !differing.has(bucket) {
			continue
		}
		for _, l := range shelf {
			h.doubted[l.name] = true
		}
	}
	return nil
}

// has reports whether a resource that is told is held just so.
func (h *holding) has(name, version string) bool {
	delete(h.doubted, name)
	bucket, at, is := h.find(name)
	if !is {
		return false
	}
	had := h.shelves[bucket][at].hash
	return had != hash{} && had == parseHash(version)
}

func (h *holding) set(name, version string) {
	h.remove(name)
	bucket, at, _ := h.find(name)
	shelf, one := h.shelves[bucket], labeled{name, parseHash(version)}
	if len(shelf) == cap(shelf) { // a little more, not twice as much
		shelf = append(make([]labeled, 0, len(shelf)+len(shelf)/8+1), shelf...)
	}
	h.shelves[bucket] = slices.Insert(shelf, at, one)
	h.digests[bucket].add(one.hash)
	h.count++
}

// remove reports whether it was there.
func (h *holding) remove(name string) bool {
	delete(h.doubted, name)
	bucket, at, is := h.find(name)
	if is {
		h.digests[bucket].remove(h.shelves[bucket][at].hash)
		h.shelves[bucket] = slices.Delete(h.shelves[bucket], at, at+1)
		h.count--
	}
	return is
}

// complete takes note of a publication that is there as a whole, but for what was refused. If
// it differs from control's, that is said once, and all is compared.
func (h *holding) complete(resp *message.DeltaDiscoveryResponse, refused bool) error {
	version, err := strconv.ParseUint(resp.GetSystemVersionInfo(), 10, 64)
	if err != nil || len(resp.GetOrigin()) == 0 {
		return nil // a foreign one
	}
	h.origin, h.version = resp.GetOrigin(), version
	if refused || bytes.Equal(h.digests.total(), resp.GetDigest()) {
		return nil
	}
	h.origin, h.version = nil, 0
	if h.compared {
		return nil
	}
	return fmt.Errorf("what is known differs from publication %d: comparing all", version)
}
