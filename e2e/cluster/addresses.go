package cluster

import (
	"fmt"
	"net/netip"
	"strings"
)

// The addresses of every cluster: they are in namespaces of its own, so all
// clusters use the same.
const (
	controlPlane4 = "172.30.0.1"
	controlPlane6 = "fd00:172:30::1"
	apiService4   = "10.96.0.1"
	dnsService4   = "10.96.0.10"
	apiPort       = 6443
	nodeBits4     = 24
	nodeBits6     = 64
)

// family is a list of one or two: IPv4, then IPv6 in a dual-stack cluster.
func (o Options) family(four, six string) string {
	if o.DualStack {
		return four + "," + six
	}
	return four
}

func (o Options) serviceCIDRs() string { return o.family("10.96.0.0/16", "fd00:10:96::/112") }
func (o Options) podCIDRs() string     { return o.family("10.244.0.0/16", "fd00:10:244::/48") }

// controlPlaneAddresses are the bridge's.
func (o Options) controlPlaneAddresses() []netip.Prefix {
	return prefixes(o.family(fmt.Sprintf("%s/%d", controlPlane4, nodeBits4), fmt.Sprintf("%s/%d", controlPlane6, nodeBits6)))
}

// nodeAddresses are a node's own, with the length of the network's prefix.
func (o Options) nodeAddresses(number int) []netip.Prefix {
	return prefixes(o.family(fmt.Sprintf("172.30.0.%d/%d", 10+number, nodeBits4), fmt.Sprintf("fd00:172:30::%x/%d", 10+number, nodeBits6)))
}

// nodePodCIDRs are where a node's pods have their addresses.
func (o Options) nodePodCIDRs(number int) []netip.Prefix {
	return prefixes(o.family(fmt.Sprintf("10.244.%d.0/24", number), fmt.Sprintf("fd00:10:244:%x::/64", number)))
}

func prefixes(list string) []netip.Prefix {
	var all []netip.Prefix
	for p := range strings.SplitSeq(list, ",") {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

// addresses are the prefixes' addresses, joined by commas as flags want them.
func addresses(list []netip.Prefix) string {
	var all []string
	for _, p := range list {
		all = append(all, p.Addr().String())
	}
	return strings.Join(all, ",")
}

// sysctls make a router of a machine. A kernel without IPv6 does not have its
// settings.
func (o Options) sysctls() map[string]string {
	s := map[string]string{
		"ipv4/ip_forward": "1", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
		"ipv4/conf/all/route_localnet": "1", // NodePort and hostPort on 127.0.0.1
	}
	if o.DualStack {
		s["ipv6/conf/all/forwarding"] = "1"
	}
	return s
}
