package xds

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// entry is one resource as it is published; immutable.
type entry struct {
	name    string
	version string // a hash of body
	body    []byte // what stands in the Any
	source  any    // what was encoded; the same pointer needs no second look
}

func newEntry(name string, source any, m proto.Message) (*entry, error) {
	if name == "" || len(name) > maxName {
		return nil, fmt.Errorf("name of %d bytes: want 1 to %d", len(name), maxName)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	return &entry{name, base64.RawStdEncoding.EncodeToString(sum[:16]), body, source}, nil
}

// table is what is published of one type. It remembers which names changed of
// late, so that a delta costs what changed and not what there is. Guarded by
// Server.mu; nil is an empty table.
type table struct {
	entries map[string]*entry
	changes []change
	// since is the publication from which on changes is complete.
	since uint64
}

type change struct {
	version uint64
	name    string
}

// replace takes over next, and reports whether anything differs.
func (t *table) replace(version uint64, next map[string]*entry) bool {
	before := len(t.changes)
	for name, e := range next {
		if had := t.entries[name]; had == nil || had.version != e.version {
			t.changes = append(t.changes, change{version, name})
		}
	}
	for name := range t.entries {
		if next[name] == nil {
			t.changes = append(t.changes, change{version, name})
		}
	}
	t.entries = next
	changed := len(t.changes) > before
	t.forget()
	return changed
}

// forget bounds the memory of changes; who is further behind compares everything.
func (t *table) forget() {
	most := 1024 + 2*len(t.entries)
	if len(t.changes) <= most {
		return
	}
	cut := len(t.changes) - most/2
	t.since = t.changes[cut-1].version
	t.changes = slices.Clone(t.changes[cut:])
}

func (t *table) all() map[string]*entry {
	if t == nil {
		return nil
	}
	return t.entries
}

// candidates names what may differ for a client that has everything up to
// version at and, beyond that, what sent says. Sorted.
func (t *table) candidates(at uint64, sent map[string]string) []string {
	names := map[string]bool{}
	if t == nil || at < t.since || at == 0 {
		for name := range sent {
			names[name] = true
		}
		for name := range t.all() {
			names[name] = true
		}
		return slices.Sorted(maps.Keys(names))
	}
	first, _ := slices.BinarySearchFunc(t.changes, at+1, func(c change, v uint64) int {
		return int(int64(c.version) - int64(v))
	})
	for _, c := range t.changes[first:] {
		names[c.name] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// resource is one thing to publish. A source that is the same pointer as before is
// not encoded again; nil always is.
type resource struct {
	name   string
	source any
	encode func() (proto.Message, error)
}

// encodeAll makes the entries of a publication. What cannot be encoded is left as
// had has it, and told to bad.
func encodeAll(resources []resource, had map[string]*entry, bad func(name string, err error)) map[string]*entry {
	next := make(map[string]*entry, len(resources))
	for _, r := range resources {
		if next[r.name] != nil {
			bad(r.name, errors.New("the name is there twice"))
			continue
		}
		old := had[r.name]
		e, err := r.entry(old)
		if err != nil {
			bad(r.name, err)
			e = old
		}
		if e != nil {
			next[r.name] = e
		}
	}
	return next
}

func (r resource) entry(old *entry) (*entry, error) {
	if old != nil && r.source != nil && old.source == r.source {
		return old, nil
	}
	m, err := r.encode()
	if err != nil {
		return nil, err
	}
	return newEntry(r.name, r.source, m)
}

func worldResources(snap Snapshot) []resource {
	out := make([]resource, 0, len(snap.Workloads)+len(snap.Services)+len(snap.Places))
	for _, w := range snap.Workloads {
		out = append(out, resource{w.UID, w, func() (proto.Message, error) { return acceptable(encodeWorkload(w)) }})
	}
	for _, s := range snap.Services {
		out = append(out, resource{s.Key(), s, func() (proto.Message, error) { return acceptable(encodeService(s)) }})
	}
	for _, p := range snap.Places {
		out = append(out, resource{p.Name, p, func() (proto.Message, error) { return acceptable(encodePlace(p)) }})
	}
	return out
}

// acceptable refuses to publish what a node would refuse to take.
func acceptable(m *message.Address, err error) (proto.Message, error) {
	if err == nil {
		_, _, err = decodeAddress(m)
	}
	return m, err
}

func podResources(pods []mesh.Pod) []resource {
	out := make([]resource, 0, len(pods))
	for _, p := range pods {
		out = append(out, resource{p.UID, nil, func() (proto.Message, error) { return encodePod(p) }})
	}
	return out
}
