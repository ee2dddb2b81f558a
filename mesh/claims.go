package mesh

import "slices"

// claims says whose something is, if several may claim it at once: of all that do it is
// the last in an order that does not depend on who came first.
type claims[K, V comparable] struct {
	owner trie[K, V]
	// rivals has all claims to what several claim, in order, the owner last. That is rare,
	// and what one alone claims costs nothing here.
	rivals trie[K, []V]
}

// add lets v claim k. A value claims a thing once.
func (c *claims[K, V]) add(e era, k K, v V, order func(a, b V) int) {
	had, ok := c.owner.get(k)
	if !ok {
		c.owner.set(e, k, v)
		return
	}
	all, several := c.rivals.get(k)
	if !several {
		all = []V{had}
	}
	if slices.Contains(all, v) {
		return
	}
	i, _ := slices.BinarySearchFunc(all, v, order)
	c.put(e, k, slices.Insert(slices.Clone(all), i, v))
}

// remove ends the claim of v to k, if it has one.
func (c *claims[K, V]) remove(e era, k K, v V) {
	all, several := c.rivals.get(k)
	if several {
		c.put(e, k, slices.DeleteFunc(slices.Clone(all), func(x V) bool { return x == v }))
	} else if had, ok := c.owner.get(k); ok && had == v {
		c.owner.del(e, k)
	}
}

// put lets k have the claims of all, one or more.
func (c *claims[K, V]) put(e era, k K, all []V) {
	c.owner.set(e, k, all[len(all)-1])
	if len(all) > 1 {
		c.rivals.set(e, k, all)
	} else {
		c.rivals.del(e, k)
	}
}

// shared are values that many have, kept once, by a hash of what they are. Two of one hash
// that are not the same are not shared; that costs memory, and nothing else.
type shared[T any] struct {
	all trie[uint64, use[T]]
}

type use[T any] struct {
	value *T
	count int
}

// take returns the one that is the same as v, or makes a copy of v.
func (s *shared[T]) take(e era, hash uint64, v *T, same func(a, b *T) bool, copy func(*T) *T) *T {
	u, ok := s.all.get(hash)
	if !ok {
		u.value = copy(v)
	} else if !same(u.value, v) {
		return copy(v)
	}
	u.count++
	s.all.set(e, hash, u)
	return u.value
}

// drop ends what take began.
func (s *shared[T]) drop(e era, hash uint64, v *T) {
	u, ok := s.all.get(hash)
	if !ok || u.value != v {
		return
	}
	if u.count--; u.count == 0 {
		s.all.del(e, hash)
		return
	}
	s.all.set(e, hash, u)
}
