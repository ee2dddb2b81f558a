package redirect

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// digest stands for all that the kernel says of table inet tacit, less what it
// makes up itself (handles, positions). The zero digest is no table.
type digest [sha256.Size]byte

// Our tables: the rules, and what holds connections back while they change.
const tableName, holdName = "tacit", "tacit_hold"

// What x/sys does not have: the NFTA handles of table, set and object, and NFTA_SET_COUNT,
// which is how many elements a set has.
const (
	tableHandle = 4
	setHandle   = 16
	setCount    = 20
	objHandle   = 6
)

// attrKind masks the flags off an attribute's kind (NLA_TYPE_MASK).
const attrKind = 0x3fff

// readLimit bounds how long the kernel may take to answer a dump.
const readLimit = 5 * time.Second

// A dump is one question to nf_tables, and how its answer is read.
type dump struct {
	message uint16
	// table is the attribute that names the table.
	table uint16
	// skip are attributes that differ between two loads of one text.
	skip map[uint16]bool
}

func dumps() []dump {
	return []dump{
		{unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, map[uint16]bool{tableHandle: true}},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, map[uint16]bool{unix.NFTA_CHAIN_HANDLE: true}},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, map[uint16]bool{unix.NFTA_RULE_HANDLE: true, unix.NFTA_RULE_POSITION: true}},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, map[uint16]bool{setHandle: true, setCount: true}},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, map[uint16]bool{objHandle: true, unix.NFTA_OBJ_DATA: true}},
	}
}

// readTable asks the kernel of ns for our table: its flags (a dormant table does
// nothing), its chains with their hooks, its rules, sets and counters, but not what those
// hold: that changes by itself. A change by somebody else in the middle makes it ask again.
func readTable(ns *netns.NS) (digest, error) {
	fd, err := ns.Netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return digest{}, err
	}
	defer unix.Close(fd)
	for range 10 {
		d, err := readOnce(fd)
		if !errors.Is(err, unix.EINTR) {
			return d, err
		}
	}
	return digest{}, errors.New("the rules change faster than they can be read")
}

func readOnce(fd int) (digest, error) {
	h := sha256.New()
	found := false
	for i, d := range dumps() {
		err := askTables(fd, uint32(i+1), d.message, nil, func(attrs []byte) error {
			ours, kept, err := keep(attrs, d)
			if err != nil || !ours {
				return err
			}
			found = true
			_ = binary.Write(h, binary.NativeEndian, d.message) // a hash does not fail
			h.Write(kept)
			return nil
		})
		if err != nil {
			return digest{}, err
		}
	}
	if !found {
		return digest{}, nil
	}
	return digest(h.Sum(nil)), nil
}

// keep is attrs without those to skip, and whether it is of our table.
func keep(attrs []byte, d dump) (ours bool, kept []byte, err error) {
	for len(attrs) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(attrs))
		kind := binary.NativeEndian.Uint16(attrs[2:]) & attrKind
		if size < unix.SizeofNlAttr || size > len(attrs) {
			return false, nil, fmt.Errorf("netlink attribute of %d bytes in %d", size, len(attrs))
		}
		value := attrs[unix.SizeofNlAttr:size]
		if kind == d.table {
			ours = string(value) == tableName+"\x00"
		}
		if !d.skip[kind] {
			kept = append(kept, attrs[:size]...)
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return ours, kept, nil
}

// nfgen is the size of struct nfgenmsg.
const nfgen = 4

// askTables dumps message of nf_tables, of which filter are attributes, and calls each with
// the attributes of every object. The error is EINTR if the kernel's list changed meanwhile.
func askTables(fd int, seq uint32, message uint16, filter []byte, each func([]byte) error) error {
	family := []byte{unix.NFPROTO_INET, 0, 0, 0}
	return ask(fd, seq, unix.NFNL_SUBSYS_NFTABLES<<8|message, append(family, filter...), func(body []byte) error {
		if len(body) < nfgen {
			return nil
		}
		return each(body[nfgen:])
	})
}

// ask dumps what a netlink message asks for, and calls each with every answer.
func ask(fd int, seq uint32, message uint16, body []byte, each func([]byte) error) error {
	if err := request(fd, seq, message, unix.NLM_F_DUMP, body); err != nil {
		return err
	}
	return answers(fd, seq, each)
}

// request sends one netlink message.
func request(fd int, seq uint32, message, flags uint16, body []byte) error {
	req := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(req, uint32(unix.SizeofNlMsghdr+len(body)))
	binary.NativeEndian.PutUint16(req[4:], message)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(req[8:], seq)
	if err := unix.Sendto(fd, append(req, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask the kernel: %w", err)
	}
	return nil
}

// tell sends one netlink message, and returns the kernel's error.
func tell(fd int, seq uint32, message, flags uint16, body []byte) error {
	if err := request(fd, seq, message, flags|unix.NLM_F_ACK, body); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, err := receive(fd, buf)
	if err != nil {
		return fmt.Errorf("answer of the kernel: %w", err)
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("answer of the kernel: %d bytes, of type %d", n, binary.NativeEndian.Uint16(buf[4:]))
	}
	if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(buf[unix.SizeofNlMsghdr:]))); errno != 0 {
		return errno
	}
	return nil
}

// answers reads all of a dump.
func answers(fd int, seq uint32, each func([]byte) error) error {
	buf := make([]byte, 64<<10)
	interrupted := false
	for {
		n, err := receive(fd, buf)
		if err != nil {
			return fmt.Errorf("answer of the kernel: %w", err)
		}
		done, again, err := parse(buf[:n], seq, each)
		interrupted = interrupted || again
		if err != nil {
			return err
		}
		if done && interrupted {
			return unix.EINTR
		}
		if done {
			return nil
		}
	}
}

// receive waits, with a bound: the kernel answers from the call itself.
func receive(fd int, buf []byte) (int, error) {
	deadline := time.Now().Add(readLimit)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return 0, unix.ETIMEDOUT
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}

// parse reads one datagram of a dump.
func parse(b []byte, seq uint32, each func([]byte) error) (done, interrupted bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		kind := binary.NativeEndian.Uint16(b[4:])
		flags := binary.NativeEndian.Uint16(b[6:])
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false, false, fmt.Errorf("netlink message of %d bytes in %d", size, len(b))
		}
		body := b[unix.SizeofNlMsghdr:size]
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		mine := binary.NativeEndian.Uint32(b[8:]) == seq
		b = b[min((size+3)&^3, len(b)):]
		switch {
		case !mine: // left over from a dump that was given up
		case kind == unix.NLMSG_DONE:
			done = true
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
			return true, interrupted, fmt.Errorf("netlink: %w", errno)
		default:
			if err := each(body); err != nil {
				return true, interrupted, err
			}
		}
	}
	return done, interrupted, nil
}
