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

// operations are a program as the kernel takes it, and tells it back.
func operations(program []unix.SockFilter) (ops []byte) {
	for _, op := range program {
		ops = binary.NativeEndian.AppendUint16(ops, op.Code)
		ops = append(ops, op.Jt, op.Jf)
		ops = binary.NativeEndian.AppendUint32(ops, op.K)
	}
	return ops
}

// programOf are the attributes of a filter that hold a program.
func programOf(program []unix.SockFilter) []byte {
	length := attr(bpfOpsLen, binary.NativeEndian.AppendUint16(nil, uint16(len(program))))
	return append(length, attr(bpfOps, operations(program))...)
}

// Gated says why a captured pod has no gate behind its rules, nil if it has.
func (k *Kernel) Gated() error { return k.gated() }

// tryGate puts a gate where it does no harm.
func tryGate() error {
	ns, err := netns.Unnamed()
	if err != nil {
		return err
	}
	err = atLinks(ns, func(h *netlink.Handle) ([]int, error) { return []int{loopback}, nil }, standing{gate: true}.set)
	if err = errors.Join(err, ns.Close()); err != nil {
		return fmt.Errorf("a gate at an interface (needs the kernel's sch_ingress and cls_bpf): %w", err)
	}
	return nil
}

// standing is what of ours stands at an interface.
type standing struct{ gate, lead bool }

// stand puts at each interface by which packets may leave the pod what is wanted there, as far
// as the kernel has it. At what only leads within it there is nothing: what a bridge passes on
// is no business of the rules.
func (k *Kernel) stand(ns *netns.NS, want standing) error {
	return errors.Join(atLinks(ns, outLinks, k.can(want).set), atLinks(ns, withinLinks, standing{}.set))
}

// lead puts the filter that leads to the proxy at each of them, and leaves gates as they are.
func (k *Kernel) lead(ns *netns.NS) error {
	if k.Leads() != nil {
		return nil
	}
	return atLinks(ns, outLinks, func(h *netlink.Handle, fd, link int) error {
		g, err := readGate(fd, link)
		if err != nil {
			return err
		}
		return standing{gate: g.gate.there, lead: true}.set(h, fd, link)
	})
}

func (k *Kernel) can(want standing) standing {
	return standing{want.gate && k.Gated() == nil, want.lead && k.Leads() == nil}
}

// set makes an interface have just that of ours. What it hangs on, an empty clsact, stays as long as
// the interface: the kernel stops an interface for a moment when one comes or goes, and drops
// what is sent meanwhile.
func (want standing) set(h *netlink.Handle, fd, link int) error {
	g, err := readGate(fd, link)
	if err != nil {
		return err
	}
	if want.gate && !g.gate.whole || want.lead && !g.lead.whole {
		if err := h.QdiscAdd(clsact(link)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("clsact at interface %d: %w", link, err)
		}
	}
	return errors.Join(g.lead.set(fd, want.lead, leadMessage(link)), g.gate.set(fd, want.gate, gateMessage(link)))
}

// set makes one filter be there, or not.
func (is filter) set(fd int, want bool, message []byte) error {
	switch {
	case want && !is.whole:
		if err := tell(fd, 1, unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, message); err != nil {
			return fmt.Errorf("filter: %w", err)
		}
	case !want && is.there:
		return unlessGone(tell(fd, 1, unix.RTM_DELTFILTER, 0, message))
	}
	return nil
}

// checkStanding reads back what stands where.
func (k *Kernel) checkStanding(ns *netns.NS, want standing) error {
	check := func(want standing) func(*netlink.Handle, int, int) error {
		return func(_ *netlink.Handle, fd, link int) error {
			g, err := readGate(fd, link)
			if err == nil && (!g.gate.is(want.gate) || !g.lead.is(want.lead)) {
				err = fmt.Errorf("namespace %d, gate at interface %d: %w", ns.Inode(), link, ErrRules)
			}
			return err
		}
	}
	return errors.Join(atLinks(ns, outLinks, check(k.can(want))), atLinks(ns, withinLinks, check(standing{})))
}

// hasGate reports whether there is one at any interface.
func hasGate(ns *netns.NS) (has bool, err error) {
	see := func(_ *netlink.Handle, fd, link int) error {
		g, err := readGate(fd, link)
		has = has || g.gate.there || g.lead.there
		return err
	}
	err = errors.Join(atLinks(ns, outLinks, see), atLinks(ns, withinLinks, see))
	return has, err
}

// gate is what of ours stands at an interface.
type gate struct{ gate, lead filter }

// filter is one of ours: something is at its place, and it is the very one.
type filter struct{ there, whole bool }

func (is filter) is(wanted bool) bool { return is.whole == wanted && is.there == wanted }

// readGate asks the kernel for the filters by which packets leave an interface.
func readGate(fd, link int) (g gate, err error) {
	err = ask(fd, 1, unix.RTM_GETTFILTER, filterHead(link, netlink.HANDLE_MIN_EGRESS, 0), func(b []byte) error {
		if len(b) >= sizeofTcMsg && binary.NativeEndian.Uint32(b[4:]) == uint32(link) {
			g.see(binary.NativeEndian.Uint32(b[16:])>>16, find(b[sizeofTcMsg:], unix.TCA_OPTIONS))
		}
		return nil
	})
	// EINVAL, ENOENT: there is no clsact.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return g, fmt.Errorf("list filters of interface %d: %w", link, err)
	}
	return g, nil
}

func (g *gate) see(place uint32, options []byte) {
	switch {
	case options == nil: // stands for all of one priority
	case place == gatePlace:
		flags := find(options, bpfFlags)
		whole := bytes.Equal(find(options, bpfOps), operations(gateProgram())) && len(flags) == 4 && binary.NativeEndian.Uint32(flags)&actDirect != 0
		g.gate = filter{true, whole}
	case place == leadPlace:
		g.lead = filter{true, isLead(options)}
	}
}

// gateMessage is a struct tcmsg and its attributes. The library has no classic BPF.
func gateMessage(link int) []byte {
	options := append(programOf(gateProgram()), attr(bpfFlags, binary.NativeEndian.AppendUint32(nil, actDirect))...)
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
