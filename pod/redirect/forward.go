package redirect

import (
	"fmt"
	"strings"
)

// forward judges what is not the pod's own. What goes out is led to the proxy, where the kernel can; what comes in from the
// network is stopped. Exclusions hold for both.
const forward = `
	# What the pod forwards for others would leave in clear, unless it is excluded or older.
	chain guard_forward {
		type filter hook forward priority 300; policy accept;
		meta l4proto != tcp accept
%[2]s		jump excluded
		jump excluded_answers
%[4]s		` + begins + ` goto forward_begins
		ip saddr . tcp sport . ip daddr . tcp dport @older4 accept
		ip daddr . tcp dport . ip saddr . tcp sport @older4 accept
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept
		ip6 daddr . tcp dport . ip6 saddr . tcp sport @older6 accept
		goto of_others
	}
	chain forward_begins {
		delete @older4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @older4 { ip daddr . tcp dport . ip saddr . tcp sport }
		delete @older6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
		delete @older6 { ip6 daddr . tcp dport . ip6 saddr . tcp sport }
		goto of_others
	}
	chain of_others {
%[3]s		meta mark set %#[1]x counter name forwarded meta l4proto tcp reject with tcp reset
	}
`

// What bridges within the pod pass on, and from one to the other, does not leave it. A rule
// of postrouting does not see that a packet is a bridge's, so this marks it for the guard.
var bridging = fmt.Sprintf("\t\tmeta iifkind \"bridge\" meta oifkind \"bridge\" meta mark set %#x accept\n", passMark)

func (c Config) onBridges(rule string) string {
	if c.bridges {
		return rule
	}
	return ""
}

// forwarded is what the guard does with what it has judged in guard_forward.
const forwarded = `
	# Forwarded: guard_forward has judged it. What was captured is led to the proxy.
	chain forwarded {
		jump through
		meta mark %#[1]x%[2]s counter name forwarded drop
		meta mark %#[1]x accept
`

// throughChains find what was captured, whatever is excluded since. Its addresses are those that
// it leaves with.
const throughChains = `	chain through {
		` + begins + ` goto through_begins
		ip saddr . tcp sport . ip daddr . tcp dport @captured4 meta mark set %#[1]x
		ip6 saddr . tcp sport . ip6 daddr . tcp dport @captured6 meta mark set %#[1]x
	}
	chain through_begins {
		delete @captured4 { ip saddr . tcp sport . ip daddr . tcp dport }
		delete @captured6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
	}
`

// ofOthers has what is forwarded led to the proxy, when it has passed the pod's own rules and
// is translated; but for what comes from where the pod's network is, or goes to what is within.
func (c Config) ofOthers() string {
	if len(c.leading) == 0 {
		return ""
	}
	var b strings.Builder
	for _, way := range c.ways {
		fmt.Fprintf(&b, "\t\tiifname %q goto refuse_forwarded\n", way)
	}
	fmt.Fprintf(&b, "\t\t%s goto refuse_forwarded\n\t\tmeta mark set %#x accept\n\t}\n\tchain refuse_forwarded {\n", c.notLeading()[1:], leadMark)
	return b.String()
}

// published leaves alone what comes to an excluded port that the pod itself leads on to what is
// within it.
func (c Config) published() string {
	var b strings.Builder
	for _, p := range c.ExcludeInbound {
		fmt.Fprintf(&b, "\t\tmeta l4proto tcp ct status dnat ct original proto-dst %d accept\n", p)
	}
	return b.String()
}

// notLeading matches what leaves by an interface from where nothing is led to the proxy.
func (c Config) notLeading() string {
	if len(c.leading) == 0 {
		return ""
	}
	return fmt.Sprintf(` oifname != { "%s" }`, strings.Join(c.leading, `", "`))
}
