package redirect

import (
	"fmt"
	"net/netip"
	"strings"
)

// Kinds are what the guard drops: a counter each.
//
//	reply         an application's reply to the proxy, about to leave the pod
//	untranslated  what the proxy sends, when nobody knows any more how to translate it
//	outgoing      to the network, of a connection that is none of those named
//	incoming      from the network, past the proxy
//	forwarded     of somebody else, through the pod; it is reset
//	link_local    a connection from an IPv6 link-local address; it is reset
//	other_address a connection to an address of the pod's that the mesh does not know; it is reset
//	source_port   a connection that an application opens from a port that is left alone on
//	              the way in; it is reset
func Kinds() []string {
	return []string{"reply", "untranslated", "outgoing", "incoming", "forwarded", "link_local", "other_address", "source_port"}
}

// maxFlows bounds what each set holds from the start.
const maxFlows = 16384

// A flow is a connection, as its socket in the pod sees it.
type flow struct{ local, remote netip.AddrPort }

func (f flow) reversed() flow { return flow{f.remote, f.local} }

// contents are what the sets of a table hold from the start. The kernel changes them
// afterwards, so they are no part of what is read back.
type contents struct {
	// older are connections from before the capture, captured those that go through the
	// proxy and that the rules would let pass otherwise: all of them when the capture ends,
	// else those that are excluded by now.
	older, captured []flow
	// again are clients of the proxy that came with the ends of a connection that conntrack
	// knew and had not redirected.
	again []flow
	// former are local ends of connections that an agent before the guard has redirected
	// by nat: they need conntrack.
	former []netip.AddrPort
	// came are clients of the proxy in IPv4, and the port that they came for: of local nothing
	// else counts.
	came []flow
}

// sets is the text of the sets.
func (in contents) sets(c Config) string {
	var b strings.Builder
	if !c.Drain {
		fmt.Fprintf(&b, "\tmap came4 { type inet_service . ipv4_addr : inet_service; flags dynamic,timeout; size 65536%s; }\n",
			elements(in.came, false, flow.came))
	}
	for _, is6 := range []bool{false, true} {
		addr, n := "ipv4_addr", 4
		if is6 {
			addr, n = "ipv6_addr", 6
		}
		tuple := fmt.Sprintf("type %s . inet_service . %[1]s . inet_service; flags dynamic; size 65536", addr)
		end := fmt.Sprintf("type %s . inet_service; flags dynamic; size 65536", addr)
		fmt.Fprintf(&b, "\tset captured%d { %s%s; }\n", n, tuple, elements(in.captured, is6, flow.tuple))
		fmt.Fprintf(&b, "\tset again%d { %s%s; }\n", n, tuple, elements(in.again, is6, flow.tuple))
		if !c.Drain {
			fmt.Fprintf(&b, "\tset older%d { %s%s; }\n", n, tuple, elements(in.older, is6, flow.tuple))
		}
		if !c.Drain {
			fmt.Fprintf(&b, "\tset came_late%d { %s; }\n", n, tuple)
		}
		if !c.Drain && c.remembers() {
			fmt.Fprintf(&b, "\tset inner%d { type %s . inet_service . %[2]s . inet_service; flags dynamic,timeout; size 65536; }\n", n, addr)
		}
		fmt.Fprintf(&b, "\tset former%d { %s%s; }\n", n, end, elements(ends(in.former), is6, flow.end))
	}
	return b.String()
}

// kept reports whether the sets that only we fill have elements.
func (in contents) kept() bool { return len(in.captured)+len(in.older)+len(in.former) > 0 }

func ends(all []netip.AddrPort) []flow {
	flows := make([]flow, len(all))
	for i, a := range all {
		flows[i] = flow{a, a}
	}
	return flows
}

func elements(flows []flow, is6 bool, text func(flow) string) string {
	var all []string
	seen := make(map[string]bool)
	for _, f := range flows {
		if t := text(f); f.local.Addr().Is6() == is6 && !seen[t] && len(all) < maxFlows {
			seen[t] = true
			all = append(all, t)
		}
	}
	if len(all) == 0 {
		return ""
	}
	return "; elements = { " + strings.Join(all, ", ") + " }"
}

// most returns so many of flows as a set holds from the start, and the others.
func most(flows []flow) (held, others []flow) {
	count := make(map[bool]int)
	seen := make(map[flow]bool, len(flows))
	for _, f := range flows {
		is6 := f.local.Addr().Is6()
		switch {
		case seen[f]:
			continue
		case count[is6] < maxFlows:
			held = append(held, f)
		default:
			others = append(others, f)
		}
		seen[f] = true
		count[is6]++
	}
	return held, others
}

func (f flow) tuple() string { return f.end() + " . " + endText(f.remote) }

func (f flow) end() string { return endText(f.local) }

// came is the client's end, and the port that it came for.
func (f flow) came() string {
	return fmt.Sprintf("%d . %s timeout 1d : %d", f.remote.Port(), f.remote.Addr().WithZone(""), f.local.Port())
}

func endText(a netip.AddrPort) string {
	return fmt.Sprintf("%s . %d", a.Addr().WithZone(""), a.Port())
}

// sourcePort resets a connection that an application opens from a port whose answers are
// left alone: the middle of it could not be told from such an answer.
func sourcePort(c Config) string {
	var b strings.Builder
	b.WriteString("\tchain source_port {\n")
	for _, line := range strings.Split(strings.TrimSuffix(ports(c, "daddr", "sport"), "\n"), "\n") {
		if match, ok := strings.CutSuffix(line, " accept"); ok {
			b.WriteString(match + " goto source_port_reset\n")
		}
	}
	b.WriteString("\t}\n\tchain source_port_reset {\n\t\tcounter name source_port meta l4proto tcp reject with tcp reset\n\t}\n")
	return b.String()
}
