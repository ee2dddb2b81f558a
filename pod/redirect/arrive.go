package redirect

import (
	"fmt"
	"strings"

	"tacit.dev/mesh"
)

// What arrives at the pod, over lo or from the network, passes these chains in this order.

// arriving is what comes before conntrack: connections for the proxy, over lo, and what
// conntrack has to take for another one than it knows.
func arriving(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, arrivingHead, mesh.ReplyMark, mesh.OutboundPort, leadMark, mesh.ResetMark)
	if c.Drain {
		return b.String() + "\tchain from_network_begins {\n\t}\n"
	}
	fmt.Fprintf(&b, fromNetwork, mesh.ResetMark)
	b.WriteString(otherAddress(c))
	return b.String()
}

const arrivingHead = `
	# What came with the ends of a connection that conntrack knows and has not redirected
	# (chain guard_begins) has a zone: there it is new.
	chain arriving {
		type filter hook prerouting priority -300; policy accept;
		meta l4proto != tcp accept
		iif "lo" goto led
		ip daddr . tcp dport . ip saddr . tcp sport @again4 ct original zone set 2
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @again6 ct original zone set 2
		` + begins + ` goto from_network_begins
	}

	# What arrives over lo, connections for the proxy among it.
	chain led {
		meta mark %#[3]x goto led_through
		meta mark %#[1]x ` + begins + ` goto to_proxy
	}

	# What the pod forwards as its own comes here when it was about to leave. What it forwards
	# by the addresses of others is reset.
	chain led_through {
		notrack
		fib saddr type != local meta mark set %#[4]x counter name forwarded meta l4proto tcp reject with tcp reset
		` + begins + ` goto to_proxy
	}
	chain to_proxy {
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:%[2]d accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:%[2]d accept
		drop comment "nobody listens: it comes again"
	}
`

const fromNetwork = `
	# A link-local address is nobody's that could be known: two pods of the mesh would speak
	# in clear. So who is captured takes no connection from there.
	chain from_network_begins {
		fib daddr type != local accept
		ip6 saddr fe80::/10 goto link_local
		jump other_address
	}
	chain link_local {
		jump left_alone
		meta mark set %#[1]x counter name link_local meta l4proto tcp reject with tcp reset
	}
`

// otherAddress refuses what comes to an address at which the mesh does not know the pod.
func otherAddress(c Config) string {
	var b strings.Builder
	b.WriteString("\tchain other_address {\n")
	for _, a := range c.Own {
		fmt.Fprintf(&b, "\t\t%s daddr %s return\n", familyOf(a), a)
	}
	if len(c.Own) > 0 {
		fmt.Fprintf(&b, "\t\tjump left_alone\n\t\tmeta mark set %#x counter name other_address meta l4proto tcp reject with tcp reset\n", mesh.ResetMark)
	}
	b.WriteString("\t}\n")
	return b.String()
}

// inbound leads what comes to the proxy. The nat chains see only packets of which
// conntrack knows nothing: the first one of a connection, or one from the middle when it has
// forgotten. That is led to the same socket again, if it is for none that is left alone.
func inbound(c Config) string {
	var b strings.Builder
	b.WriteString(inboundHead)
	if !c.refuse {
		fmt.Fprintf(&b, inboundAgain, mesh.Mark, mesh.InboundPort)
	}
	fmt.Fprintf(&b, inboundTail, mesh.InboundPort)
	return b.String()
}

const inboundHead = `
	# From the network to the application, and for the pod.
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
		meta l4proto != tcp accept
		iif "lo" accept
		fib daddr type != local accept
		jump left_alone
		` + begins + ` goto inbound_begins
`

const inboundAgain = `		socket mark %#[1]x accept
		ip daddr . tcp dport . ip saddr . tcp sport @older4 accept
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @older6 accept
		jump excluded_answers
		meta l4proto tcp redirect to :%[2]d
`

const inboundTail = `	}
	chain inbound_begins {
		update @came4 { tcp sport . ip saddr timeout 1d : tcp dport }
		meta l4proto tcp redirect to :%[1]d
	}

	# What the proxy sends when conntrack has forgotten where the connection was redirected. In
	# IPv6 it waits until the client has sent something: nft 1.0 has no such map for its addresses.
	chain inbound_back {
		type nat hook postrouting priority 100; policy accept;
		oif "lo" accept
		tcp sport %[1]d meta nfproto ipv4 snat to :tcp dport . ip daddr map @came4
	}
`

// arrived is what has been routed to the pod itself. It stops what would reach an application
// past the proxy: a connection that conntrack takes for an old one, and so does not redirect.
// And it gives marks: the application's socket of an inner connection takes its mark from the
// first packet that it gets (tcp_fwmark_accept), and a reset that no socket sends takes the
// mark of what it answers (fwmark_reflect). It is early in this hook, so that the pod's own
// rules reset with these marks, too.
func arrived(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, arrivedHead, mesh.InboundPort, mesh.ResetMark)
	if !c.refuse {
		fmt.Fprintf(&b, "\t\tsocket mark %#x counter name incoming drop\n", mesh.ReplyMark)
	}
	fmt.Fprintf(&b, arrivedTail, mesh.Mark, mesh.ReplyMark, c.remember())
	if !c.refuse {
		b.WriteString("\t\t" + begins + " goto unheard\n")
	}
	b.WriteString(guardCame)
	if !c.refuse {
		fmt.Fprintf(&b, unheard, mesh.InboundPort)
	}
	if c.remembers() {
		b.WriteString(c.excludedClients() + innerExcluded)
	}
	return b.String()
}

// remember notes when a connection of an excluded destination begins, speaks and ends.
func (c Config) remember() string {
	if !c.remembers() {
		return ""
	}
	return "\t\ttcp flags & (fin | syn | rst | psh) != 0x0 jump inner_clients\n"
}

// excludedClients are those of inner connections whose client is an excluded destination.
func (c Config) excludedClients() string {
	var b strings.Builder
	b.WriteString("\n\t# Inner connections of clients that are excluded as destinations are remembered.\n\tchain inner_clients {\n")
	for _, e := range c.ExcludeOutbound {
		if match, ok := strings.CutSuffix(exclusion(e, "saddr", "sport"), " accept\n"); ok {
			b.WriteString(match + " goto inner_excluded\n")
		}
	}
	return b.String() + "\t}\n"
}

// innerExcluded remembers them as long as conntrack would.
const innerExcluded = `	chain inner_excluded {
		tcp flags & (fin | rst) != 0x0 goto inner_ends
		update @inner4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 5d }
		update @inner6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 5d }
	}
	chain inner_ends {
		update @inner4 { ip daddr . tcp dport . ip saddr . tcp sport timeout 10m }
		update @inner6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport timeout 10m }
	}
`

// arrivedDraining gives marks only.
const arrivedDraining = `
	chain arrived {
		type filter hook input priority -200; policy accept;
		meta l4proto tcp iif "lo" meta mark %#[1]x meta mark set %#[2]x
	}
`

const arrivedHead = `
	# Nothing begins from the network but at the proxy, or where it is left alone.
	chain arrived {
		type filter hook input priority -200; policy accept;
		meta l4proto != tcp accept
		iif "lo" goto arrived_over_lo
		tcp dport %[1]d goto guard_came
		` + begins + ` goto guard_begins
		meta mark 0 meta mark set %#[2]x
`

const arrivedTail = `	}

	# The proxy speaks to an application, whose socket takes this mark.
	chain arrived_over_lo {
		meta mark != %#[1]x accept
		` + begins + ` jump inner_begins
%[3]s		meta mark set %#[2]x
	}

	# Its client has proved to be there: what had the same ends before is over.
	chain inner_begins {
		delete @older4 { ip daddr . tcp dport . ip saddr . tcp sport }
		delete @older6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport }
	}

	# Conntrack has taken it for another one, and has not redirected it. One that is older than
	# the rules answers itself, if it is still there. Else it comes again within a second or two,
	# and has the other zone then.
	chain guard_begins {
		jump left_alone
		ip daddr . tcp dport . ip saddr . tcp sport @older4 add @came_late4 { ip daddr . tcp dport . ip saddr . tcp sport } accept
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @older6 add @came_late6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport } accept
		ip daddr . tcp dport . ip saddr . tcp sport @again4 goto guard_first_zone
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @again6 goto guard_first_zone
		add @again4 { ip daddr . tcp dport . ip saddr . tcp sport }
		add @again6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport }
		counter name incoming drop
	}
	chain guard_first_zone {
		delete @again4 { ip daddr . tcp dport . ip saddr . tcp sport }
		delete @again6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport }
		counter name incoming drop
	}
	chain guard_came {
		tcp flags & (fin | syn | rst) == 0x0 accept
`

const guardCame = `		tcp flags & (fin | rst) == 0x0 accept
		delete @came4 { tcp sport . ip saddr : tcp dport }
	}
`

// unheard is for the moment in which agent and proxy are both away, who have the
// listeners: a client whose SYN is lost sends it again after a second, one that is
// refused gives up. Any socket will do, also one in TIME_WAIT, which a client that uses
// its port again meets; "transparent" is what nft can ask of all of them.
const unheard = `
	# While nobody listens, a connection that was led here waits instead of being refused.
	chain unheard {
		socket transparent 0 return
		socket transparent 1 return
		ct status dnat tcp dport %d drop
	}
`
