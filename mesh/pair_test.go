package mesh

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func pairWorld() *World {
	web := &Workload{UID: "K//Pod/shop/web-1", Namespace: "shop", Name: "web-1", OwnerName: "web", Node: "n1",
		ID: ID{"lab", "shop", "web"}, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}
	host := &Workload{UID: "K//Pod/shop/agent-1", Namespace: "shop", Name: "agent-1", Node: "n1", HostNetwork: true,
		ID: ID{"lab", "shop", "agent"}, Addresses: []netip.Addr{netip.MustParseAddr("192.168.0.1")}}
	return NewWorld([]*Workload{web, host}, nil,
		&Place{Name: "n1", Node: "n1", Addresses: []netip.Addr{netip.MustParseAddr("192.168.0.1")}, Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
}

func TestPartyOfAnAddress(t *testing.T) {
	w := pairWorld()
	for address, want := range map[string]string{
		"10.1.0.5":        "shop/web",
		"::ffff:10.1.0.5": "shop/web",
		"192.168.0.1":     "node n1",
		"10.1.0.9":        "10.1.0.9",
		"203.0.113.77":    "203.0.113.0/24",
		"2001:db8::1:2":   "2001:db8::/64",
	} {
		a := netip.MustParseAddr(address)
		var got Party
		if n := testing.AllocsPerRun(10, func() { got = w.Party(w.Workload(a), a) }); n > 0 {
			t.Errorf("%s: %v allocations, want none", address, n)
		}
		if got.String() != want || got.check() != nil {
			t.Errorf("%s is %s (%v), want %s", address, got, got.check(), want)
		}
	}
	host := (&Workload{UID: "x", Name: "x", Node: "n2", HostNetwork: true}).Peer()
	if got := w.Party(host, netip.Addr{}).String(); got != "node n2" {
		t.Errorf("a pod of its node's network is %s", got)
	}
	proved := (&Workload{Namespace: "shop", ID: ID{"lab", "shop", "web"}}).Peer()
	if got := w.Party(proved, netip.Addr{}).String(); got != "shop/(account web)" {
		t.Errorf("who is known by identity alone is %s", got)
	}
}

func TestPairsThatAreWrong(t *testing.T) {
	web := Party{Where: AtWorkload, Namespace: "shop", Workload: "web", Account: "web"}
	node := Party{Where: AtNode, Node: "n1"}
	seen := time.Unix(1000, 0)
	good := Pair{Way: Way{node, web, 80, PlaintextIn, ByDestination}, First: seen, Last: seen}
	for _, row := range []struct {
		what  string
		spoil func(*Pair)
		ok    bool
	}{
		{"as it is", func(*Pair) {}, true},
		{"denied at the source", func(p *Pair) { *p = Pair{Way: Way{web, node, 80, Denied, BySource}, First: seen, Last: seen} }, true},
		{"mutual TLS told by the source", func(p *Pair) { p.Crossing, p.Reporter = CrossedByTLS, BySource }, false},
		{"no crossing", func(p *Pair) { p.Crossing = "" }, false},
		{"no reporter", func(p *Pair) { p.Reporter = "" }, false},
		{"no port", func(p *Pair) { p.Port = 0 }, false},
		{"a node's own connections", func(p *Pair) { p.Destination = node }, false},
		{"last before first", func(p *Pair) { p.Last = seen.Add(-1) }, false},
		{"before the clock began", func(p *Pair) { p.First = time.Unix(-1, 0) }, false},
		{"a workload on a node", func(p *Pair) { p.Destination.Node = "n1" }, false},
		{"no account", func(p *Pair) { p.Destination.Account = "" }, false},
		{"a name with a space", func(p *Pair) { p.Destination.Workload = "a b" }, false},
		{"a name that is long", func(p *Pair) { p.Destination.Workload = strings.Repeat("a", 254) }, false},
		{"a block that is none", func(p *Pair) { p.Source = Party{Where: Outside} }, false},
		{"a block with a host", func(p *Pair) { p.Source = Party{Where: Outside, Block: netip.MustParsePrefix("10.0.0.1/8")} }, false},
	} {
		p := good
		if row.spoil(&p); (p.Check() == nil) != row.ok {
			t.Errorf("%s: %v", row.what, p.Check())
		}
	}
}
