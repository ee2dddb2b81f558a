package lab

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"tacit.dev/pod/netns"
)

// ruleset is what kube-proxy would have in a node: destination NAT from virtual
// addresses to endpoints, masquerade where a pod comes back to itself, refusal
// where nobody stands behind an address. The chains stay; only their rules are
// replaced, in one transaction, so that connections keep their translation.
func ruleset(all []virtual) string {
	const chains = `table inet lab {
	chain prerouting { type nat hook prerouting priority dstnat; policy accept; }
	chain output { type nat hook output priority -100; policy accept; }
	chain postrouting { type nat hook postrouting priority srcnat; policy accept; }
	chain forward { type filter hook forward priority filter; policy accept; }
	chain local { type filter hook output priority filter; policy accept; }
	chain services { }
	chain nobody { }
}
flush table inet lab
table inet lab {
	chain prerouting { jump services; }
	chain output { jump services; }
	chain forward { jump nobody; }
	chain local { jump nobody; }
	chain nobody {
		ip daddr %[1]s meta l4proto tcp reject with tcp reset
		ip6 daddr %[2]s meta l4proto tcp reject with tcp reset
	}
`
	var b strings.Builder
	fmt.Fprintf(&b, chains, services4, services6)
	b.WriteString("\tchain postrouting {\n" + hairpins(all) + "\t}\n\tchain services {\n")
	for _, v := range all {
		if len(v.endpoints) > 0 {
			b.WriteString(translation(v))
		}
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

func translation(v virtual) string {
	f := "ip"
	if v.address.Addr().Is6() {
		f = "ip6"
	}
	targets := make([]string, len(v.endpoints))
	for i, e := range v.endpoints {
		targets[i] = fmt.Sprintf("%d : %s . %d", i, e.Addr(), e.Port())
	}
	return fmt.Sprintf("\t\t%s daddr %s tcp dport %d dnat %s to numgen random mod %d map { %s }\n",
		f, v.address.Addr(), v.address.Port(), f, len(targets), strings.Join(targets, ", "))
}

// hairpins are the pods that may reach themselves through a service: the answer
// would never pass the node without a foreign source.
func hairpins(all []virtual) string {
	var v4, v6 []string
	for _, a := range endpointAddresses(all) {
		element := fmt.Sprintf("%s . %s", a, a)
		if a.Is4() {
			v4 = append(v4, element)
		} else {
			v6 = append(v6, element)
		}
	}
	var text string
	if len(v4) > 0 {
		text += fmt.Sprintf("\t\tct status dnat ip saddr . ip daddr { %s } masquerade\n", strings.Join(v4, ", "))
	}
	if len(v6) > 0 {
		text += fmt.Sprintf("\t\tct status dnat ip6 saddr . ip6 daddr { %s } masquerade\n", strings.Join(v6, ", "))
	}
	return text
}

func endpointAddresses(all []virtual) []netip.Addr {
	var out []netip.Addr
	for _, v := range all {
		for _, e := range v.endpoints {
			out = append(out, e.Addr())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// loadRules gives the text to nft inside a namespace.
func loadRules(ctx context.Context, ns *netns.NS, text string) error {
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("start nft (Debian: apt-get install nftables): %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("load the rules of services: %w: %s", err, said.String())
	}
	return nil
}
