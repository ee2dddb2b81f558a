package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tacit.dev/pod/netns"
)

// What a pod forwards as its own, a container's connection that it translates to its own
// address, meets the pod's own rules first, as it does without us. Only when it is about to
// leave, and looks like a connection of the pod's, it is led to the proxy: a filter of tc at
// the interface has it arrive at lo instead.
//
//	container ─► forward ─► masquerade ─► rules ──leadMark──► filter ─► lo ─► proxy
//	    ◄──────────────────── conntrack translates back ◄───── answers ───────┘
//
// The proxy's answers go to the pod's address, and conntrack leads them to the container.

const (
	// leadMark is on what is led so, and on the proxy's sockets that have accepted it.
	leadMark = 0x72c1d
	// leadPlace is handle and priority of the filter: before the gate.
	leadPlace = gatePlace - 1

	// Attributes of a filter of BPF and of an action, and of struct tc_mirred (linux/tc_act/tc_mirred.h):
	// its size, where is what happens to the packet, and what to do with it, to which interface.
	bpfAct                   = 1
	actKind, actOptions      = 1, 2
	mirredParms              = 2
	sizeofMirred             = 28
	mirredStolen, mirredToIn = 4, 3
)

// leadProgram finds what is to be led: all that has the mark.
func leadProgram() []unix.SockFilter {
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: askMark},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: leadMark, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: continues},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
}

// mirred is the action: arrive at lo.
func mirred() []byte {
	b := make([]byte, sizeofMirred)
	binary.NativeEndian.PutUint32(b[8:], mirredStolen)
	binary.NativeEndian.PutUint32(b[20:], mirredToIn)
	binary.NativeEndian.PutUint32(b[24:], loopback)
	return b
}

func leadMessage(link int) []byte {
	action := append(text(actKind, "mirred"), attr(actOptions, attr(mirredParms, mirred()))...)
	options := append(programOf(leadProgram()), attr(bpfAct, attr(1, action))...)
	b := append(filterHead(link, netlink.HANDLE_MIN_EGRESS, leadPlace), text(unix.TCA_KIND, "bpf")...)
	return append(b, attr(unix.TCA_OPTIONS, options)...)
}

// isLead reports whether a filter with these options is ours, whole.
func isLead(options []byte) bool {
	parms := find(find(find(find(options, bpfAct), 1), actOptions), mirredParms)
	want := mirred()
	return bytes.Equal(find(options, bpfOps), operations(leadProgram())) && len(parms) == sizeofMirred &&
		bytes.Equal(parms[8:12], want[8:12]) && bytes.Equal(parms[20:], want[20:])
}

// Leads says why what a pod forwards is refused, and not led to the proxy; nil if it is.
func (k *Kernel) Leads() error { return k.leads() }

// tryLead puts the filter where it does no harm.
func tryLead() error {
	ns, err := netns.Unnamed()
	if err != nil {
		return err
	}
	defer ns.Close()
	lo := func(*netlink.Handle) ([]int, error) { return []int{loopback}, nil }
	if err := atLinks(ns, lo, standing{lead: true}.set); err != nil {
		return fmt.Errorf("a filter that leads to lo (needs the kernel's sch_ingress, cls_bpf and act_mirred): %w", err)
	}
	return nil
}
