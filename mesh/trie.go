package mesh

import (
	"hash/maphash"
	"iter"
	"slices"
)

// trie is a table of which changes make another one: the two share all but the way to what
// is different. Whoever has a trie may read it while others are made of it. The zero trie
// is empty. It is written to only while its World is made.
//
//	root ─┬─ ...
//	      ├─ node ─┬─ page of at most maxPage entries
//	      ...      ...  each level looks at the next bits of the hash
type trie[K comparable, V any] struct {
	root *node[K, V]
}

const (
	fanBits = 2
	fan     = 1 << fanBits
	// maxPage is how many entries a page may have before it is split, unless their hashes
	// have no bits left.
	maxPage = 32
)

// node has either kids or a page. It belongs to the World that was made in era; another
// one copies it before it changes anything.
type node[K comparable, V any] struct {
	era  era
	kids *[fan]*node[K, V]
	page []entry[K, V]
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

// era numbers the Worlds in a row. What is of an older one is shared, and never changed.
type era uint64

// seed makes it impossible to choose keys that come to lie in one page.
var seed = maphash.MakeSeed()

func (t *trie[K, V]) get(k K) (v V, ok bool) {
	n, h := t.root, maphash.Comparable(seed, k)
	for n != nil && n.kids != nil {
		n, h = n.kids[h%fan], h>>fanBits
	}
	if n != nil {
		for i := range n.page {
			if n.page[i].key == k {
				return n.page[i].value, true
			}
		}
	}
	return v, false
}

// set lets k have the value v.
func (t *trie[K, V]) set(e era, k K, v V) {
	n := t.leaf(e, k)
	for i := range n.page {
		if n.page[i].key == k {
			n.page[i].value = v
			return
		}
	}
	if len(n.page) == cap(n.page) {
		n.page = append(make([]entry[K, V], 0, min(2*len(n.page)+1, len(n.page)+maxPage/2)), n.page...)
	}
	n.page = append(n.page, entry[K, V]{k, v})
}

// del lets k have nothing. Pages that are empty by now are kept for others.
func (t *trie[K, V]) del(e era, k K) {
	if _, ok := t.get(k); !ok {
		return
	}
	n := t.leaf(e, k)
	n.page = slices.DeleteFunc(n.page, func(x entry[K, V]) bool { return x.key == k })
}

// leaf returns the node whose page is to have k, with all on the way to it, as its own of era e.
func (t *trie[K, V]) leaf(e era, k K) *node[K, V] {
	h := maphash.Comparable(seed, k)
	at := &t.root
	for used := 0; ; used += fanBits {
		n := (*at).in(e)
		*at = n
		if n.kids == nil && len(n.page) >= maxPage && used < 64 {
			n.split(used)
		}
		if n.kids == nil {
			return n
		}
		at = &n.kids[h>>used%fan]
	}
}

// in returns the node itself if it is of era e, else a copy that is.
func (n *node[K, V]) in(e era) *node[K, V] {
	switch {
	case n == nil:
		return &node[K, V]{era: e}
	case n.era == e:
		return n
	case n.kids != nil:
		kids := *n.kids
		return &node[K, V]{era: e, kids: &kids}
	}
	return &node[K, V]{era: e, page: append(make([]entry[K, V], 0, len(n.page)+1), n.page...)}
}

// split gives the entries of a page to kids. used bits of their hashes led here.
func (n *node[K, V]) split(used int) {
	n.kids = new([fan]*node[K, V])
	for i := range n.kids {
		n.kids[i] = &node[K, V]{era: n.era, page: make([]entry[K, V], 0, len(n.page)/fan)}
	}
	for _, x := range n.page {
		kid := n.kids[maphash.Comparable(seed, x.key)>>used%fan]
		kid.page = append(kid.page, x)
	}
	n.page = nil
}

// pack gives back the room that pages of era e have for more.
func (t *trie[K, V]) pack(e era) { t.root.pack(e) }

func (n *node[K, V]) pack(e era) {
	if n == nil || n.era != e {
		return
	}
	n.page = append(make([]entry[K, V], 0, len(n.page)), n.page...)
	if n.kids != nil {
		for _, kid := range n.kids {
			kid.pack(e)
		}
	}
}

// all gives the entries in no order.
func (t *trie[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { t.root.each(yield) }
}

func (n *node[K, V]) each(yield func(K, V) bool) bool {
	if n == nil {
		return true
	}
	for _, x := range n.page {
		if !yield(x.key, x.value) {
			return false
		}
	}
	if n.kids != nil {
		for _, kid := range n.kids {
			if !kid.each(yield) {
				return false
			}
		}
	}
	return true
}
