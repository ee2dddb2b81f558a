package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// A gate stands behind the rules, at each interface of a captured pod. It lets TCP leave that
// the rules have seen and passed, which give it passMark, and what the proxy itself sends.
// Where the rules are gone, as after "nft flush ruleset" in the pod, nothing else leaves until
// they are put back. It is a filter of tc, which nftables does not know of and which stays
// when the agent ends; a program of classic BPF, which takes no more rights than the rules do.
//
//	application ─► rules ──passMark──► gate ─► network
//	                 └─► dropped         └─► dropped, if the rules are gone

const (
	// passMark is on what the rules let leave. Nothing routes by it.
	passMark = 0x72c1b

	// gatePlace is handle and priority of the filter: 0x7ac1. The kernel keeps no name of it.
	gatePlace = 31425
	// continues lets other filters of the interface decide (TC_ACT_UNSPEC), drops drops (TC_ACT_SHOT).
	continues, drops = math.MaxUint32, 2
	// What a program may ask for besides the packet (SKF_AD_PROTOCOL, SKF_AD_MARK of
	// linux/filter.h), and from where the network's header is counted (SKF_NET_OFF).
	askProtocol, askMark = 0xfffff000, 0xfffff000 + 20
	networkHeader        = 0xfff00000
	// Of the headers of IPv4 and IPv6: where is what comes next.
	protocol4, protocol6 = 9, 6
	// Attributes of a filter of BPF that x/sys does not have, the flag by which the program's
	// result is what happens, and the size of struct tcmsg.
	bpfOpsLen, bpfOps, bpfFlags = 4, 5, 8
	actDirect                   = 1
	sizeofTcMsg                 = 20
)

// gateProgram drops TCP that has no mark which lets it leave. (Headers between IPv6 and
// TCP are not looked behind: to send those takes NET_RAW.)
func gateProgram() []unix.SockFilter {
	const (
		load     = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		loadByte = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		equal    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		end      = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{ // Jt and Jf are how many to leave out
		{Code: load, K: askMark},
		{Code: equal, K: passMark, Jt: 8},
		{Code: equal, K: mesh.Mark, Jt: 7},
		{Code: load, K: askProtocol},
		{Code: equal, K: unix.ETH_P_IP, Jt: 1},
		{Code: equal, K: unix.ETH_P_IPV6, Jt: 2, Jf: 4},
		{Code: loadByte, K: networkHeader + protocol4},
		{Code: equal, K: unix.IPPROTO_TCP, Jt: 3, Jf: 2},
		{Code: loadByte, K: networkHeader + protocol6},
		{Code: equal, K: unix.IPPROTO_TCP, Jt: 1},
		{Code: end, K: continues},
		{Code: end, K: drops},
	}
}

// gateOperations are the program as the kernel takes it, and tells it back.
func gateOperations() (ops []byte) {
	for _, op := range gateProgram() {
		ops = binary.NativeEndian.AppendUint16(ops, op.Code)
		ops = append(ops, op.Jt, op.Jf)
		ops = binary.NativeEndian.AppendUint32(ops, op.K)
	}
	return ops
}

// Gated says why a captured pod has no gate behind its rules, nil if it has.
func (k *Kernel) Gated() error { return k.gated() }

// tryGate puts a gate where it does no harm.
func tryGate() error {
	ns, err := netns.Unnamed()
	if err != nil {
		return err
	}
	err = atLinks(ns, func(h *netlink.Handle) ([]int, error) { return []int{loopback}, nil }, closeGate)
	if err = errors.Join(err, ns.Close()); err != nil {
		return fmt.Errorf("a gate at an interface (needs the kernel's sch_ingress and cls_bpf): %w", err)
	}
	return nil
}

// closeGates puts a gate at each interface by which packets may leave the pod. At what only
// leads within it there is none: what a bridge passes on is no business of the rules.
func (k *Kernel) closeGates(ns *netns.NS) error {
	if k.Gated() != nil {
		return nil
	}
	return errors.Join(atLinks(ns, outLinks, closeGate), atLinks(ns, withinLinks, openGate))
}

func closeGate(h *netlink.Handle, fd, link int) error {
	if g, err := readGate(fd, link); g.whole || err != nil {
		return err
	}
	if err := h.QdiscAdd(clsact(link)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact at interface %d: %w", link, err)
	}
	if err := tell(fd, 1, unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, gateMessage(link)); err != nil {
		return fmt.Errorf("gate at interface %d: %w", link, err)
	}
	return nil
}

// openGates takes all of them away. What they hung on, an empty clsact, stays as long as the
// interface: the kernel stops an interface for a moment when one comes or goes, and drops
// what is sent meanwhile.
func openGates(ns *netns.NS) error {
	return errors.Join(atLinks(ns, outLinks, openGate), atLinks(ns, withinLinks, openGate))
}

func openGate(_ *netlink.Handle, fd, link int) error {
	g, err := readGate(fd, link)
	if err != nil || !g.there {
		return err
	}
	return unlessGone(tell(fd, 1, unix.RTM_DELTFILTER, 0, gateMessage(link)))
}

// checkGates reads them back: one at each interface by which packets may leave, or none at any.
func (k *Kernel) checkGates(ns *netns.NS, closed bool) error {
	if k.Gated() != nil {
		return nil
	}
	check := func(closed bool) func(*netlink.Handle, int, int) error {
		return func(_ *netlink.Handle, fd, link int) error {
			g, err := readGate(fd, link)
			if err == nil && (g.whole != closed || g.there != closed) {
				err = fmt.Errorf("namespace %d, gate at interface %d: %w", ns.Inode(), link, ErrRules)
			}
			return err
		}
	}
	return errors.Join(atLinks(ns, outLinks, check(closed)), atLinks(ns, withinLinks, check(false)))
}

// hasGate reports whether there is one at any interface.
func hasGate(ns *netns.NS) (has bool, err error) {
	see := func(_ *netlink.Handle, fd, link int) error {
		g, err := readGate(fd, link)
		has = has || g.there
		return err
	}
	err = errors.Join(atLinks(ns, outLinks, see), atLinks(ns, withinLinks, see))
	return has, err
}

// gate is what stands at an interface: something at our place, and our very program.
type gate struct {
	there, whole bool
}

// readGate asks the kernel for the filters by which packets leave an interface.
func readGate(fd, link int) (g gate, err error) {
	err = ask(fd, 1, unix.RTM_GETTFILTER, filterHead(link, netlink.HANDLE_MIN_EGRESS, 0), func(b []byte) error {
		if len(b) >= sizeofTcMsg && binary.NativeEndian.Uint32(b[4:]) == uint32(link) && binary.NativeEndian.Uint32(b[16:])>>16 == gatePlace {
			g.see(find(b[sizeofTcMsg:], unix.TCA_OPTIONS))
		}
		return nil
	})
	// EINVAL, ENOENT: there is no clsact.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return g, fmt.Errorf("list filters of interface %d: %w", link, err)
	}
	return g, nil
}

func (g *gate) see(options []byte) {
	if options == nil { // stands for all of one priority
		return
	}
	flags := find(options, bpfFlags)
	g.there = true
	g.whole = bytes.Equal(find(options, bpfOps), gateOperations()) && len(flags) == 4 && binary.NativeEndian.Uint32(flags)&actDirect != 0
}

// gateMessage is a struct tcmsg and its attributes. The library has no classic BPF.
func gateMessage(link int) []byte {
	ops := gateOperations()
	options := attr(bpfOpsLen, binary.NativeEndian.AppendUint16(nil, uint16(len(gateProgram()))))
	options = append(options, attr(bpfOps, ops)...)
	options = append(options, attr(bpfFlags, binary.NativeEndian.AppendUint32(nil, actDirect))...)
	b := append(filterHead(link, netlink.HANDLE_MIN_EGRESS, gatePlace), text(unix.TCA_KIND, "bpf")...)
	return append(b, attr(unix.TCA_OPTIONS, options)...)
}

// filterHead is the struct tcmsg of a filter; a place of 0 is any.
func filterHead(link int, parent uint32, place uint32) []byte {
	b := make([]byte, sizeofTcMsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(link))
	binary.NativeEndian.PutUint32(b[8:], place)
	binary.NativeEndian.PutUint32(b[12:], parent)
	if place != 0 {
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		binary.NativeEndian.PutUint32(b[16:], place<<16|uint32(all))
	}
	return b
}

func clsact(link int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link, Handle: netlink.MakeHandle(math.MaxUint16, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// atLinks calls f for some interfaces of the namespace, with a netlink socket there.
func atLinks(ns *netns.NS, which func(*netlink.Handle) ([]int, error), f func(h *netlink.Handle, fd, link int) error) error {
	fd, err := ns.Netlink(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return inside(ns, func(h *netlink.Handle, _ []int) error {
		links, err := which(h)
		errs := []error{err}
		for _, link := range links {
			errs = append(errs, f(h, fd, link))
		}
		return errors.Join(errs...)
	})
}
