package xds

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"tacit.dev/wire/xds/message"
)

// holding is what a client has of one type, by hashes: 16 bytes and a name for each.
type holding struct {
	hashes  map[string]hash
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

func newHolding(typeURL string) *holding {
	return &holding{hashes: map[string]hash{}, digests: newDigests(typeURL)}
}

// claim begins a stream. Where something was refused, nothing is said of versions: control
// then tells it again.
func (h *holding) claim(refused bool) *message.Held {
	h.begun, h.compared, h.doubted = false, false, nil
	if refused {
		h.origin, h.version = nil, 0
	}
	held := &message.Held{Origin: h.origin, Version: h.version}
	if len(h.hashes) > 0 {
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
	for name := range h.hashes {
		if len(resp.GetOrigin()) == 0 || differing.has(h.digests.bucket(name)) {
			h.doubted[name] = true
		}
	}
	return nil
}

// has reports whether a resource that is told is held just so.
func (h *holding) has(name, version string) bool {
	delete(h.doubted, name)
	had, is := h.hashes[name]
	return is && had != hash{} && had == parseHash(version)
}

func (h *holding) set(name, version string) {
	h.remove(name)
	h.hashes[name] = parseHash(version)
	h.digests.add(name, h.hashes[name])
}

// remove reports whether it was there.
func (h *holding) remove(name string) bool {
	delete(h.doubted, name)
	had, is := h.hashes[name]
	if is {
		delete(h.hashes, name)
		h.digests.remove(name, had)
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
