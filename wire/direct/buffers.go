package direct

import (
	"sync"
	"sync/atomic"
)

const (
	// maxPlain is the most bytes that one record carries (RFC 8446 §5.1).
	maxPlain = 16384
	// sealOverhead is the tag of AES-GCM.
	sealOverhead = 16
	// overhead of a record: header, content type, tag.
	overhead = recordHeader + 1 + sealOverhead
	// maxSealed is the most bytes after the header (RFC 8446 §5.2).
	maxSealed = maxPlain + 256

	// fullPlain is how much of a long stream one record carries: four such records,
	// and what is left of them when opened, are each one packet of the kernel's
	// (64 KiB with its headers, whole segments). 16 KiB each would be a full packet
	// and one that is nearly empty.
	fullPlain  = 15 << 10
	fullRecord = fullPlain + overhead
)

// A small buffer holds any one record. Of full ones a large buffer holds four, and
// a huge one sixteen, with room for a KeyUpdate in front.
const (
	smallSize = recordHeader + maxSealed
	largeSize = 4*fullRecord + overhead + 5
	hugeSize  = 16*fullRecord + overhead + 5
)

// maxHuge bounds the huge buffers that are lent at once in a process, to 32 MB:
// they are held while a peer takes nothing, and there may be many such peers.
const maxHuge = 128

type (
	smallBuffer [smallSize]byte
	largeBuffer [largeSize]byte
	hugeBuffer  [hugeSize]byte
)

// The pools hold no state, only memory: any buffer will do for anybody.
var (
	smallBuffers = sync.Pool{New: func() any { return new(smallBuffer) }}
	largeBuffers = sync.Pool{New: func() any { return new(largeBuffer) }}
	hugeBuffers  = sync.Pool{New: func() any { return new(hugeBuffer) }}
	hugeLent     atomic.Int32
)

// lend gives the smallest buffer of at least n bytes, whole. It gives a large one
// if no huge one is to be had, and a huge one if n is more.
func lend(n int) []byte {
	switch {
	case n <= smallSize:
		return smallBuffers.Get().(*smallBuffer)[:]
	case n > largeSize && hugeLent.Add(1) <= maxHuge:
		return hugeBuffers.Get().(*hugeBuffer)[:]
	case n > largeSize:
		hugeLent.Add(-1)
	}
	return largeBuffers.Get().(*largeBuffer)[:]
}

// takeBack takes what lend gave, from its start.
func takeBack(b []byte) {
	switch b = b[:cap(b)]; len(b) {
	case smallSize:
		smallBuffers.Put((*smallBuffer)(b))
	case largeSize:
		largeBuffers.Put((*largeBuffer)(b))
	case hugeSize:
		hugeBuffers.Put((*hugeBuffer)(b))
		hugeLent.Add(-1)
	default:
		panic("direct: a buffer comes back that was not lent")
	}
}
