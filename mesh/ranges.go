package mesh

import "net/netip"

// ranges are prefixes. To look for an address costs as many steps as there are lengths of
// prefixes: each node has a range of its own, and most have one length.
type ranges struct {
	// all counts who names a prefix.
	all     trie[prefix, int]
	lengths *lengths
}

// lengths counts the prefixes of each length, of IPv4 and IPv6. It belongs to a World as a
// node of a trie does.
type lengths struct {
	era era
	of  [2][129]int
}

// prefix is a masked netip.Prefix without a pointer.
type prefix struct {
	address [16]byte
	bits    uint8
	family  uint8
}

func prefixOf(p netip.Prefix) prefix {
	p = p.Masked()
	return prefix{p.Addr().As16(), uint8(p.Bits()), uint8(family(p.Addr()))}
}

// change counts n more of p.
func (r *ranges) change(e era, p netip.Prefix, n int) {
	k := prefixOf(p)
	if now := count(&r.all, e, k, n); now > 0 == (now-n > 0) {
		return
	}
	switch {
	case r.lengths == nil:
		r.lengths = &lengths{era: e}
	case r.lengths.era != e:
		r.lengths = &lengths{e, r.lengths.of}
	}
	r.lengths.of[k.family][k.bits] += n
}

// count counts n more of k, and returns how many there are now. What is 0 is not there.
func count[K comparable](t *trie[K, int], e era, k K, n int) int {
	now, _ := t.get(k)
	if now += n; now > 0 {
		t.set(e, k, now)
	} else {
		t.del(e, k)
	}
	return now
}

func (r *ranges) has(a netip.Addr) bool {
	if r.lengths == nil || !a.IsValid() {
		return false
	}
	for bits, n := range r.lengths.of[family(a)] {
		if n == 0 {
			continue
		}
		if p, err := a.WithZone("").Prefix(bits); err == nil {
			if _, ok := r.all.get(prefixOf(p)); ok {
				return true
			}
		}
	}
	return false
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
