package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func contains(a netip.Addr) func(netip.Prefix) bool {
	return func(p netip.Prefix) bool { return p.Contains(a) }
}

func account(ns, name string) mesh.ID {
	return mesh.ID{TrustDomain: "lab", Namespace: ns, ServiceAccount: name}
}

func from(ns, name string) Connection {
	c := Connection{Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.1.1:8080")}
	if name != "" {
		c.Peer = Proved(account(ns, name))
	}
	return c
}

// rules makes one rule of each match.
func rules(matches ...mesh.Match) (all []mesh.Rule) {
	for _, m := range matches {
		all = append(all, mesh.Rule{Clauses: []mesh.Clause{{m}}})
	}
	return all
}

func TestDecide(t *testing.T) {
	admin := mesh.Match{Principals: []mesh.Pattern{{Text: "lab/ns/default/sa/admin"}}}
	inDefault := mesh.Match{Namespaces: []mesh.Pattern{{Text: "default"}}}
	named := func(name string, action mesh.Action, rules ...mesh.Rule) *mesh.Policy {
		return &mesh.Policy{Namespace: "default", Name: name, Scope: mesh.Named, Action: action, Rules: rules}
	}
	dry := func(p *mesh.Policy) *mesh.Policy { p.DryRun = true; return p }
	everything := mesh.Rule{}
	for _, row := range []struct {
		name     string
		policies []*mesh.Policy
		unknown  []string
		from     Connection
		want     string
	}{
		{"no policy", nil, nil, from("", ""), "no policy applies"},
		{"allow without rules", []*mesh.Policy{named("none", mesh.Allow)}, nil, from("default", "admin"), "allowed by no rule of policy default/none or of another one"},
		{"deny without rules", []*mesh.Policy{named("none", mesh.Deny)}, nil, from("default", "admin"), "no policy applies"},
		{"a rule without clauses", []*mesh.Policy{named("all", mesh.Allow, everything)}, nil, from("", ""), "allowed by rule 0 of policy default/all"},
		{"who is allowed", []*mesh.Policy{named("admin", mesh.Allow, rules(inDefault, admin)[1])}, nil, from("default", "admin"), "allowed by rule 0 of policy default/admin"},
		{"who is not", []*mesh.Policy{named("admin", mesh.Allow, rules(admin)...)}, nil, from("default", "guest"), "allowed by no rule of policy default/admin or of another one"},
		{"nobody", []*mesh.Policy{named("admin", mesh.Allow, rules(admin)...)}, nil, from("", ""), "allowed by no rule of policy default/admin or of another one"},
		{"deny before allow", []*mesh.Policy{named("all", mesh.Allow, everything), named("admin", mesh.Deny, rules(admin)...)}, nil, from("default", "admin"), "denied by rule 0 of policy default/admin"},
		{"one of two allows", []*mesh.Policy{named("none", mesh.Allow), named("default", mesh.Allow, rules(inDefault)...)}, nil, from("default", "x"), "allowed by rule 0 of policy default/default"},
		{"a namespace that is not", []*mesh.Policy{named("others", mesh.Deny, rules(mesh.Match{NotNamespaces: inDefault.Namespaces})...)}, nil, from("", ""), "denied by rule 0 of policy default/others"},
		{"an allow that cannot be enforced", []*mesh.Policy{named("get", mesh.Allow, mesh.Rule{Unenforceable: "a method"})}, nil, from("default", "admin"), "allowed by no rule of policy default/get or of another one"},
		{"a deny that cannot be enforced", []*mesh.Policy{named("get", mesh.Deny, mesh.Rule{Unenforceable: "a method", Clauses: []mesh.Clause{{admin}}})}, nil, from("default", "admin"),
			"denied by policy default/get, whose rule 0 cannot be enforced: a method"},
		{"a deny that cannot be enforced, for others", []*mesh.Policy{named("get", mesh.Deny, mesh.Rule{Unenforceable: "a method", Clauses: []mesh.Clause{{admin}}})}, nil, from("default", "guest"), "no policy applies"},
		{"a policy that is not known", []*mesh.Policy{named("all", mesh.Allow, everything)}, []string{"default/gone"}, from("default", "admin"), "policy default/gone is not known"},
		{"a match of nothing", []*mesh.Policy{named("odd", mesh.Allow, rules(mesh.Match{})...)}, nil, from("default", "admin"), "allowed by no rule of policy default/odd or of another one"},
		{"a clause of nothing", []*mesh.Policy{named("odd", mesh.Allow, mesh.Rule{Clauses: []mesh.Clause{{}}})}, nil, from("default", "admin"), "allowed by rule 0 of policy default/odd"},
		{"a deny that is dry", []*mesh.Policy{dry(named("all", mesh.Deny, everything))}, nil, from("default", "admin"), "no policy applies"},
		{"an allow that is dry", []*mesh.Policy{dry(named("none", mesh.Allow))}, nil, from("default", "admin"), "no policy applies"},
		{"another port", []*mesh.Policy{named("port", mesh.Allow, rules(mesh.Match{DestinationPorts: []uint16{80}})...)}, nil, from("default", "admin"), "allowed by no rule of policy default/port or of another one"},
		{"the port", []*mesh.Policy{named("port", mesh.Allow, rules(mesh.Match{DestinationPorts: []uint16{80, 8080}})...)}, nil, from("default", "admin"), "allowed by rule 0 of policy default/port"},
		{"the source", []*mesh.Policy{named("source", mesh.Deny, rules(mesh.Match{SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}})...)}, nil, from("", ""), "denied by rule 0 of policy default/source"},
		{"a service account", []*mesh.Policy{named("sa", mesh.Allow, rules(mesh.Match{ServiceAccounts: []mesh.ServiceAccount{{Namespace: "default", Name: "admin"}}})...)}, nil, from("default", "admin"), "allowed by rule 0 of policy default/sa"},
		{"that of another namespace", []*mesh.Policy{named("sa", mesh.Allow, rules(mesh.Match{ServiceAccounts: []mesh.ServiceAccount{{Namespace: "default", Name: "admin"}}})...)}, nil, from("other", "admin"), "allowed by no rule of policy default/sa or of another one"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := Compile(row.policies, row.unknown, nil).Decide(&row.from); got.String() != row.want {
				t.Errorf("%s: want %s", got, row.want)
			}
		})
	}
}

// What a dry run would decide is told, and is not decided.
func TestTry(t *testing.T) {
	none := &mesh.Policy{Namespace: "default", Name: "none", Action: mesh.Allow, DryRun: true}
	c := from("default", "admin")
	if v, is := Compile([]*mesh.Policy{none}, nil, nil).Try(&c); !is || v.Allowed || v.Policy != "default/none" {
		t.Errorf("%v, %v: want a denial", v, is)
	}
	if v, is := Compile(nil, nil, nil).Try(&c); is {
		t.Errorf("%v without a dry run", v)
	}
}

// dice makes up policies in which everything is about the same few things.
type dice struct{ *rand.Rand }

func some[T any](r dice, from ...T) (all []T) {
	for range max(0, r.IntN(7)-4) {
		all = append(all, from[r.IntN(len(from))])
	}
	return all
}

var ids = []mesh.ID{{}, account("a", "x"), account("a", "y"), account("b", "x"), {TrustDomain: "old", Namespace: "a", ServiceAccount: "x"}}

func (r dice) match() mesh.Match {
	principals := []mesh.Pattern{{Text: "lab/ns/a/sa/x"}, {Text: "lab/ns/b/sa/x"}, {Text: "x"}, {Kind: mesh.Prefix, Text: "lab/ns/a"}, {Kind: mesh.Suffix, Text: "/sa/x"}, {Kind: mesh.Present}}
	namespaces := []mesh.Pattern{{Text: "a"}, {Text: "b"}, {Kind: mesh.Prefix, Text: "a"}, {Kind: mesh.Suffix, Text: "b"}, {Kind: mesh.Present}}
	accounts := []mesh.ServiceAccount{{Namespace: "a", Name: "x"}, {Namespace: "b", Name: "x"}}
	var prefixes []netip.Prefix
	for _, p := range []string{"10.0.0.0/8", "10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/31", "0.0.0.0/0", "::/0", "fd00::1/128", "fd00::/64", "10.0.1.7/24"} {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	if r.IntN(3) == 0 { // what an index finds rules by
		return mesh.Match{Principals: some(r, principals[:3]...), ServiceAccounts: some(r, accounts...), Namespaces: some(r, namespaces[:2]...),
			SourceIPs: some(r, prefixes[1:3]...), DestinationPorts: some(r, uint16(80), 81, 82)}
	}
	return mesh.Match{
		Namespaces: some(r, namespaces...), NotNamespaces: some(r, namespaces...), Principals: some(r, principals...), NotPrincipals: some(r, principals...),
		ServiceAccounts: some(r, accounts...), NotServiceAccounts: some(r, accounts...), SourceIPs: some(r, prefixes...), NotSourceIPs: some(r, prefixes...),
		DestinationIPs: some(r, prefixes...), NotDestinationIPs: some(r, prefixes...), DestinationPorts: some(r, uint16(80), 81, 82), NotDestinationPorts: some(r, uint16(80), 81),
	}
}

func (r dice) policy(name string) *mesh.Policy {
	p := &mesh.Policy{Namespace: "d", Name: name, Action: []mesh.Action{mesh.Allow, mesh.Deny}[r.IntN(2)], DryRun: r.IntN(6) == 0}
	for range r.IntN(4) {
		var rule mesh.Rule
		if r.IntN(6) == 0 {
			rule.Unenforceable = "why"
		}
		for range r.IntN(4) {
			var c mesh.Clause
			for range r.IntN(3) {
				c = append(c, r.match())
			}
			rule.Clauses = append(rule.Clauses, c)
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

func (r dice) connection() Connection {
	addresses := []string{"10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.1", "fd00::1", "fd00:1::"}
	return Connection{
		Peer: Proved(ids[r.IntN(len(ids))]), Source: netip.MustParseAddr(addresses[r.IntN(6)]),
		Destination: netip.AddrPortFrom(netip.MustParseAddr(addresses[r.IntN(6)]), uint16(79+r.IntN(4))), FromNode: r.IntN(3) == 0,
	}
}

// FuzzDecide: the engine decides as the slow and obvious way does, names a rule that
// matches, and remembers nothing wrong over changes.
func FuzzDecide(f *testing.F) {
	for i := range uint64(200) {
		f.Add(i)
	}
	f.Add(uint64(time.Now().UnixNano()))
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := dice{rand.New(rand.NewPCG(seed, 0))}
		book := new(Book)
		var policies []*mesh.Policy
		for range 4 {
			if len(policies) > 0 && r.IntN(2) == 0 {
				policies = slices.Delete(slices.Clone(policies), 0, 1)
			}
			for range r.IntN(4) {
				policies = append(slices.Clone(policies), r.policy(fmt.Sprint(r.IntN(1000))))
			}
			var unknown []string
			if r.IntN(8) == 0 {
				unknown = []string{"d/gone"}
			}
			modes := r.modes()
			all := append(slices.Clone(policies), modes.policies...)
			book = book.Next()
			set := book.Compile(all, unknown, modes.own)
			book.Close()
			for range 40 {
				check(t, set, policies, unknown, modes, r.connection())
				modes.checkLeave(t, set, r.departure())
			}
		}
	})
}

func check(t *testing.T, set *Set, policies []*mesh.Policy, unknown []string, modes modes, c Connection) {
	t.Helper()
	v := set.Decide(&c)
	if strict := modes.refuse(c); strict != (v.Reason == Strict) || strict && v.Allowed {
		t.Fatalf("%+v: %s: want strict %v, of %+v", c, v, strict, modes)
	} else if strict {
		return
	}
	allowed, why := obvious(policies, unknown, c, false)
	if v.Allowed != allowed || v.Reason != why && !(v.Reason == Matched && why == Unenforceable) {
		t.Fatalf("%+v: %s (%d): want %v for %d, of %+v", c, v, v.Reason, allowed, why, policies)
	}
	if tried, is := set.Try(&c); is {
		if allowed, _ := obvious(policies, unknown, c, true); tried.Allowed != allowed {
			t.Fatalf("%+v: %s as a dry run: want %v, of %+v", c, tried, allowed, policies)
		}
	}
	if v.Rule < 0 {
		return
	}
	if !slices.ContainsFunc(policies, func(p *mesh.Policy) bool {
		return p.Key() == v.Policy && v.Rule < len(p.Rules) && ruleMatches(p.Rules[v.Rule], c) && (p.Action == mesh.Allow) == v.Allowed
	}) {
		t.Fatalf("%+v: %s: that rule does not match, of %+v", c, v, policies)
	}
}

// town has 10,000 policies of 10 rules, of which 100 are for one workload.
func town() (mine []*mesh.Policy, book *Book) {
	book = new(Book)
	var all []*mesh.Policy
	for i := range 10000 {
		p := &mesh.Policy{Namespace: fmt.Sprintf("team-%d", i/100), Name: fmt.Sprint("p", i), Action: []mesh.Action{mesh.Allow, mesh.Allow, mesh.Deny}[i%3]}
		for j := range 10 {
			m, n := mesh.Match{}, i*10+j
			switch j % 5 {
			case 0:
				m.Principals = []mesh.Pattern{{Text: fmt.Sprintf("cluster.local/ns/team-%d/sa/app-%d", n%500, n)}}
			case 1:
				m.Namespaces = []mesh.Pattern{{Text: fmt.Sprint("team-", n)}}
			case 2:
				m.ServiceAccounts = []mesh.ServiceAccount{{Namespace: fmt.Sprint("team-", n), Name: "app"}}
			case 3:
				m.SourceIPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 32)}
			case 4:
				m.Principals = []mesh.Pattern{{Kind: mesh.Prefix, Text: fmt.Sprintf("cluster.local/ns/team-%d/", n)}}
			}
			clauses := []mesh.Clause{{m}}
			if j%5 == 4 || j == 1 {
				clauses = append(clauses, mesh.Clause{{DestinationPorts: []uint16{uint16(8000 + n%100)}}})
			}
			p.Rules = append(p.Rules, mesh.Rule{Clauses: clauses})
		}
		all = append(all, p)
	}
	for i := range 100 {
		book.Compile(all[i*100:i*100+100], nil, nil)
	}
	return all[4200:4300], book
}

// The acceptance of the engine is under 2 µs. Obvious is what it is compared with.
func BenchmarkDecide(b *testing.B) {
	mine, book := town()
	set := book.Compile(mine, nil, nil)
	connections := map[string]Connection{
		"last":      {Peer: Proved(mesh.ID{TrustDomain: "cluster.local", Namespace: "team-495", ServiceAccount: "app-42995"}), Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.MustParseAddrPort("10.1.1.1:8080")},
		"none":      {Peer: Proved(mesh.ID{TrustDomain: "cluster.local", Namespace: "other", ServiceAccount: "other"}), Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.MustParseAddrPort("10.1.1.1:8080")},
		"plaintext": {Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.MustParseAddrPort("10.1.1.1:8080")},
	}
	for name, c := range connections {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				set.Decide(&c)
			}
		})
		b.Run(name+"/obvious", func(b *testing.B) {
			for b.Loop() {
				obvious(mine, nil, c, false)
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	mine, _ := town()
	for b.Loop() {
		Compile(mine, nil, nil)
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	mine, book := town()
	set, c := book.Compile(mine, nil, nil), from("team-42", "x")
	if n := testing.AllocsPerRun(100, func() { set.Decide(&c) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Workloads with the same policies share a Set, and what did not change is not made again.
func TestBookMakesNothingTwice(t *testing.T) {
	r := dice{rand.New(rand.NewPCG(1, 0))}
	policies := []*mesh.Policy{r.policy("a"), r.policy("b")}
	book := new(Book)
	set := book.Compile(policies, nil, nil)
	if book.Compile(slices.Clone(policies), nil, nil) != set {
		t.Error("the same policies make another Set")
	}
	next := book.Next()
	if next.Compile(policies, nil, nil) != set {
		t.Error("a change elsewhere makes another Set")
	}
	next.Close()
	last := next.Next()
	last.Close()
	if last.Compile(policies, nil, nil) == set {
		t.Error("what nobody asked for is remembered")
	}
}
