package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Where says what a Party is.
type Where string

const (
	// AtWorkload is a pod, by what it belongs to.
	AtWorkload Where = "workload"
	// AtNode is a node, or a pod of its network: nothing tells the two apart.
	AtNode Where = "node"
	// InCluster is an address of the cluster's at which nobody is known.
	InCluster Where = "cluster"
	// Outside is a block of addresses that are not the cluster's.
	Outside Where = "outside"
)

// Party is one side of a Pair: a name that many connections have in common. It has those of
// its fields that Where says, and no others.
type Party struct {
	Where Where `json:"where"`
	// Namespace, Workload (a Workload's OwnerName) and Account (the name of its service account)
	// are those of a workload. The one of whom only the identity is known has no Workload.
	Namespace string `json:"namespace,omitempty"`
	Workload  string `json:"workload,omitempty"`
	Account   string `json:"account,omitempty"`
	Node      string `json:"node,omitempty"`
	// Block are the addresses of one in the cluster or outside of it.
	Block netip.Prefix `json:"block,omitzero"`
}

// Blocks outside of the cluster have so many bits.
const (
	blockBits4 = 24
	blockBits6 = 64
)

// String is the party's name for people: NAMESPACE/WORKLOAD, "node NAME" or a block.
func (p Party) String() string {
	switch {
	case p.Where == AtNode:
		return "node " + p.Node
	case p.Where != AtWorkload && p.Block.IsSingleIP():
		return p.Block.Addr().String()
	case p.Where != AtWorkload:
		return p.Block.String()
	case p.Workload == "":
		return p.Namespace + "/(account " + p.Account + ")"
	}
	return p.Namespace + "/" + p.Workload
}

// Party is what the workload is called in a Pair.
func (w *Workload) Party() Party {
	return party(w.Namespace, w.OwnerName, w.Name, w.ID.ServiceAccount)
}

func party(namespace, owner, name, account string) Party {
	if owner == "" {
		owner = name
	}
	return Party{Where: AtWorkload, Namespace: namespace, Workload: owner, Account: account}
}

// Party names who is at an address: p if the World, or a proof, says so. It allocates nothing.
func (w *World) Party(p *Peer, a netip.Addr) Party {
	switch {
	case p != nil && p.HostNetwork:
		return Party{Where: AtNode, Node: p.Node}
	case p != nil && !p.Listed:
		return party(p.Namespace, p.OwnerName, p.Name(), p.ID.ServiceAccount)
	}
	a = a.Unmap().WithZone("")
	if node := owner(&w.nodes, a); node != nil {
		return Party{Where: AtNode, Node: node.Node}
	}
	where, bits := Outside, blockBits6
	switch {
	case w.ranges.has(a):
		where, bits = InCluster, a.BitLen()
	case a.Is4():
		bits = blockBits4
	}
	block, _ := a.Prefix(bits) // the zero Addr has none
	return Party{Where: where, Block: block}
}

// Crossing says how the connections of a Pair crossed the network, as the node saw it that
// tells of them. Mutual TLS is told by the destination's node alone.
type Crossing string

const (
	CrossedByTLS Crossing = "mtls"
	PlaintextIn  Crossing = "plaintext in"
	PlaintextOut Crossing = "plaintext out"
	// Denied: they were reset, since a policy or the mode says so.
	Denied Crossing = "denied"
)

// Way is what the connections of a Pair have in common.
type Way struct {
	Source      Party `json:"source"`
	Destination Party `json:"destination"`
	// Port is the destination's.
	Port     uint16   `json:"port"`
	Crossing Crossing `json:"crossing"`
	// Reporter is the side whose node tells.
	Reporter Reporter `json:"reporter"`
}

// Own is the party of the node that tells.
func (w *Way) Own() *Party {
	if w.Reporter == BySource {
		return &w.Source
	}
	return &w.Destination
}

// Pair are connections that have a Way in common, counted.
type Pair struct {
	Way
	Connections uint64 `json:"connections"`
	// Bytes went both ways. They count when a connection ends.
	Bytes uint64 `json:"bytes"`
	// First and Last are when one began or ended first and last.
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// Pairs are what a node tells of its connections since it told of them before.
type Pairs struct {
	List []Pair
	// Other counts connections that the node had no room to tell apart.
	Other uint64
}

// MaxPairsTold bounds the Pairs that are told at once.
const MaxPairsTold = 256

// Check says what is wrong with a pair that a node has told.
func (p *Pair) Check() error {
	known := map[Crossing]Reporter{CrossedByTLS: ByDestination, PlaintextIn: ByDestination, PlaintextOut: BySource, Denied: p.Reporter}
	switch {
	case p.Reporter != BySource && p.Reporter != ByDestination, known[p.Crossing] != p.Reporter:
		return fmt.Errorf("pair %q told by %q", p.Crossing, p.Reporter)
	case p.Port == 0:
		return errors.New("pair of port 0")
	case p.Own().Where != AtWorkload:
		return errors.New("pair of no workload of the node")
	case p.First.Unix() <= 0 || p.Last.Before(p.First):
		return fmt.Errorf("pair seen from %d to %d", p.First.Unix(), p.Last.Unix())
	}
	return errors.Join(p.Source.check(), p.Destination.check())
}

func (p *Party) check() error {
	want := Party{Where: p.Where}
	ok := true
	switch p.Where {
	case AtWorkload:
		want.Namespace, want.Workload, want.Account = p.Namespace, p.Workload, p.Account
		ok = validSegment(p.Namespace) && validSegment(p.Account) && (p.Workload == "" || validSegment(p.Workload))
	case AtNode:
		want.Node = p.Node
		ok = validSegment(p.Node)
	case InCluster, Outside:
		want.Block = p.Block
		ok = p.Block.IsValid() && !p.Block.Addr().Is4In6() && p.Block == p.Block.Masked()
	default:
		ok = false
	}
	if !ok || *p != want {
		return fmt.Errorf("party %.80q of namespace %.80q, node %.80q, block %s", p.Workload, p.Namespace, p.Node, p.Block)
	}
	return nil
}
