package xds

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tacit.dev/wire/xds/message"
)

const (
	// packFrom is from how many bytes on it is worth while to pack.
	packFrom = 2 << 10
	// maxPacks bounds those that are kept.
	maxPacks = 4096
	// maxUnpacked bounds what a client unpacks of one response, like a message itself.
	maxUnpacked = 16 << 20
)

// packs are parts of the World's log that were written and deflated once, for all streams that
// are told of them: a thousand nodes that are told the same cost little more than one. A part
// begins where an earlier one ended, and so whoever comes next finds it made.
type packs struct {
	least int // bytes from which on one is made

	mu    sync.Mutex       // guards what follows
	parts map[uint64]*pack // by the first version that they tell
	most  int              // so many, and those that are of no use any more are dropped
}

// pack is one part.
//
// While it is in use resources of it change. Then it tells what they were, and the log tells
// later what they are: a publication decides when its last response is there. A resource that is
// gone ends its use, for the log may forget that.
type pack struct {
	found      []*entry
	wires      []mem.Buffer // of what is found, until wire is made
	size       int          // of what it tells, before it is deflated
	upTo, last uint64       // versions: of the last that it tells, and of the table when it was made
	all        bool         // it tells all that there was then

	once   sync.Once // makes wire
	wire   mem.Buffer
	looked uint64 // the version of the table when it was seen to be of use; guarded by packs.mu
}

func newPacks() *packs { return &packs{least: packFrom, parts: make(map[uint64]*pack)} }

// pack gives what follows a position, or nil if nothing does that is worth while to pack. Called
// with Server.told: nobody changes t.
func (t *table) pack(position uint64, size portion) *pack {
	if t == nil || t.packs == nil {
		return nil
	}
	p, from := t.packs, t.firstAfter(position)
	if from == 0 {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if k := p.parts[from]; k != nil && k.isGood(t) {
		return k
	}
	k := &pack{last: t.last, looked: t.last}
	k.found, k.upTo, k.all = t.read(from-1, size, func(slot) bool { return false })
	k.wires = make([]mem.Buffer, len(k.found))
	for i, e := range k.found {
		k.size += e.size()
		k.wires[i] = e.wire
	}
	if k.size < p.least {
		return nil
	}
	p.keep(t, from, k)
	return k
}

// keep drops those that are of no use, once in so many that each pays for a few.
func (p *packs) keep(t *table, from uint64, k *pack) {
	if len(p.parts) >= p.most {
		for at, old := range p.parts {
			if !old.isGood(t) {
				delete(p.parts, at)
			}
		}
		if len(p.parts) >= maxPacks {
			clear(p.parts)
		}
		p.most = min(2*len(p.parts)+16, maxPacks)
	}
	p.parts[from] = k
}

// isGood tells whether k may be told as it is: it is a whole portion, or all there is, and not
// much of it has changed.
func (k *pack) isGood(t *table) bool {
	switch {
	case k.all && k.last != t.last:
		return false // more can be told at once
	case k.looked == t.last:
		return true
	}
	changed := 0
	for _, e := range k.found {
		if e.gone || !e.replaced {
			continue
		}
		if changed++; t.get(e.name) == nil {
			return false
		}
	}
	if 4*changed > len(k.found) {
		return false
	}
	k.looked = t.last
	return true
}

// deflated is what k tells, as the field of a response; written by whoever needs it first.
func (k *pack) deflated() mem.Buffer {
	k.once.Do(func() {
		var b bytes.Buffer
		deflater.Lock()
		defer deflater.Unlock()
		w := deflater.Writer
		w.Reset(&b)
		for i, e := range k.found { // writing to memory does not fail
			if e.gone {
				w.Write(append(appendHead(nil, fieldRemoved, len(e.name)), e.name...))
			} else {
				w.Write(k.wires[i].ReadOnlyData())
			}
		}
		w.Close()
		k.wires = nil
		wire := appendHead(make([]byte, 0, b.Len()+8), fieldPacked, b.Len())
		k.wire = mem.SliceBuffer(append(wire, b.Bytes()...))
	})
	return k.wire
}

// deflater is one for all, since it takes 1.2 MB. A part takes it some milliseconds.
var deflater = newDeflater()

type locked struct {
	sync.Mutex
	*flate.Writer
}

func newDeflater() *locked {
	w, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil {
		panic(err) // the level is one
	}
	return &locked{Writer: w}
}

// unpacker reads what is packed. It keeps its memory from one response to the next.
type unpacker struct {
	from io.ReadCloser // a flate reader
	text bytes.Buffer
}

// unpack puts what is packed in a response beside the rest of it.
func (u *unpacker) unpack(resp *message.DeltaDiscoveryResponse) error {
	if len(resp.GetPacked()) == 0 {
		return nil
	}
	packed := bytes.NewReader(resp.GetPacked())
	resp.Packed = nil
	if u.from == nil {
		u.from = flate.NewReader(packed)
	} else if err := u.from.(flate.Resetter).Reset(packed, nil); err != nil {
		return fmt.Errorf("unpack a response: %w", err)
	}
	if u.text.Reset(); u.text.Cap() > 4*chunkBytes {
		u.text = bytes.Buffer{}
	}
	n, err := u.text.ReadFrom(io.LimitReader(u.from, maxUnpacked+1))
	if err != nil {
		return fmt.Errorf("unpack a response: %w", err)
	}
	if n > maxUnpacked {
		return fmt.Errorf("unpack a response: more than %d bytes", maxUnpacked)
	}
	return proto.UnmarshalOptions{Merge: true}.Unmarshal(u.text.Bytes(), resp)
}

// The fields of a DeltaDiscoveryResponse for what is gone, and for what is packed.
const (
	fieldRemoved protowire.Number = 6
	fieldPacked  protowire.Number = 15013
)
