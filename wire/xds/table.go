package xds

import (
	"cmp"
	"fmt"
	"slices"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

const (
	// minGone is how many removals a table remembers at least; at most it is half of what
	// there is besides.
	minGone = 64
)

// portion bounds what one look at a table takes: of what is told, and of what is read while
// others wait.
type portion struct{ bytes, slots int }

// entry is one resource as it is published, or that it is gone. It is kept once, however
// many streams send it, and nobody changes it, but for source, which is the publisher's, and
// what the table does when it replaces it.
type entry struct {
	name    string
	version uint64 // of its last change
	hash    hash
	wire    mem.Buffer // as it stands in a response; nil if it is gone, or was replaced
	gone    bool
	// replaced: the table has another one of that name. Guarded by Server.told.
	replaced bool
	source   any // what was encoded; the same pointer needs no second look
}

func newEntry(secret []byte, typeURL, name string, m proto.Message) (*entry, error) {
	if name == "" || len(name) > maxName {
		return nil, fmt.Errorf("name of %d bytes: want 1 to %d", len(name), maxName)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	if typeURL == addressType {
		typeURL = typeOf(name) // the World has policies, too
	}
	h := newHash(secret, name, body)
	return &entry{name: name, hash: h, wire: writeResource(typeURL, name, h, body)}, nil
}

// size is about what e takes in a response.
func (e *entry) size() int {
	if e.wire == nil {
		return len(e.name) + 4
	}
	return e.wire.Len()
}

// table is what is published of one type, ordered by last changes: who has everything up
// to a version is told what follows it. A resource stands in it once, be it that it is
// gone. Only the publisher changes it; guarded by Server.told.
type table struct {
	typeURL string
	entries map[string]*entry
	log     []slot // by version
	least   int    // so many removals are remembered at least
	live    int    // entries that are not gone
	last    uint64 // version of the last change
	// since is from when on all removals are remembered. Who is older has to compare.
	since   uint64
	digests digests
	packs   *packs // nil if it is told to one stream only
}

// slot is where the change of a version stands, without an entry if another one has
// followed. The bucket of its name is here, so that who skips most looks at few entries.
type slot struct {
	version uint64
	bucket  int
	entry   *entry
}

func newTable(typeURL string, since uint64) *table {
	return &table{typeURL: typeURL, entries: make(map[string]*entry), least: minGone, since: since, digests: newDigests(typeURL)}
}

// get returns what is there under the name.
func (t *table) get(name string) *entry {
	if t == nil {
		return nil
	}
	if e := t.entries[name]; e != nil && !e.gone {
		return e
	}
	return nil
}

// put makes e the last change.
func (t *table) put(version uint64, e *entry) {
	bucket := t.digests.bucket(e.name)
	if old := t.entries[e.name]; old != nil {
		t.log[t.after(old.version-1)].entry = nil
		old.replaced, old.wire = true, nil // who sends it has taken the wire
		if !old.gone {
			t.live--
			t.digests[bucket].remove(old.hash)
		}
	}
	if !e.gone {
		t.live++
		t.digests[bucket].add(e.hash)
	}
	e.version, t.last = version, version
	t.entries[e.name] = e
	t.log = append(t.log, slot{version, bucket, e})
	t.compact()
}

// digest is that of everything.
func (t *table) digest() []byte {
	if t == nil {
		return nil
	}
	return t.digests.total()
}

// compact drops empty slots, and the oldest removals if there are too many. It is done
// once in so many changes that each pays for a few slots.
func (t *table) compact() {
	if len(t.log) <= 2*(t.live+t.least) {
		return
	}
	most := t.live/2 + t.least
	kept := make([]slot, 0, t.live+most)
	gone := len(t.entries) - t.live
	for _, s := range t.log {
		switch {
		case s.entry == nil:
		case s.entry.gone && gone > most:
			gone--
			t.since = s.version
			delete(t.entries, s.entry.name)
		default:
			kept = append(kept, s)
		}
	}
	t.log = kept
}

// after is where in the log that begins which who has version lacks.
func (t *table) after(version uint64) int {
	i, _ := slices.BinarySearchFunc(t.log, version+1, func(s slot, v uint64) int { return cmp.Compare(s.version, v) })
	return i
}

// firstAfter is the version of the first change that who has version lacks, 0 if there is none.
func (t *table) firstAfter(version uint64) uint64 {
	for _, s := range t.log[t.after(version):] {
		if s.entry != nil {
			return s.version
		}
	}
	return 0
}

// read collects a portion of what follows position, but for what the client has, and tells how far it has come, and whether that is all.
func (t *table) read(position uint64, p portion, has func(slot) bool) (found []*entry, upTo uint64, all bool) {
	if t == nil {
		return nil, position, true
	}
	size, upTo := 0, position
	for n, s := range t.log[t.after(position):] {
		if size >= p.bytes || n == p.slots {
			return found, upTo, false
		}
		upTo = s.version
		if s.entry != nil && !has(s) {
			found = append(found, s.entry)
			size += s.entry.size()
		}
	}
	return found, upTo, true
}
