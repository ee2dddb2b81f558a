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
	"regexp"
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
	// kept says that the sets that only we fill, of what was there before the rules, are not
	// empty. No packet adds to them: so where they are, what asks for them is left out.
	kept bool
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
	c.kept = c.kept || in.kept()
	text := whole(c, in)
	if c.kept {
		return text
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !ofKept.MatchString(line) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// ofKept matches rules that do nothing while the sets that only we fill are empty. (A connection
// comes late to an older one.)
var ofKept = regexp.MustCompile(`(?m)@(captured|older|former|came_late)[46]|jump (outbound_kept|guard_opens|inner_begins|through)$`)

func whole(c Config, in contents) string {
	var b strings.Builder
	fmt.Fprintf(&b, head, mesh.Mark, mesh.ReplyMark, mesh.ResetMark)
	for _, kind := range Kinds() {
		fmt.Fprintf(&b, "\tcounter %s {}\n", kind)
	}
	b.WriteString(in.sets(c))
	if c.Drain {
		fmt.Fprintf(&b, drain, mesh.Mark, mesh.ReplyMark, mesh.InboundPort, leadMark, passMark)
		b.WriteString(arriving(c))
		fmt.Fprintf(&b, arrivedDraining, mesh.Mark, mesh.ReplyMark)
		b.WriteString(guardOut(c, drainGuard))
		b.WriteString("}\n")
		return b.String()
	}
	b.WriteString(named(c))
	b.WriteString(outbound(c))
	b.WriteString(arriving(c))
	b.WriteString(inbound(c))
	b.WriteString(arrived(c))
	b.WriteString(guardOut(c, captureGuard))
	fmt.Fprintf(&b, forward, mesh.ResetMark, c.onBridges(bridging), c.ofOthers(), c.published())
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

// outbound needs no conntrack: nothing is translated, and which packets are led to lo
// follows from each packet alone. What is none of the named goes there, whatever it is: in
// the middle of a connection it finds the proxy's socket, or is reset.
//
// Each packet of each connection pays for each rule that it meets, and for each base chain. So
// what the proxy and the application of an inner connection send meets its rule first, and by
// its mark; and what asks for routes, sets or conntrack comes last.
func outbound(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, outboundHead, mesh.Mark, mesh.ReplyMark, mesh.InboundPort, leadMark, passMark)
	if c.remembers() {
		fmt.Fprintf(&b, outboundInner, mesh.ReplyMark)
	}
	fmt.Fprintf(&b, outboundTail, mesh.ReplyMark, mesh.ResetMark, passMark)
	if c.kept {
		fmt.Fprintf(&b, outboundOlder, olderMark)
	}
	return b.String()
}

// remembers reports whether there is a set of inner connections. Their sockets have a mark,
// which leads over lo what the application sends. But an application that may set marks may
// give its socket another one, and then it must not be taken for one of its own connections
// to an excluded destination.
func (c Config) remembers() bool { return len(c.ExcludeOutbound) > 0 }

const outboundHead = `
	# From the application to the network: led to the proxy over lo, but for what is named.
	# Conntrack does not follow what stays on lo.
	chain outbound {
		type route hook output priority -300; policy accept;
		meta l4proto != tcp accept
		meta mark %#[1]x oif "lo" notrack accept
		meta mark %#[2]x notrack accept
		meta mark %#[1]x accept
		tcp sport %[3]d accept
		meta mark %#[4]x meta mark set %#[5]x accept
		oif "lo" fib daddr type local accept
`

const outboundInner = `		ip saddr . tcp sport . ip daddr . tcp dport @inner4 notrack meta mark set %#[1]x accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @inner6 notrack meta mark set %#[1]x accept
`

const outboundTail = `		tcp flags & (syn | rst) != 0x0 jump outbound_opens
		jump outbound_kept
		jump excluded
		jump answers
		notrack meta mark set %#[1]x
	}

	# What was captured before it was excluded stays captured until it ends. What is older goes on.
	chain outbound_kept {
		ip saddr . tcp sport . ip daddr . tcp dport @captured4 notrack meta mark set %#[1]x accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @captured6 notrack meta mark set %#[1]x accept
		ip saddr . tcp sport . ip daddr . tcp dport @older4 accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept
		ip saddr . tcp sport @former4 accept
		ip6 saddr . tcp sport @former6 accept
	}

	# Resets, and what the pod opens or answers: another one with the ends of a captured
	# connection ends that.
	chain outbound_opens {
		meta mark %#[2]x tcp flags & rst == rst accept
		tcp flags & rst == rst fib saddr type != local meta mark set %#[3]x accept comment "the pod's own rules refuse what it forwards"
		tcp flags & rst == rst return
		delete @captured4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @captured6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		jump excluded
		` + begins + ` goto outbound_begins
		ip saddr . tcp sport . ip daddr . tcp dport @older4 goto outbound_late
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 goto outbound_late
	}

	# A new connection has nothing in common with an older one of the same ports. One that
	# comes from a port whose answers are left alone could not be told from those.
	chain outbound_begins {
		delete @older4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @older6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		delete @former4 { ip saddr . tcp sport }
		delete @former6 { ip6 saddr . tcp sport }
		jump source_port
		notrack meta mark set %#[1]x accept
	}

	# An application answers who comes with the ends of an older connection (chain guard_begins):
	# that is over. The client comes again, and is led to the proxy. If it has been led there
	# already, conntrack must not take it for yet another one.
	chain outbound_late {
		jump answers
		delete @older4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @older6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		ip saddr . tcp sport . ip daddr . tcp dport @came_late4 add @again4 { ip saddr . tcp sport . ip daddr . tcp dport }
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @came_late6 add @again6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		delete @came_late4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @came_late6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		notrack meta mark set %#[1]x accept
	}
`

// outboundOlder is a chain of its own, since it is after conntrack.
const outboundOlder = `
	# An older connection that the pod itself translates has another end when it leaves.
	chain outbound_older {
		type filter hook output priority 0; policy accept;
		ct status dnat ip saddr . tcp sport . ip daddr . tcp dport @older4 ct mark set %#[1]x
		ct status dnat ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 ct mark set %#[1]x
	}
`

// drain lets pass what begins, and keeps what was captured. The nat hook stays
// registered: without one the kernel would no longer translate what was redirected.
const drain = `
	# Nothing new is captured. What was is led to the proxy until it ends, or until its ends
	# are those of another one, which the pod opens or answers.
	chain outbound {
		type route hook output priority -300; policy accept;
		meta l4proto != tcp accept
		meta mark %#[1]x oif "lo" notrack accept
		meta mark %#[2]x notrack accept
		meta mark %#[1]x accept
		tcp sport %[3]d accept
		meta mark %#[4]x meta mark set %#[5]x accept
		oif "lo" fib daddr type local accept
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
	chain inbound {
		type nat hook prerouting priority -100; policy accept;
	}
`

// guardOut is the last chain that a packet meets on its way out of the pod. What it lets pass it
// marks for the gate. The marks come first, and what asks conntrack comes after them.
func guardOut(c Config, rest string) string {
	var b strings.Builder
	fmt.Fprintf(&b, guardHead, mesh.ReplyMark, mesh.OutboundPort, mesh.InboundPort, mesh.Mark, passMark)
	b.WriteString(rest + "\t}\n" + guardOpens)
	fmt.Fprintf(&b, forwarded, leadMark, c.notLeading())
	if !c.Drain {
		fmt.Fprintf(&b, "\t\tmeta mark set %#x\n", passMark)
	}
	fmt.Fprintf(&b, "\t}\n"+throughChains, leadMark)
	return b.String()
}

const guardHead = `
	# Nothing leaves the pod over TCP but what is named. What passes has a mark, by which it may
	# leave by the gate, which stands where a flush of rules does not reach.
	chain guard {
		type filter hook postrouting priority 310; policy accept;
		meta l4proto != tcp accept
		oif "lo" accept
		iif != 0 goto forwarded
		meta mark %#[4]x accept comment "the gate knows this mark, too"
		meta mark %#[5]x accept
		meta mark %#[1]x counter name reply drop
		meta l4proto tcp ct status dnat ct direction reply ct reply proto-src %[3]d meta mark set %#[5]x accept
		meta l4proto tcp ct status snat ct direction original ct original proto-src %[3]d meta mark set %#[5]x accept
		meta l4proto tcp ct direction reply ct original proto-dst %[3]d meta mark set %#[5]x accept comment "who dials the proxy itself is refused by it"
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

// captureGuard ends with a drop: so what it accepts is marked before.
var captureGuard = fmt.Sprintf(`		meta mark %#[1]x tcp flags & rst == rst meta mark set %#[2]x accept
`+capturedGuard+`		meta mark set %#[2]x
		jump excluded
		`+begins+` counter name outgoing drop
		ip saddr . tcp sport . ip daddr . tcp dport @older4 accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept
		ct mark %#[3]x ct status dnat accept
		jump answers
		counter name outgoing drop
`, mesh.ResetMark, passMark, olderMark)

const drainGuard = capturedGuard + `		` + begins + ` accept
		ip saddr . tcp sport @former4 counter name outgoing drop
		ip6 saddr . tcp sport @former6 counter name outgoing drop
`
