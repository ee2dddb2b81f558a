package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
)

// A gate stands behind the rules, at each interface of a captured pod. It lets TCP leave that
// the rules have seen and passed, which give it passMark, and what the proxy itself sends.
// Where the rules are gone, as after "nft flush ruleset" in the pod, nothing else leaves until
// they are put back. It is a filter of tc, a program of BPF, since those are kept elsewhere
// than nftables, and stay when the agent ends.
//
//	application ─► rules ──passMark──► gate ─► network
//	                 └─► dropped         └─► dropped, if the rules are gone

const (
	// passMark is on what the rules let leave. Nothing routes by it.
	passMark = 0x72c1b

	gateName = "tacit_gate"
	// gatePlace is handle and priority of the filter: 0x7ac1.
	gatePlace = 31425
	// continues lets other filters of the interface decide (TC_ACT_UNSPEC), drops drops (TC_ACT_SHOT).
	continues, drops = -1, 2
	// Offsets of struct __sk_buff (linux/bpf.h), and from where the network's header is
	// counted (SKF_NET_OFF of linux/filter.h).
	skbMark, skbProtocol = 8, 16
	networkHeader        = -0x100000
	// Of the headers of IPv4 and IPv6: where is what comes next.
	protocol4, protocol6 = 9, 6
)

// gate is the program, once it is loaded.
type gate struct {
	program *ebpf.Program
	// tag is what the kernel calls a program with the same instructions.
	tag string
}

// loadGate asks the kernel for the program. An error means that there are no gates here: an
// old kernel, or no right (CAP_BPF, or CAP_SYS_ADMIN).
func loadGate() (*gate, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: gateName, Type: ebpf.SchedCLS, Instructions: gateInstructions(), License: "Apache-2.0"})
	if err != nil {
		return nil, fmt.Errorf("load the gate's program (needs CAP_BPF or CAP_SYS_ADMIN): %w", err)
	}
	info, err := p.Info()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read back the gate's program: %w", err), p.Close())
	}
	return &gate{p, info.Tag}, nil
}

// gateInstructions drop TCP that has no mark which lets it leave. (Headers between IPv6 and
// TCP are not looked behind: to send those takes NET_RAW.)
func gateInstructions() asm.Instructions {
	etherType := func(n uint16) int32 {
		return int32(binary.NativeEndian.Uint16([]byte{byte(n >> 8), byte(n)}))
	}
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbMark, asm.Word),
		asm.JEq.Imm(asm.R2, passMark, "pass"),
		asm.JEq.Imm(asm.R2, mesh.Mark, "pass"),
		asm.LoadMem(asm.R2, asm.R6, skbProtocol, asm.Word),
		asm.JEq.Imm(asm.R2, etherType(unix.ETH_P_IP), "ip4"),
		asm.JEq.Imm(asm.R2, etherType(unix.ETH_P_IPV6), "ip6"),
		asm.Ja.Label("pass"),
		asm.LoadAbs(networkHeader+protocol4, asm.Byte).WithSymbol("ip4"),
		asm.Ja.Label("is"),
		asm.LoadAbs(networkHeader+protocol6, asm.Byte).WithSymbol("ip6"),
		asm.JNE.Imm(asm.R0, unix.IPPROTO_TCP, "pass").WithSymbol("is"),
		asm.Mov.Imm(asm.R0, drops),
		asm.Return(),
		asm.Mov.Imm(asm.R0, continues).WithSymbol("pass"),
		asm.Return(),
	}
}

// gates returns the program, nil where the kernel has none.
func (k *Kernel) gates() *gate {
	g, _ := k.gate()
	return g
}

// Gated says why a captured pod has no gate behind its rules, nil if it has.
func (k *Kernel) Gated() error {
	_, err := k.gate()
	return err
}

// onceGate loads the program when it is first needed, and tries it.
func (k *Kernel) onceGate() func() (*gate, error) {
	return sync.OnceValues(func() (*gate, error) {
		g, err := loadGate()
		if err != nil {
			return nil, err
		}
		ns, err := netns.Unnamed()
		if err == nil {
			err = errors.Join(inside(ns, func(h *netlink.Handle, _ []int) error { return g.close(h, loopback) }), ns.Close())
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("a gate at an interface (needs the kernel's sch_ingress and cls_bpf): %w", err), g.program.Close())
		}
		return g, nil
	})
}

// closeGates puts a gate at each interface of the pod.
func (k *Kernel) closeGates(ns *netns.NS) error {
	g := k.gates()
	if g == nil {
		return nil
	}
	return inside(ns, func(h *netlink.Handle, _ []int) error {
		links, err := outLinks(h)
		if err != nil {
			return err
		}
		for _, link := range links {
			if err := g.close(h, link); err != nil {
				return err
			}
		}
		return nil
	})
}

// close puts it at one interface.
func (g *gate) close(h *netlink.Handle, link int) error {
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(math.MaxUint16, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact at interface %d: %w", link, err)
	}
	f := gateFilter(link)
	f.Fd, f.Name, f.DirectAction = g.program.FD(), gateName, true
	if err := h.FilterReplace(f); err != nil {
		return fmt.Errorf("gate at interface %d: %w", link, err)
	}
	return nil
}

func gateFilter(link int) *netlink.BpfFilter {
	return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: link, Parent: netlink.HANDLE_MIN_EGRESS, Handle: gatePlace, Priority: gatePlace, Protocol: unix.ETH_P_ALL,
	}}
}

// openGates takes all of them away.
func openGates(ns *netns.NS) error {
	return inside(ns, func(h *netlink.Handle, _ []int) error {
		links, err := outLinks(h)
		var errs []error
		for _, link := range links {
			found, ferr := gateAt(h, link)
			if errs = append(errs, ferr); found != nil {
				errs = append(errs, unlessGone(h.FilterDel(gateFilter(link))), dropEmpty(h, link))
			}
		}
		return errors.Join(append(errs, err)...)
	})
}

// dropEmpty takes away what filters hang on, if none does any more.
func dropEmpty(h *netlink.Handle, link int) error {
	for _, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
		all, err := filters(h, link, parent)
		if err != nil || len(all) > 0 {
			return err
		}
	}
	return unlessGone(h.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link, Handle: netlink.MakeHandle(math.MaxUint16, 0), Parent: netlink.HANDLE_CLSACT,
	}}))
}

// checkGates reads them back: at each interface, or at none.
func (k *Kernel) checkGates(ns *netns.NS, closed bool) error {
	g := k.gates()
	if g == nil {
		return nil
	}
	return inside(ns, func(h *netlink.Handle, _ []int) error {
		links, err := outLinks(h)
		if err != nil {
			return err
		}
		for _, link := range links {
			found, err := gateAt(h, link)
			if err != nil {
				return err
			}
			if is := found != nil && found.Tag == g.tag && found.DirectAction; is != closed {
				return fmt.Errorf("namespace %d, gate at interface %d: %w", ns.Inode(), link, ErrRules)
			}
		}
		return nil
	})
}

// hasGate reports whether there is one at any interface.
func hasGate(ns *netns.NS) (has bool, err error) {
	err = inside(ns, func(h *netlink.Handle, _ []int) error {
		links, err := outLinks(h)
		for _, link := range links {
			found, ferr := gateAt(h, link)
			err, has = errors.Join(err, ferr), has || found != nil
		}
		return err
	})
	return has, err
}

// gateAt is the gate of an interface, nil if there is none.
func gateAt(h *netlink.Handle, link int) (*netlink.BpfFilter, error) {
	all, err := filters(h, link, netlink.HANDLE_MIN_EGRESS)
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == gateName {
			return b, nil
		}
	}
	return nil, err
}

// filters are those of an interface in one direction.
func filters(h *netlink.Handle, link int, parent uint32) ([]netlink.Filter, error) {
	all, err := h.FilterList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: link}}, parent)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) { // gone, or nothing to hang filters on
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list filters of interface %d: %w", link, err)
	}
	return all, nil
}

// outLinks are the interfaces by which packets leave the pod.
func outLinks(h *netlink.Handle) ([]int, error) {
	links, err := upLinks(h)
	if err != nil {
		return nil, err
	}
	return links[1:], nil // without lo, which comes first
}
