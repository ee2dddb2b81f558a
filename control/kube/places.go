package kube

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"tacit.dev/mesh"
)

const (
	// widest4 and widest6 are the shortest prefixes that are taken for ranges of the
	// cluster: what is in a range and nobody's cannot be dialled.
	widest4 = 8
	widest6 = 16
)

// places takes in which addresses are nodes', and out of which ranges pods and services get
// theirs, and ports of nodes.
func (b *builder) places(o Objects) {
	cluster := &mesh.Place{Name: b.workloadUID("/Cluster", "ranges", "all"), Ranges: slices.Clone(b.cfg.Ranges), NodePorts: b.cfg.NodePorts}
	for _, c := range o.ServiceCIDRs {
		for _, text := range c.Spec.CIDRs {
			b.addRange(cluster, text, "ServiceCIDR", c.Name)
		}
	}
	slices.SortFunc(cluster.Ranges, netip.Prefix.Compare)
	cluster.Ranges = slices.Compact(cluster.Ranges)
	if len(cluster.Ranges) > 0 || cluster.NodePorts != (mesh.NodePorts{}) {
		b.result.Places = append(b.result.Places, cluster)
	}
	for _, n := range o.Nodes {
		p := &mesh.Place{Name: b.workloadUID("/Node", "", n.Name), Node: n.Name, Addresses: nodeAddresses(n)}
		texts := n.Spec.PodCIDRs
		if len(texts) == 0 && n.Spec.PodCIDR != "" {
			texts = []string{n.Spec.PodCIDR}
		}
		for _, text := range texts {
			b.addRange(p, text, "Node", n.Name)
		}
		if len(p.Addresses)+len(p.Ranges) > 0 {
			b.result.Places = append(b.result.Places, p)
		}
	}
	for _, p := range b.result.Places {
		b.ranges = append(b.ranges, p.Ranges...)
	}
}

// addRange takes a range that is one, and not half of the internet.
func (b *builder) addRange(p *mesh.Place, text, kind, name string) {
	r, err := netip.ParsePrefix(text)
	if err == nil {
		err = CheckRange(r)
	}
	if err != nil || len(p.Ranges) == maxAddresses {
		b.problem(kind, "", name, fmt.Sprintf("range %.80q: want at most %d prefixes, each of %d bits or more (IPv6: %d)", text, maxAddresses, widest4, widest6))
		return
	}
	p.Ranges = append(p.Ranges, r.Masked())
}

// CheckRange refuses what cannot be a range of a cluster's addresses.
func CheckRange(r netip.Prefix) error {
	widest := widest6
	if r.Addr().Is4() {
		widest = widest4
	}
	if !r.IsValid() || r.Addr().Is4In6() || r.Bits() < widest {
		return fmt.Errorf("%s: want a prefix of %d bits or more (IPv6: %d)", r, widest4, widest6)
	}
	return nil
}

// isOurs tells whether the address is in a range of the cluster's.
func (b *builder) isOurs(a netip.Addr) bool {
	return slices.ContainsFunc(b.ranges, func(r netip.Prefix) bool { return r.Contains(a) })
}

func nodeAddresses(n *corev1.Node) []netip.Addr {
	var texts []string
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			texts = append(texts, a.Address)
		}
	}
	return addresses(texts[:min(len(texts), maxNodeAddresses)])
}
