package redirect

import (
	"encoding/binary"
	"errors"
	"iter"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// An attribute is one of netlink's.
type attribute struct {
	kind  uint16
	value []byte
}

// attributes are those of b, as far as they can be read.
func attributes(b []byte) iter.Seq[attribute] {
	return func(yield func(attribute) bool) {
		for len(b) >= unix.SizeofNlAttr {
			size := int(binary.NativeEndian.Uint16(b))
			if size < unix.SizeofNlAttr || size > len(b) {
				return
			}
			if !yield(attribute{binary.NativeEndian.Uint16(b[2:]) & attrKind, b[unix.SizeofNlAttr:size]}) {
				return
			}
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

// find is the value of the first attribute of that kind.
func find(b []byte, kind uint16) []byte {
	for a := range attributes(b) {
		if a.kind == kind {
			return a.value
		}
	}
	return nil
}

// attr is an attribute, padded.
func attr(kind uint16, value []byte) []byte {
	size := unix.SizeofNlAttr + len(value)
	b := make([]byte, (size+3)&^3)
	binary.NativeEndian.PutUint16(b, uint16(size))
	binary.NativeEndian.PutUint16(b[2:], kind)
	copy(b[unix.SizeofNlAttr:], value)
	return b
}

// text is an attribute that holds a string.
func text(kind uint16, s string) []byte { return attr(kind, append([]byte(s), 0)) }

// Counters are how many packets the guard of a pod has dropped, by kind. There are none if
// the pod has no table.
func Counters(ns *netns.NS) (map[string]uint64, error) {
	fd, err := ns.Netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	dropped := make(map[string]uint64)
	err = askTables(fd, 1, unix.NFT_MSG_GETOBJ, nil, func(b []byte) error {
		if string(find(b, unix.NFTA_OBJ_TABLE)) != tableName+"\x00" {
			return nil
		}
		name := find(b, unix.NFTA_OBJ_NAME)
		if n := find(find(b, unix.NFTA_OBJ_DATA), unix.NFTA_COUNTER_PACKETS); len(n) == 8 && len(name) > 0 {
			dropped[string(name[:len(name)-1])] = binary.BigEndian.Uint64(n)
		}
		return nil
	})
	if errors.Is(err, unix.EINTR) { // another table has changed
		err = nil
	}
	return dropped, err
}

// heldBy reads the flows that a set of our table holds; of a map, as contents.came. found is false if there is no such set.
func heldBy(fd int, set string) (flows []flow, found bool, err error) {
	filter := append(text(unix.NFTA_SET_ELEM_LIST_TABLE, tableName), text(unix.NFTA_SET_ELEM_LIST_SET, set)...)
	err = askTables(fd, 1, unix.NFT_MSG_GETSETELEM, filter, func(b []byte) error {
		for e := range attributes(find(b, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			key := find(find(e.value, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
			data := find(find(e.value, unix.NFTA_SET_ELEM_DATA), unix.NFTA_DATA_VALUE)
			if f, ok := parseFlow(key, data); ok {
				flows = append(flows, f)
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	return flows, err == nil, err
}

// parseFlow reads two ends, or one, its port first, and the port that it came for.
func parseFlow(key, data []byte) (f flow, ok bool) {
	if len(data) >= 2 && len(key) > 4 {
		if f.remote, _, ok = parseEnd(append(slices.Clone(key[4:]), key[:4]...), len(key) == 8); !ok {
			return f, false
		}
		f.local = netip.AddrPortFrom(f.remote.Addr(), binary.BigEndian.Uint16(data))
		return f, true
	}
	var rest []byte
	if f.local, rest, ok = parseEnd(key, len(key) == 16); !ok {
		return f, false
	}
	f.remote, _, ok = parseEnd(rest, len(key) == 16)
	return f, ok
}

// parseEnd reads one end. Each field begins at a multiple of four.
func parseEnd(b []byte, four bool) (end netip.AddrPort, rest []byte, ok bool) {
	size := 16
	if four {
		size = 4
	}
	if len(b) < size+4 {
		return end, nil, false
	}
	a, _ := netip.AddrFromSlice(b[:size])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[size:])), b[size+4:], true
}

// held reads a set of both families.
func held(ns *netns.NS, set string) (flows []flow, found bool, err error) {
	fd, err := ns.Netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, false, err
	}
	defer unix.Close(fd)
	for _, family := range []string{"4", "6"} {
		for range 10 { // as long as it changes meanwhile
			var some []flow
			var one bool
			if some, one, err = heldBy(fd, set+family); !errors.Is(err, unix.EINTR) {
				flows, found = append(flows, some...), found || one
				break
			}
		}
		if err != nil {
			return nil, false, err
		}
	}
	return flows, found, nil
}
