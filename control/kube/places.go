package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"tacit.dev/mesh"
)

const (
	// widest4 and widest6 are the shortest prefixes that are taken for ranges of the
	// cluster: what is in a range and nobody's cannot be dialled.
	widest4 = 8
	widest6 = 16
)

// cluster is where pods and services get their addresses, and ports of nodes, as flags and
// ServiceCIDRs say; nil if nothing does.
func (r *reader) cluster(list []*networkingv1.ServiceCIDR) *mesh.Place {
	p := &mesh.Place{Name: r.workloadUID("/Cluster", "ranges", "all"), Ranges: slices.Clone(r.cfg.Ranges), NodePorts: r.cfg.NodePorts}
	list = slices.SortedFunc(slices.Values(list), func(x, y *networkingv1.ServiceCIDR) int { return cmp.Compare(x.Name, y.Name) })
	for _, c := range list {
		for _, text := range c.Spec.CIDRs {
			r.addRange(p, text, "ServiceCIDR", c.Name)
		}
	}
	slices.SortFunc(p.Ranges, netip.Prefix.Compare)
	p.Ranges = slices.Compact(p.Ranges)
	if len(p.Ranges) == 0 && p.NodePorts == (mesh.NodePorts{}) {
		return nil
	}
	return p
}

// place is a node's: its addresses, and those that its pods get; nil if it has none.
func (r *reader) place(n *corev1.Node) *mesh.Place {
	p := &mesh.Place{Name: r.workloadUID("/Node", "", n.Name), Node: n.Name, Addresses: nodeAddresses(n)}
	texts := n.Spec.PodCIDRs
	if len(texts) == 0 && n.Spec.PodCIDR != "" {
		texts = []string{n.Spec.PodCIDR}
	}
	for _, text := range texts {
		r.addRange(p, text, "Node", n.Name)
	}
	if len(p.Addresses)+len(p.Ranges) == 0 {
		return nil
	}
	return p
}

// contestedPlace is an address that nobody knows whose it is.
func (r *reader) contestedPlace(a netip.Addr) *mesh.Place {
	return &mesh.Place{Name: r.workloadUID("/Address", "contested", a.String()), Contested: true, Addresses: []netip.Addr{a}}
}

// addRange takes a range that is one, and not half of the internet.
func (r *reader) addRange(p *mesh.Place, text, kind, name string) {
	prefix, err := netip.ParsePrefix(text)
	if err == nil {
		err = CheckRange(prefix)
	}
	if err != nil || len(p.Ranges) >= len(r.cfg.Ranges)+maxAddresses {
		r.problem(kind, "", name, fmt.Sprintf("range %.80q: want at most %d prefixes, each of %d bits or more (IPv6: %d)", text, maxAddresses, widest4, widest6))
		return
	}
	p.Ranges = append(p.Ranges, prefix.Masked())
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

// rangeSet are ranges, each as often as somebody has it. To look for an address costs as many
// steps as there are lengths of prefixes: most have one of a few.
type rangeSet struct {
	count   map[netip.Prefix]int
	lengths map[int]int // how many ranges have it
}

// replace takes ranges out and others in, and tells whether that makes another set.
func (s *rangeSet) replace(had, now []netip.Prefix) (differs bool) {
	if s.count == nil {
		s.count, s.lengths = make(map[netip.Prefix]int), make(map[int]int)
	}
	for _, r := range now {
		if s.count[r]++; s.count[r] == 1 {
			s.lengths[r.Bits()]++
			differs = true
		}
	}
	for _, r := range had {
		if s.count[r]--; s.count[r] > 0 {
			continue
		}
		differs = true
		delete(s.count, r)
		if s.lengths[r.Bits()]--; s.lengths[r.Bits()] == 0 {
			delete(s.lengths, r.Bits())
		}
	}
	return differs
}

func (s *rangeSet) has(a netip.Addr) bool {
	for bits := range s.lengths {
		if p, err := a.Prefix(bits); err == nil && s.count[p] > 0 {
			return true
		}
	}
	return false
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
