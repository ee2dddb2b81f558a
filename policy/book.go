package policy

import (
	"hash/maphash"
	"slices"

	"tacit.dev/mesh"
)

// Book has what was compiled, so that it is compiled once: a policy for all workloads, and a
// Set for all workloads to which the same policies apply. The zero Book is empty and usable.
// It is not safe for concurrent use; its Sets are.
type Book struct {
	policies map[*mesh.Policy]*compiled
	sets     map[uint64][]*page
	before   *Book
	count    int // of sets
}

// page is a Set, and of what it was made.
type page struct {
	policies []*mesh.Policy
	unknown  []string
	own      *mesh.Mode
	set      *Set
}

// Next is the Book for the time after a change. It takes over from b what it is asked for,
// until Close.
func (b *Book) Next() *Book { return &Book{before: b} }

// Close forgets what nobody has asked this Book for.
func (b *Book) Close() { b.before = nil }

// Compile is the package's, but that it does nothing twice. Policies are the same if they
// are the same pointers. own is the workload's mode, nil for none.
func (b *Book) Compile(policies []*mesh.Policy, unknown []string, own *mesh.Mode) *Set {
	key := page{policies: policies, unknown: unknown, own: own}
	h := key.hash()
	if p := b.find(h, &key); p != nil {
		return p.set
	}
	p := b.before.find(h, &key)
	if p == nil {
		p = &page{slices.Clone(policies), slices.Clone(unknown), own, b.newSet(policies, unknown, own)}
	}
	for _, one := range policies {
		b.policy(one) // what a Set was made of is kept as long as it
	}
	if b.sets == nil {
		b.sets = make(map[uint64][]*page)
	}
	b.sets[h] = append(b.sets[h], p)
	b.count++
	return p.set
}

// Len is how many Sets it has.
func (b *Book) Len() int { return b.count }

var seed = maphash.MakeSeed()

// hash says little of a mode: two that are equal need not be one.
func (p *page) hash() uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, one := range p.policies {
		maphash.WriteComparable(&h, one)
	}
	for _, name := range p.unknown {
		maphash.WriteComparable(&h, name)
	}
	if p.own != nil {
		maphash.WriteComparable(&h, [3]mesh.Level{p.own.Inbound, p.own.Outbound, p.own.Outside})
	}
	return h.Sum64()
}

func (p *page) isOf(o *page) bool {
	return slices.Equal(p.policies, o.policies) && slices.Equal(p.unknown, o.unknown) && p.own.Equal(o.own)
}

func (b *Book) find(h uint64, key *page) *page {
	if b == nil {
		return nil
	}
	for _, p := range b.sets[h] {
		if p.isOf(key) {
			return p
		}
	}
	return nil
}

func (b *Book) newSet(policies []*mesh.Policy, unknown []string, own *mesh.Mode) *Set {
	s := &Set{unknown: slices.Clone(unknown), mode: newMode(policies, own)}
	var enforced, tried []*compiled
	for _, p := range policies {
		c := b.policy(p)
		tried = append(tried, c)
		if !c.dryRun {
			enforced = append(enforced, c)
		}
	}
	s.enforced = newDecision(enforced)
	if len(tried) > len(enforced) {
		d := newDecision(tried)
		s.tried = &d
	}
	return s
}

// policy compiles p, unless this Book or the one before has it.
func (b *Book) policy(p *mesh.Policy) *compiled {
	if c := b.policies[p]; c != nil {
		return c
	}
	var c *compiled
	if b.before != nil {
		c = b.before.policies[p]
	}
	if c == nil {
		c = compile(p)
	}
	if b.policies == nil {
		b.policies = make(map[*mesh.Policy]*compiled)
	}
	b.policies[p] = c
	return c
}
