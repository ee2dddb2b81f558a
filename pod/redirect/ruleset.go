// Package redirect holds the kernel rules that lead a pod's connections into the
// proxy's listeners, and an application's replies back to the proxy. It is the
// pod's own network namespace that gets them: one nftables table, "inet tacit",
// and one routing table for the replies.
//
// Its station is the first and the last of a connection: between the application
// and the proxy of its own node. It makes no socket (pod/netns does) and refuses
// to touch anything that is not named after us.
package redirect

import (
	"fmt"
	"net/netip"
	"strings"

	"tacit.dev/mesh"
)

// Config says which rules a pod has.
type Config struct {
	// ExcludeOutbound and ExcludeInbound are left alone.
	ExcludeOutbound []mesh.Exclusion
	ExcludeInbound  []uint16
	// ProbePorts are left alone for those who call from the pod's node, and from
	// nowhere else. Only Kernel knows their addresses.
	ProbePorts []uint16
	// Drain captures nothing new, and keeps what was captured alive: a pod on
	// its way out.
	Drain bool

	// node is where the pod's node calls from, sorted.
	node []netip.Addr
	// refuse leaves out what makes connections wait that nobody accepts: the kernel
	// has no nft_socket.
	refuse bool
}

// Ruleset is the whole table as nft reads it, as one transaction: it replaces
// the one that is there, if one is. Adding the table before deleting it is how
// nft deletes what may not exist.
func Ruleset(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, head, mesh.Mark, mesh.ReplyMark)
	if c.Drain {
		b.WriteString(drain)
		return b.String()
	}
	fmt.Fprintf(&b, outboundHead, mesh.Mark)
	for _, e := range c.ExcludeOutbound {
		b.WriteString(exclusion(e))
	}
	fmt.Fprintf(&b, outboundTail, mesh.OutboundPort)
	b.WriteString(inboundHead)
	for _, p := range c.ExcludeInbound {
		fmt.Fprintf(&b, "\t\ttcp dport %d return\n", p)
	}
	for _, a := range c.node {
		for _, p := range c.ProbePorts {
			fmt.Fprintf(&b, "\t\t%s saddr %s tcp dport %d return\n", familyOf(a), a, p)
		}
	}
	fmt.Fprintf(&b, inboundTail, mesh.InboundPort)
	if !c.refuse {
		fmt.Fprintf(&b, unheard, mesh.OutboundPort, mesh.InboundPort)
	}
	b.WriteString("}\n")
	return b.String()
}

// exclusion is the rule that leaves e alone. An exclusion of everything is none.
func exclusion(e mesh.Exclusion) string {
	var match []string
	if e.Prefix.IsValid() {
		match = append(match, fmt.Sprintf("%s daddr %s", familyOf(e.Prefix.Addr()), e.Prefix.Masked()))
	}
	if e.Port != 0 {
		match = append(match, fmt.Sprintf("tcp dport %d", e.Port))
	}
	if len(match) == 0 {
		return ""
	}
	return "\t\t" + strings.Join(match, " ") + " return\n"
}

func familyOf(a netip.Addr) string {
	if a.Is6() {
		return "ip6"
	}
	return "ip"
}

// head is what a pod has as long as one connection goes through the proxy.
//
// The order of the hooks on the way out is raw (-300), conntrack (-200), mangle
// (-150), nat (-100); in nat output only numbers are understood by nft 1.0.
const head = `# Tacit. The proxy's marks: %#[1]x on what it dials, %#[2]x on replies to it.
add table inet tacit
delete table inet tacit
table inet tacit {
	# An inner connection (proxy to application) has the client's own address, and
	# may have the client's port. Its zone keeps it apart from the outer one.
	chain inner_zone {
		type filter hook output priority -300; policy accept;
		meta mark %#[1]x oifname "lo" ct original zone set 1
	}

	# The application's replies on an inner connection go to a foreign address, and
	# have to come back over lo. The connection remembers it, not the socket: a
	# reset of a closed port has none. The mark leads to routing table 31425.
	chain inner_route {
		type route hook output priority -150; policy accept;
		meta mark %#[1]x oifname "lo" ct mark set %#[2]x
		ct direction reply ct mark %#[2]x meta mark set %#[2]x
	}
`

// The nat chains see only the first packet of a connection that conntrack knows
// nothing of; that may be from the middle of one which is older than the table.
// So only a SYN is redirected.
const outboundHead = `
	# From the application to the network; only what begins.
	chain outbound {
		type nat hook output priority -100; policy accept;
		meta l4proto != tcp return
		meta mark %#[1]x return
		fib daddr type local return
`

const outboundTail = `		tcp flags & (fin | syn | rst | ack) == syn redirect to :%d
	}
`

const inboundHead = `
	# From the network to the application; only what begins, and is for the pod.
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
		meta l4proto != tcp return
		iifname "lo" return
		fib daddr type != local return
`

const inboundTail = `		tcp flags & (fin | syn | rst | ack) == syn redirect to :%d
	}
`

// unheard is for the moment in which agent and proxy are both away, who have the
// listeners: a client whose SYN is lost sends it again after a second, one that is
// refused gives up. Any socket will do, also one in TIME_WAIT, which a client that uses
// its port again meets; "transparent" is what nft can ask of all of them.
const unheard = `
	# While nobody listens, a connection that was led here waits instead of being refused.
	chain unheard {
		type filter hook input priority 0; policy accept;
		tcp flags & (fin | syn | rst | ack) != syn return
		socket transparent 0 return
		socket transparent 1 return
		ct status dnat tcp dport %d drop
		ct status dnat tcp dport %d drop
	}
`

// drain keeps the nat hooks registered: without them the kernel would no longer
// translate what was redirected before.
const drain = `
	# Nothing new is captured. What was keeps its translation as long as there is a
	# nat chain at its hook.
	chain outbound {
		type nat hook output priority -100; policy accept;
	}
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
	}
}
`
