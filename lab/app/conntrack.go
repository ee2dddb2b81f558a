package app

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// conntrack flush|fill: has the namespace's conntrack forget everything, or fills its
// table, as a flood of short connections does, with entries that end in some seconds.
func conntrack(_ context.Context, words []string, out io.Writer) error {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	switch strings.Join(words, " ") {
	case "flush":
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	case "fill":
		n, err := fill(h)
		fmt.Fprintf(out, "%d entries\n", n)
		return err
	}
	return fmt.Errorf("conntrack %q: want flush or fill", strings.Join(words, " "))
}

const (
	// fillFor is how long the entries stay, in seconds.
	fillFor = 3
	// established is TCP_CONNTRACK_ESTABLISHED of linux/netfilter/nf_conntrack_tcp.h.
	established = 3
)

func fill(h *netlink.Handle) (n int, err error) {
	most, err := tableSize()
	if err != nil {
		return 0, err
	}
	for n = range most {
		if err := h.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, flow(n)); err != nil {
			if n > most/2 { // ENOMEM: it is full
				return n, nil
			}
			return n, fmt.Errorf("entry %d of %d: %w", n, most, err)
		}
	}
	return most, nil
}

// flow is the nth of so many connections between addresses that nobody has.
func flow(n int) *netlink.ConntrackFlow {
	from, to := net.IPv4(198, 18, byte(n>>22), byte(n>>14)), net.IPv4(198, 19, 0, 1)
	port := uint16(n&0x3fff) + 1024
	return &netlink.ConntrackFlow{
		FamilyType: unix.AF_INET, TimeOut: fillFor,
		Forward:   netlink.IPTuple{SrcIP: from, DstIP: to, SrcPort: port, DstPort: 9, Protocol: unix.IPPROTO_TCP},
		Reverse:   netlink.IPTuple{SrcIP: to, DstIP: from, SrcPort: 9, DstPort: port, Protocol: unix.IPPROTO_TCP},
		ProtoInfo: &netlink.ProtoInfoTCP{State: established},
	}
}

func tableSize() (int, error) {
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
