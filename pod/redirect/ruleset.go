// Package redirect holds the kernel rules that lead a pod's connections into the
// proxy's listeners, and an application's replies back to the proxy, and that stop
// whatever would get around them. It is the pod's own network namespace that gets
// them: one nftables table, "inet tacit", and one routing table for what is led to lo.
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
	// Own are the addresses at which the mesh knows the pod. At others of the pod's nobody
	// would speak TLS, so what comes there is refused. None means that it is not known.
	Own []netip.Addr
	// Drain captures nothing new, and keeps what was captured alive: a pod on
	// its way out.
	Drain bool

	// node is where the pod's node calls from, sorted.
	node []netip.Addr
	// bridges lets pass what bridges pass on, and from one to the other: all of them lead to
	// nothing but what is within the pod.
	bridges bool
	// leading are the interfaces from where what the pod forwards can be led to the proxy; ways
	// are those with a default route: what comes in there is not the pod's. Both sorted.
	leading, ways []string
	// refuse leaves out what needs nft_socket, which the kernel does not have:
	// connections do not wait while nobody accepts them, and do not outlive conntrack.
	refuse bool
}

// Ruleset is the whole table as nft reads it, as one transaction: it replaces
// the one that is there, if one is. Adding the table before deleting it is how
// nft deletes what may not exist.
func Ruleset(c Config) string { return ruleset(c, contents{}) }

// ruleset is Ruleset with what its sets hold from the start.
func ruleset(c Config, in contents) string {
	var b strings.Builder
	fmt.Fprintf(&b, head, mesh.Mark, mesh.ReplyMark, mesh.ResetMark)
	for _, kind := range Kinds() {
		fmt.Fprintf(&b, "\tcounter %s {}\n", kind)
	}
	b.WriteString(in.sets(c.Drain))
	fmt.Fprintf(&b, inner, mesh.Mark, mesh.ReplyMark)
	if c.Drain {
		b.WriteString(led(c))
		fmt.Fprintf(&b, drain, mesh.Mark, mesh.ReplyMark, mesh.InboundPort, leadMark, passMark)
		b.WriteString(guardOut(drainGuard))
		fmt.Fprintf(&b, passed+"\t}\n", leadMark, c.notLeading())
		fmt.Fprintf(&b, throughChains, leadMark)
		b.WriteString("}\n")
		return b.String()
	}
	b.WriteString(named(c))
	fmt.Fprintf(&b, outbound, mesh.Mark, mesh.ReplyMark, mesh.InboundPort, mesh.ResetMark, olderMark, leadMark, passMark)
	b.WriteString(led(c))
	b.WriteString(inbound(c))
	b.WriteString(guardOut(captureGuard))
	fmt.Fprintf(&b, forward, mesh.ResetMark, c.onBridges(bridging), c.ofOthers(), c.published())
	fmt.Fprintf(&b, passed+pass, leadMark, c.notLeading(), passMark)
	fmt.Fprintf(&b, throughChains, leadMark)
	b.WriteString(guardIn(c))
	if !c.refuse {
		fmt.Fprintf(&b, unheard, mesh.InboundPort)
	}
	b.WriteString("}\n")
	return b.String()
}

// named are chains that accept what is left alone, by the direction of a packet.
func named(c Config) string {
	var b strings.Builder
	b.WriteString("\n\t# What is left alone: connections to an excluded destination, and their answers.\n\tchain excluded {\n")
	for _, e := range c.ExcludeOutbound {
		b.WriteString(exclusion(e, "daddr", "dport"))
	}
	b.WriteString("\t}\n\tchain excluded_answers {\n")
	for _, e := range c.ExcludeOutbound {
		b.WriteString(exclusion(e, "saddr", "sport"))
	}
	b.WriteString("\t}\n\n\t# Connections to an excluded port, and to a probed one from the node, and their answers.\n\tchain left_alone {\n")
	b.WriteString(ports(c, "saddr", "dport"))
	b.WriteString("\t}\n\tchain answers {\n")
	b.WriteString(ports(c, "daddr", "sport"))
	b.WriteString("\t}\n")
	b.WriteString(sourcePort(c))
	return b.String()
}

// ports accepts what goes to a port that is left alone, or comes from there.
func ports(c Config, addr, port string) string {
	var b strings.Builder
	for _, p := range c.ExcludeInbound {
		fmt.Fprintf(&b, "\t\ttcp %s %d accept\n", port, p)
	}
	for _, a := range c.node {
		for _, p := range c.ProbePorts {
			fmt.Fprintf(&b, "\t\t%s %s %s tcp %s %d accept\n", familyOf(a), addr, a, port, p)
		}
	}
	return b.String()
}

// exclusion is the rule that leaves e alone. An exclusion of everything is none.
func exclusion(e mesh.Exclusion, addr, port string) string {
	var match []string
	if e.Prefix.IsValid() {
		match = append(match, fmt.Sprintf("%s %s %s", familyOf(e.Prefix.Addr()), addr, e.Prefix.Masked()))
	}
	if e.Port != 0 {
		match = append(match, fmt.Sprintf("tcp %s %d", port, e.Port))
	}
	if len(match) == 0 {
		return ""
	}
	if e.Port == 0 { // nothing else says that it is TCP
		match = append(match, "meta l4proto tcp")
	}
	return "\t\t" + strings.Join(match, " ") + " accept\n"
}

func familyOf(a netip.Addr) string {
	if a.Is6() {
		return "ip6"
	}
	return "ip"
}

// begins matches the first packet of a connection, opens also the answer to it.
const (
	begins = "tcp flags & (fin | syn | rst | ack) == syn"
	opens  = "tcp flags & syn == syn"
)

// olderMark is of conntrack, on connections that are older than the rules and that the pod
// itself translates.
const olderMark = 0x72c1a

// head begins the transaction. The table that holds new connections back while the rules
// change goes with it (see Kernel.swap).
const head = `# Tacit. Marks: %#[1]x on what the proxy dials, %#[2]x on what is led to the proxy over lo,
# %#[3]x on resets that the kernel itself answers the network with.
add table inet tacit_hold
delete table inet tacit_hold
add table inet tacit
delete table inet tacit
table inet tacit {
	# What the guard has dropped, by kind.
`

// inner is what a pod has as long as one connection goes through the proxy.
//
// The order of the hooks on the way out is raw (-300), conntrack (-200), mangle
// (-150), nat (-100); in nat output only numbers are understood by nft 1.0.
const inner = `
	# An inner connection (proxy to application) has the client's own address, and
	# may have the client's port. Its zone keeps it apart from the outer one.
	chain inner_zone {
		type filter hook output priority -310; policy accept;
		meta mark %#[1]x oifname "lo" ct original zone set 1
	}

	# What came with the ends of a connection that conntrack knows and has not redirected
	# (chain guard_begins) has a zone, too: there it is new.
	chain again_zone {
		type filter hook prerouting priority -310; policy accept;
		iifname "lo" accept
		ip daddr . tcp dport . ip saddr . tcp sport @again4 ct original zone set 2
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @again6 ct original zone set 2
	}

	# The application's replies on an inner connection go to a foreign address, and
	# have to come back over lo. The socket has its mark from the first packet (chain
	# led; tcp_fwmark_accept). Where the application sets another, conntrack remembers it.
	chain inner_route {
		type route hook output priority -150; policy accept;
		meta mark %#[1]x oifname "lo" ct mark set %#[2]x
		ct direction reply ct mark %#[2]x meta mark set %#[2]x
	}
`

// outbound needs no conntrack: nothing is translated, and which packets are led to lo
// follows from each packet alone. What is none of the named goes there, whatever it is: in
// the middle of a connection it finds the proxy's socket, or is reset.
const outbound = `
	# From the application to the network: led to the proxy over lo, but for what is named.
	chain outbound {
		type route hook output priority -300; policy accept;
		meta l4proto != tcp accept
		meta mark %#[1]x accept
		meta mark %#[6]x meta mark set %#[7]x accept
		tcp sport %[3]d accept
		meta mark %#[4]x tcp flags & rst == rst accept
		meta mark %#[2]x fib saddr type != local fib daddr type local notrack accept
		meta mark %#[2]x accept
		fib daddr type local accept
		tcp flags & rst == rst fib saddr type != local meta mark set %#[7]x accept comment "the pod's own rules refuse what it forwards"
		ip saddr . tcp sport . ip daddr . tcp dport @captured4 jump outbound_captured
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @captured6 jump outbound_captured
		jump excluded
		` + begins + ` goto outbound_begins
		` + opens + ` ip saddr . tcp sport . ip daddr . tcp dport @older4 goto outbound_late
		` + opens + ` ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 goto outbound_late
		ip saddr . tcp sport . ip daddr . tcp dport @older4 accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept
		ip saddr . tcp sport @former4 accept
		ip6 saddr . tcp sport @former6 accept
		jump answers
		notrack meta mark set %#[2]x
	}

	# A new connection has nothing in common with an older one of the same ports. One that
	# comes from a port whose answers are left alone could not be told from those.
	chain outbound_begins {
		delete @older4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @older6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		delete @former4 { ip saddr . tcp sport }
		delete @former6 { ip6 saddr . tcp sport }
		jump source_port
		notrack meta mark set %#[2]x
	}

	# An application answers who comes with the ends of an older connection (chain guard_begins):
	# that is over. The client comes again, and is led to the proxy.
	chain outbound_late {
		jump answers
		delete @older4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @older6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		add @again4 { ip saddr . tcp sport . ip daddr . tcp dport }
		add @again6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		notrack meta mark set %#[2]x
	}

	# What was captured before it was excluded stays captured until it ends, or until its ends
	# are those of another one, which the pod opens or answers.
	chain outbound_captured {
		` + opens + ` goto outbound_ended
		notrack meta mark set %#[2]x accept
	}
	chain outbound_ended {
		delete @captured4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @captured6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
	}
	chain outbound_nat {
		type nat hook output priority -100; policy accept;
	}

	# An older connection that the pod itself translates has another end when it leaves.
	chain outbound_older {
		type filter hook output priority 0; policy accept;
		ct status dnat ip saddr . tcp sport . ip daddr . tcp dport @older4 ct mark set %#[5]x
		ct status dnat ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 ct mark set %#[5]x
	}
`

// drain lets pass what begins, and keeps what was captured. The nat hooks stay
// registered: without them the kernel would no longer translate what was redirected.
const drain = `
	# Nothing new is captured. What was is led to the proxy until it ends, or until its ends
	# are those of another one, which the pod opens or answers.
	chain outbound {
		type route hook output priority -300; policy accept;
		meta l4proto != tcp accept
		meta mark %#[1]x accept
		meta mark %#[4]x meta mark set %#[5]x accept
		tcp sport %[3]d accept
		meta mark %#[2]x fib saddr type != local fib daddr type local notrack accept
		meta mark %#[2]x accept
		fib daddr type local accept
		` + opens + ` goto outbound_begins
		ip saddr . tcp sport . ip daddr . tcp dport @captured4 notrack meta mark set %#[2]x
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @captured6 notrack meta mark set %#[2]x
	}
	chain outbound_begins {
		delete @captured4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @captured6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		delete @former4 { ip saddr . tcp sport }
		delete @former6 { ip6 saddr . tcp sport }
	}
	chain outbound_nat {
		type nat hook output priority -100; policy accept;
	}
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
	}
`

// led is what arrives for the proxy. The application's socket of an inner connection
// takes its mark from the first packet that it gets (tcp_fwmark_accept), and a reset that no
// socket sends takes the mark of what it answers (fwmark_reflect).
func led(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, ledOverLo, mesh.Mark, mesh.ReplyMark, mesh.OutboundPort, leadMark, mesh.ResetMark)
	if c.Drain {
		return b.String() + "\tchain inner_begins {\n\t}\n\tchain from_network {\n\t}\n"
	}
	b.WriteString(innerBegins)
	fmt.Fprintf(&b, fromNetwork, mesh.ResetMark)
	b.WriteString(otherAddress(c))
	return b.String()
}

const ledOverLo = `
	# What arrives over lo: connections for the proxy, and its own for an application,
	# whose socket takes this mark.
	chain led {
		type filter hook prerouting priority -150; policy accept;
		meta l4proto != tcp accept
		iifname != "lo" goto from_network
		meta mark %#[1]x ` + begins + ` jump inner_begins
		meta mark %#[1]x meta mark set %#[2]x accept
		meta mark %#[4]x goto led_through
		meta mark %#[2]x ` + begins + ` goto to_proxy
	}

	# What the pod forwards as its own comes here when it was about to leave. What it forwards
	# by the addresses of others is reset.
	chain led_through {
		fib saddr type != local meta mark set %#[5]x counter name forwarded meta l4proto tcp reject with tcp reset
		` + begins + ` goto to_proxy
	}
	chain led_untracked {
		type filter hook prerouting priority -300; policy accept;
		iifname "lo" meta mark %#[4]x notrack
	}
	chain to_proxy {
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:%[3]d accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:%[3]d accept
		drop comment "nobody listens: it comes again"
	}
`

const innerBegins = `
	# Its client has proved to be there: what had the same ends before is over.
	chain inner_begins {
		delete @older4 { ip daddr . tcp dport . ip saddr . tcp sport }
		delete @older6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport }
	}
`

const fromNetwork = `
	# A link-local address is nobody's that could be known: two pods of the mesh would speak
	# in clear. So who is captured takes no connection from there.
	chain from_network {
		fib daddr type != local accept
		` + begins + ` goto from_network_begins
		meta mark 0 meta mark set %#[1]x
	}
	chain from_network_begins {
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
		iifname "lo" accept
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
		oifname "lo" accept
		tcp sport %[1]d meta nfproto ipv4 snat to :tcp dport . ip daddr map @came4
	}
`

// guardOut is the last chain that a packet meets on its way out of the pod.
func guardOut(rest string) string {
	return fmt.Sprintf(guardHead, mesh.ReplyMark, mesh.OutboundPort, mesh.InboundPort, mesh.Mark, passMark) + rest + "\t}\n" + guardOpens
}

const guardHead = `
	# Nothing leaves the pod over TCP but what is named.
	chain guard {
		type filter hook postrouting priority 300; policy accept;
		meta l4proto != tcp accept
		oifname "lo" accept
		iif != 0 accept comment "forwarded: guard_forward has judged it"
		meta mark %#[5]x accept
		meta mark %#[1]x counter name reply drop
		meta mark %#[4]x accept
		meta l4proto tcp ct status dnat ct direction reply ct reply proto-src %[3]d accept
		meta l4proto tcp ct status snat ct direction original ct original proto-src %[3]d accept
		meta l4proto tcp ct direction reply ct original proto-dst %[3]d accept comment "who dials the proxy itself is refused by it"
		tcp sport %[2]d counter name untranslated drop
		tcp sport %[3]d counter name untranslated drop
`

const guardOpens = `	chain guard_opens {
		delete @captured4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @captured6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
	}
`

// capturedGuard stops what is left of a captured connection. Nat may have given another one
// its ends only now: so they are no longer a captured one's.
const capturedGuard = `		` + opens + ` jump guard_opens
		ip saddr . tcp sport . ip daddr . tcp dport @captured4 counter name outgoing drop
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @captured6 counter name outgoing drop
`

var captureGuard = fmt.Sprintf(`		meta mark %#x tcp flags & rst == rst accept
`+capturedGuard+`		jump excluded
		`+begins+` counter name outgoing drop
		ip saddr . tcp sport . ip daddr . tcp dport @older4 accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept
		ct mark %#x ct status dnat accept
		jump answers
		counter name outgoing drop
`, mesh.ResetMark, olderMark)

const drainGuard = capturedGuard + `		` + begins + ` accept
		ip saddr . tcp sport @former4 counter name outgoing drop
		ip6 saddr . tcp sport @former6 counter name outgoing drop
`

// guardIn stops what would reach an application past the proxy: a connection that
// conntrack takes for an old one, and so does not redirect.
func guardIn(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, guardInHead, mesh.InboundPort)
	if !c.refuse {
		fmt.Fprintf(&b, "\t\tsocket mark %#x counter name incoming drop\n", mesh.ReplyMark)
	}
	b.WriteString(guardInTail)
	return b.String()
}

const guardInHead = `
	# Nothing begins from the network but at the proxy, or where it is left alone.
	chain guard_in {
		type filter hook input priority 0; policy accept;
		meta l4proto != tcp accept
		iifname "lo" accept
		tcp dport %[1]d goto guard_came
		` + begins + ` goto guard_begins
`

const guardInTail = `	}
	# Conntrack has taken it for another one, and has not redirected it. One that is older than
	# the rules answers itself, if it is still there. Else it comes again within a second or two,
	# and has the other zone then.
	chain guard_begins {
		jump left_alone
		ip daddr . tcp dport . ip saddr . tcp sport @older4 accept
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @older6 accept
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
		tcp flags & (fin | rst) == 0x0 accept
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
		type filter hook input priority 0; policy accept;
		` + begins + ` goto unheard_begins
	}
	chain unheard_begins {
		socket transparent 0 return
		socket transparent 1 return
		ct status dnat tcp dport %d drop
	}
`
