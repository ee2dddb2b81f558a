package xds

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/bits"
	"slices"
)

// hash stands for the name and content of a resource. Control makes it and a node gives it
// back; it is zero if what gave it is foreign.
type hash [16]byte

// newHash depends on a secret, so that nobody outside of control can choose contents whose
// digests cancel each other out.
func newHash(secret []byte, name string, body []byte) (h hash) {
	sum := sha256.New()
	for _, part := range [][]byte{secret, []byte(name), body} {
		sum.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		sum.Write(part)
	}
	copy(h[:], sum.Sum(nil))
	return h
}

func (h hash) String() string { return base64.RawStdEncoding.EncodeToString(h[:]) }

func parseHash(s string) (h hash) {
	if b, err := base64.RawStdEncoding.DecodeString(s); err == nil && len(b) == len(h) {
		copy(h[:], b)
	}
	return h
}

// digest is the sum of hashes, and so the same in whatever order they came and went.
type digest struct{ low, high uint64 }

func (d *digest) add(h hash) {
	d.low += binary.LittleEndian.Uint64(h[:8])
	d.high += binary.LittleEndian.Uint64(h[8:])
}

func (d *digest) remove(h hash) {
	d.low -= binary.LittleEndian.Uint64(h[:8])
	d.high -= binary.LittleEndian.Uint64(h[8:])
}

func (d digest) append(b []byte) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, d.low), d.high)
}

const digestBytes = 16

func parseDigest(b []byte) digest {
	return digest{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

// digests are those of all resources of one type, by bucket. Two that hold the same have
// the same; where two differ, what is in these buckets has to be told.
type digests []digest

// newDigests makes few buckets for what a node has few of.
func newDigests(typeURL string) digests {
	if typeURL == addressType {
		return make(digests, 1024)
	}
	return make(digests, 32)
}

// bucket is where a resource of that name counts.
func (d digests) bucket(name string) int {
	h := fnv.New64a()
	h.Write([]byte(name))
	return int(h.Sum64() % uint64(len(d)))
}

// total is the digest of everything.
func (d digests) total() []byte {
	var sum digest
	for _, one := range d {
		sum.low += one.low
		sum.high += one.high
	}
	return sum.append(nil)
}

func (d digests) marshal() []byte {
	b := make([]byte, 0, len(d)*digestBytes)
	for _, one := range d {
		b = one.append(b)
	}
	return b
}

// compare finds the buckets that differ from another's. Who has nothing differs in all.
func (d digests) compare(theirs []byte) (buckets, error) {
	differ := make(buckets, (len(d)+7)/8)
	if len(theirs) != 0 && len(theirs) != len(d)*digestBytes {
		return nil, fmt.Errorf("digests of %d bytes: want %d", len(theirs), len(d)*digestBytes)
	}
	for i, one := range d {
		if len(theirs) == 0 || one != parseDigest(theirs[i*digestBytes:]) {
			differ[i/8] |= 1 << (i % 8)
		}
	}
	return differ, nil
}

// buckets are some of them, a bit for each.
type buckets []byte

func (b buckets) isEmpty() bool {
	return !slices.ContainsFunc(b, func(eight byte) bool { return eight != 0 })
}

func (b buckets) count() (n int) {
	for _, eight := range b {
		n += bits.OnesCount8(eight)
	}
	return n
}

func (b buckets) has(i int) bool { return b[i/8]&(1<<(i%8)) != 0 }
