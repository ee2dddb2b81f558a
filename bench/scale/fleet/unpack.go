package fleet

import (
	"bytes"
	"compress/flate"
	"fmt"
	"hash/maphash"
	"io"
	"sync"
)

// maxUnpacked bounds what is kept unpacked: nodes are told the same at about the same time.
const maxUnpacked = 1024

// unpacked is what a packed response tells. It is read once for all nodes, which else would take
// more time than control, and more than the real nodes of a cluster have between them.
type unpacked struct {
	once sync.Once
	told []item
	err  error
}

// item is a resource by its number, and its generation, 0 if it is gone.
type item struct {
	id         int
	generation uint8
}

var seed = maphash.MakeSeed()

// unpack calls take with each resource that is told, and with what that changes for who has
// the generation had(id). had and take are called with mu.
func (b *book) unpack(packed []byte, had func(id int) uint8, take func(name string, id int, generation uint8, c change)) error {
	u := b.find(maphash.Bytes(seed, packed))
	u.once.Do(func() { u.told, u.err = b.read(packed) })
	if u.err != nil {
		return u.err
	}
	b.mu.RLock()
	defer b.mu.RUnlock()
	for _, t := range u.told {
		p := &b.pages[t.id]
		take(p.name, t.id, t.generation, p.change(had(t.id), t.generation))
	}
	return nil
}

func (b *book) find(key uint64) *unpacked {
	b.unpacking.Lock()
	defer b.unpacking.Unlock()
	u := b.unpacked[key]
	if u == nil {
		if len(b.unpacked) >= maxUnpacked {
			clear(b.unpacked)
		}
		u = &unpacked{}
		b.unpacked[key] = u
	}
	return u
}

func (b *book) read(packed []byte) (list []item, err error) {
	text, err := io.ReadAll(flate.NewReader(bytes.NewReader(packed)))
	if err != nil {
		return nil, fmt.Errorf("unpack a response: %w", err)
	}
	none := func(int) uint8 { return 0 }
	err = fields(text, func(field number, v []byte) error {
		switch field {
		case 2:
			one, err := readResource(v)
			if err != nil {
				return err
			}
			id, generation, _ := b.note(one.name, one.version, none)
			list = append(list, item{id, generation})
		case 6:
			if id, _ := b.gone(v, none); id >= 0 {
				list = append(list, item{id: id})
			}
		}
		return nil
	})
	return list, err
}
