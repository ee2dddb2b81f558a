package mesh

import (
	"cmp"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"strings"
)

// Peer is a Workload as a World keeps it: 100,000 pods have to fit into a proxy that is
// small. What the pods of one kind or one node have in common they share. It is never
// changed; Workload.Peer makes one, and nothing else, so that Kind and Spot are never nil.
type Peer struct {
	// UID and the others are Workload's.
	UID                     string
	Addresses               []netip.Addr
	Direct, Enrolled, Ready bool
	named                   uint16 // so much of the end of UID is its name; see Name
	*Spot
	*Kind
}

// Spot is where a Peer runs.
type Spot struct{ Node, Zone string }

// Kind is what the pods of, say, one Deployment have in common; see Workload.
type Kind struct {
	Traits
	*Rarities
	// Services are the ports that it serves, by the key of their service.
	Services []Serving
}

// Rarities are what most Kinds have nothing of, who share that: it is never nil.
type Rarities struct {
	ExcludeInbound  []uint16
	ExcludeOutbound []Exclusion
	HostPorts       []HostPort
	Policies        []string
	Mode            *Mode
	// Called is the name, if the UID does not end with it.
	Called string
}

// nothingRare is read only.
var nothingRare = &Rarities{}

// Traits are those of a Kind that are no lists.
type Traits struct {
	Namespace                        string
	ID                               ID
	MarkedPorts, Listed, HostNetwork bool
	Of                               string

	OwnerName, OwnerKind, CanonicalName, CanonicalRevision, Cluster string
}

// Serving is one port of one service.
type Serving struct {
	Service string // its Key
	Port
}

// Peer returns the workload as a World keeps it, but that it shares nothing with others.
func (w *Workload) Peer() *Peer {
	spot, kind := w.spot(), w.kind(nil)
	return w.peer(&spot, &kind)
}

func (w *Workload) peer(spot *Spot, kind *Kind) *Peer {
	p := &Peer{UID: w.UID, Addresses: slices.Clone(w.Addresses), Direct: w.Direct, Enrolled: w.Enrolled, Ready: w.Ready, Spot: spot, Kind: kind}
	if w.hasNameInUID() {
		p.named = uint16(len(w.Name))
	}
	return p
}

// Name is Workload's.
func (p *Peer) Name() string {
	if p.named == 0 {
		return p.Called
	}
	return p.UID[len(p.UID)-int(p.named):]
}

func (w *Workload) hasNameInUID() bool {
	return strings.HasSuffix(w.UID, w.Name) && len(w.Name) <= math.MaxUint16
}

func (w *Workload) spot() Spot { return Spot{Node: w.Node, Zone: w.Zone} }

// kind points to lists of the workload, and puts those that it makes into room.
func (w *Workload) kind(room []Serving) Kind {
	rare := nothingRare
	if len(w.ExcludeInbound)+len(w.ExcludeOutbound)+len(w.HostPorts)+len(w.Policies) > 0 || w.Mode != nil || !w.hasNameInUID() {
		rare = &Rarities{w.ExcludeInbound, w.ExcludeOutbound, w.HostPorts, w.Policies, w.Mode, ""}
		if !w.hasNameInUID() {
			rare.Called = w.Name
		}
	}
	return Kind{
		Traits: Traits{
			Namespace: w.Namespace, ID: w.ID, MarkedPorts: w.MarkedPorts, Listed: w.Listed, HostNetwork: w.HostNetwork, Of: w.Of,
			OwnerName: w.OwnerName, OwnerKind: w.OwnerKind, CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision, Cluster: w.Cluster,
		},
		Rarities: rare, Services: servings(room, w.Services),
	}
}

// servings orders by service, and keeps the order of each one's ports.
func servings(all []Serving, services map[string][]Port) []Serving {
	for key, ports := range services {
		for _, p := range ports {
			all = append(all, Serving{key, p})
		}
	}
	slices.SortStableFunc(all, func(a, b Serving) int { return cmp.Compare(a.Service, b.Service) })
	return all
}

// Workload returns what the Peer was made of.
func (p *Peer) Workload() *Workload {
	w := &Workload{
		UID: p.UID, Namespace: p.Namespace, Name: p.Name(), Node: p.Node, Zone: p.Zone, Addresses: p.Addresses, ID: p.ID,
		Direct: p.Direct, Enrolled: p.Enrolled, ExcludeInbound: p.ExcludeInbound, ExcludeOutbound: p.ExcludeOutbound,
		MarkedPorts: p.MarkedPorts, HostPorts: p.HostPorts, Policies: p.Policies, Mode: p.Mode, Listed: p.Listed, Of: p.Of, HostNetwork: p.HostNetwork, Ready: p.Ready,
		OwnerName: p.OwnerName, OwnerKind: p.OwnerKind, CanonicalName: p.CanonicalName, CanonicalRevision: p.CanonicalRevision, Cluster: p.Cluster,
	}
	for _, s := range p.Services {
		if w.Services == nil {
			w.Services = make(map[string][]Port)
		}
		w.Services[s.Service] = append(w.Services[s.Service], s.Port)
	}
	return w
}

// Serves reports whether it serves a port of the service with that key.
func (k *Kind) Serves(service string) bool {
	return slices.ContainsFunc(k.Services, func(s Serving) bool { return s.Service == service })
}

func (k *Kind) same(as *Kind) bool {
	return k.Traits == as.Traits && slices.Equal(k.ExcludeInbound, as.ExcludeInbound) && slices.Equal(k.ExcludeOutbound, as.ExcludeOutbound) &&
		slices.Equal(k.HostPorts, as.HostPorts) && slices.Equal(k.Services, as.Services) && slices.Equal(k.Policies, as.Policies) && k.Mode.Equal(as.Mode) && k.Called == as.Called
}

func (k *Kind) hash() uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	maphash.WriteComparable(&h, k.Traits)
	for _, s := range k.Services {
		maphash.WriteComparable(&h, s)
	}
	// The rest is rare: that it is there at all tells most of those apart that differ in it.
	maphash.WriteComparable(&h, [4]int{len(k.ExcludeInbound), len(k.ExcludeOutbound), len(k.HostPorts), len(k.Policies)})
	for _, p := range k.ExcludeInbound {
		maphash.WriteComparable(&h, p)
	}
	for _, p := range k.Policies {
		maphash.WriteComparable(&h, p)
	}
	h.WriteString(k.Called)
	return h.Sum64()
}

func (s *Spot) same(as *Spot) bool { return *s == *as }

func (s *Spot) hash() uint64 { return maphash.Comparable(seed, *s) }

// copy returns what is the same and has nothing in common with s but what one gives. What
// is kept of a message must not lie among all that is not: that would hold its memory.
func (s *Spot) copy(one func(string) string) *Spot { return &Spot{one(s.Node), one(s.Zone)} }

// copy is as Spot's.
func (k *Kind) copy(one func(string) string) *Kind {
	c := *k
	for _, s := range []*string{
		&c.Namespace, &c.ID.TrustDomain, &c.ID.Namespace, &c.ID.ServiceAccount, &c.Of,
		&c.OwnerName, &c.OwnerKind, &c.CanonicalName, &c.CanonicalRevision, &c.Cluster,
	} {
		*s = one(*s)
	}
	c.Services = slices.Clone(k.Services)
	for i := range c.Services {
		c.Services[i].Service = one(c.Services[i].Service)
	}
	if k.Rarities == nothingRare {
		return &c
	}
	c.Rarities = &Rarities{slices.Clone(k.ExcludeInbound), slices.Clone(k.ExcludeOutbound), slices.Clone(k.HostPorts), slices.Clone(k.Policies), k.Mode, one(k.Called)}
	for i := range c.Policies {
		c.Policies[i] = one(c.Policies[i])
	}
	return &c
}
