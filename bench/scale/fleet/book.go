package fleet

import (
	"math/bits"
	"sync"
	"time"
)

// book has the names and versions of all addresses that a node was ever told, once for all
// nodes: a node keeps of a resource only which of its versions it has. It is safe for concurrent
// use.
type book struct {
	nodes int

	mu    sync.RWMutex // guards what follows
	ids   map[string]int
	pages []page
	marks map[int]*mark

	unpacking sync.Mutex           // guards what follows
	unpacked  map[uint64]*unpacked // by the hash of what was packed
}

// page is a resource. The generation g of it is versions[g-1]; 0 is none.
type page struct {
	name     string
	bucket   int
	versions []version
}

type version struct {
	text string
	hash hash
}

// generations of a resource are told apart.
const generations = 255

// mark is when nodes were told of a resource since Watch.
type mark struct {
	mu    sync.Mutex // guards what follows
	seen  []uint64   // a bit per node
	first int64
	last  int64
}

func newBook(nodes int) *book {
	return &book{nodes: nodes, ids: make(map[string]int), unpacked: make(map[uint64]*unpacked)}
}

// note finds the number of a resource and the generation of a version. It tells what replaces
// what in the digests, if the resource was held as of generation had(id).
func (b *book) note(name, text []byte, had func(id int) uint8) (id int, generation uint8, c change) {
	b.mu.RLock()
	id, ok := b.ids[string(name)]
	if ok {
		if generation = find(b.pages[id].versions, text); generation != 0 {
			c = b.pages[id].change(had(id), generation)
		}
	}
	b.mu.RUnlock()
	if generation != 0 {
		return id, generation, c
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if id, ok = b.ids[string(name)]; !ok {
		id = len(b.pages)
		b.pages = append(b.pages, page{name: string(name), bucket: bucketOf(name, addressBuckets)})
		b.ids[b.pages[id].name] = id
	}
	p := &b.pages[id]
	if generation = find(p.versions, text); generation == 0 {
		if len(p.versions) == generations {
			panic("fleet: a resource with more versions than a simulated node can tell apart")
		}
		p.versions = append(p.versions, version{string(text), parseHash(text)})
		generation = uint8(len(p.versions))
	}
	return id, generation, p.change(had(id), generation)
}

// find looks for the newest first.
func find(versions []version, text []byte) uint8 {
	for i := len(versions) - 1; i >= 0; i-- {
		if versions[i].text == string(text) {
			return uint8(i + 1)
		}
	}
	return 0
}

// change is what one generation in place of another changes in digests.
func (p *page) change(had, has uint8) change {
	c := change{bucket: p.bucket}
	if had != 0 {
		c.had = p.versions[had-1].hash
	}
	if has != 0 {
		c.has = p.versions[has-1].hash
	}
	return c
}

// gone is note for a resource that is no more; id is -1 if nobody was ever told of it.
func (b *book) gone(name []byte, had func(id int) uint8) (id int, c change) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	id, ok := b.ids[string(name)]
	if !ok {
		return -1, change{}
	}
	return id, b.pages[id].change(had(id), 0)
}

// each calls f with the name and bucket of all that held has.
func (b *book) each(held []uint8, f func(name string, bucket int)) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for id, g := range held {
		if g != 0 {
			f(b.pages[id].name, b.pages[id].bucket)
		}
	}
}

// watch forgets who was told when, and begins to take note if on.
func (b *book) watch(on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.marks = nil; on {
		b.marks = make(map[int]*mark)
	}
}

// told takes note that a node acts on these resources as they are now.
func (b *book) told(node int, ids []int) {
	now := time.Now().UnixNano()
	for _, id := range ids {
		if m := b.mark(id); m != nil {
			m.set(node, now)
		}
	}
}

func (b *book) mark(id int) *mark {
	b.mu.RLock()
	m, on := b.marks[id], b.marks != nil
	b.mu.RUnlock()
	if m != nil || !on {
		return m
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.marks == nil {
		return nil
	}
	if m = b.marks[id]; m == nil {
		m = &mark{seen: make([]uint64, (b.nodes+63)/64)}
		b.marks[id] = m
	}
	return m
}

func (m *mark) set(node int, now int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if word, bit := &m.seen[node/64], uint64(1)<<(node%64); *word&bit == 0 {
		*word |= bit
		m.last = now
		if m.first == 0 {
			m.first = now
		}
	}
}

// Seen is how far the word of a resource has come since Watch.
type Seen struct {
	// Nodes is how many have been told.
	Nodes int
	// First and Last are when the first and the last was.
	First, Last int64
	// Missing is the first node that has not been told, if there is one.
	Missing int
}

// Watch begins to take note of which node is told of what; Unwatch ends it.
func (f *Fleet) Watch() { f.book.watch(true) }

// Unwatch forgets it.
func (f *Fleet) Unwatch() { f.book.watch(false) }

// Seen tells it of resources, by name.
func (f *Fleet) Seen(names []string) []Seen {
	all := make([]Seen, len(names))
	for i, name := range names {
		if m := f.book.marked(name); m != nil {
			all[i] = m.get()
		}
	}
	return all
}

func (b *book) marked(name string) *mark {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if id, ok := b.ids[name]; ok {
		return b.marks[id]
	}
	return nil
}

func (m *mark) get() Seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Seen{First: m.first, Last: m.last}
	for i, w := range m.seen {
		s.Nodes += bits.OnesCount64(w)
		if s.Missing == 64*i {
			s.Missing += bits.TrailingZeros64(^w)
		}
	}
	return s
}
