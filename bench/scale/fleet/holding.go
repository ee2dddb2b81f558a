package fleet

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
)

// How many buckets there are of each type.
const (
	addressBuckets = 1024
	otherBuckets   = 32
)

// hash stands for a resource as it is; zero is none.
type hash [16]byte

func parseHash(version []byte) (h hash) {
	_, _ = base64.RawStdEncoding.Decode(h[:], version[:min(len(version), 22)]) // a wrong one shows in the digest
	return h
}

func bucketOf(name []byte, buckets int) int {
	h := fnv.New64a()
	h.Write(name)
	return int(h.Sum64() % uint64(buckets))
}

// change is a resource that is replaced, or new, or gone.
type change struct {
	bucket   int
	had, has hash
}

// table keeps what is held of one type.
type table interface {
	put(name, version []byte) change
	drop(name []byte) change
	each(f func(name string, bucket int))
	// unpack takes what is packed.
	unpack(packed []byte, took func(name string, c change)) error
}

// holding is what a stream needs to say what it holds, and to see that it holds what it
// should: what xds.holding is for a real node.
type holding struct {
	table   table
	digests []digest
	origin  []byte
	version uint64
	// doubted are gone unless they are told before the publication is complete.
	doubted         map[string]bool
	begun, compared bool
}

type digest struct{ low, high uint64 }

func newHolding(t table, buckets int) *holding {
	return &holding{table: t, digests: make([]digest, buckets)}
}

func (h *holding) apply(c change) {
	d := &h.digests[c.bucket]
	d.low += binary.LittleEndian.Uint64(c.has[:8]) - binary.LittleEndian.Uint64(c.had[:8])
	d.high += binary.LittleEndian.Uint64(c.has[8:]) - binary.LittleEndian.Uint64(c.had[8:])
}

func (d digest) append(b []byte) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, d.low), d.high)
}

// hello is the first request of a stream.
func (h *holding) hello(node, typeURL string) []byte {
	h.begun, h.compared, h.doubted = false, false, nil
	var held, all []byte
	held = appendNumber(appendBytes(held, 1, h.origin), 2, h.version)
	empty := true
	for _, d := range h.digests {
		all = d.append(all)
		empty = empty && d == digest{}
	}
	if !empty {
		held = appendBytes(held, 3, all)
	}
	held = appendNumber(held, 4, 1)
	return appendBytes(appendString(appendBytes(nil, 1, appendString(nil, 1, node)), 2, typeURL), 15011, held)
}

// begin looks at the first response of a stream, before its resources are taken.
func (h *holding) begin(r response) error {
	if h.begun {
		return nil
	}
	h.begun, h.compared = true, r.compared
	if !r.compared {
		if !bytes.Equal(r.origin, h.origin) {
			return errors.New("control goes on where another one ended")
		}
		return nil
	}
	if len(r.differing) != (len(h.digests)+7)/8 {
		return fmt.Errorf("control compared %d bytes of buckets", len(r.differing))
	}
	h.origin, h.version, h.doubted = nil, 0, make(map[string]bool)
	h.table.each(func(name string, bucket int) {
		if r.differing[bucket/8]&(1<<(bucket%8)) != 0 {
			h.doubted[name] = true
		}
	})
	return nil
}

// take takes a response in.
func (h *holding) take(b []byte) (r response, err error) {
	if r, err = readHead(b); err == nil {
		err = h.begin(r)
	}
	if err != nil {
		return r, err
	}
	err = fields(b, func(field number, v []byte) error {
		switch field {
		case 2:
			one, err := readResource(v)
			if err != nil {
				return err
			}
			h.apply(h.table.put(one.name, one.version))
			if h.doubted != nil {
				delete(h.doubted, string(one.name))
			}
		case 6:
			h.apply(h.table.drop(v))
			delete(h.doubted, string(v))
		}
		return nil
	})
	if err == nil && r.packed != nil {
		err = h.table.unpack(r.packed, func(name string, c change) {
			h.apply(c)
			delete(h.doubted, name)
		})
	}
	if err != nil || r.partial {
		return r, err
	}
	for name := range h.doubted {
		h.apply(h.table.drop([]byte(name)))
	}
	h.doubted = nil
	return r, h.complete(r)
}

// errDiffers is a node that does not hold what control says that there is.
var errDiffers = errors.New("what is held differs from what there is")

func (h *holding) complete(r response) (err error) {
	if h.version, err = strconv.ParseUint(string(r.version), 10, 64); err != nil {
		return fmt.Errorf("version of a publication: %w", err)
	}
	h.origin = bytes.Clone(r.origin)
	var sum digest
	for _, d := range h.digests {
		sum.low += d.low
		sum.high += d.high
	}
	if bytes.Equal(sum.append(nil), r.digest) {
		return nil
	}
	h.origin, h.version = nil, 0
	return errDiffers
}

// few is a table of a few resources, by name.
type few map[string]hash

func (f few) put(name, version []byte) change {
	c := change{bucket: bucketOf(name, otherBuckets), had: f[string(name)], has: parseHash(version)}
	f[string(name)] = c.has
	return c
}

func (f few) drop(name []byte) change {
	c := change{bucket: bucketOf(name, otherBuckets), had: f[string(name)]}
	delete(f, string(name))
	return c
}

// unpack refuses: nothing that one node alone is told is packed.
func (f few) unpack([]byte, func(string, change)) error {
	return errors.New("what is for one node is packed")
}

func (f few) each(do func(name string, bucket int)) {
	for name := range f {
		do(name, bucketOf([]byte(name), otherBuckets))
	}
}
