package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"tacit.dev/mesh"
)

// modes are those of one workload: of the mesh, of its namespace, its own; each may say nothing.
type modes struct {
	policies []*mesh.Policy
	own      *mesh.Mode
}

func newModes(of ...*mesh.Mode) (m modes) {
	for i, one := range of {
		switch {
		case one == nil:
		case i == 2:
			m.own = one
		default:
			m.policies = append(m.policies, &mesh.Policy{
				Namespace: "d", Name: fmt.Sprint("_mode", i), Scope: []mesh.Scope{mesh.WholeMesh, mesh.WholeNamespace}[i], Action: mesh.Deny, Mode: one,
			})
		}
	}
	return m
}

func (r dice) modes() modes {
	levels := []mesh.Level{mesh.Inherited, mesh.Permissive, mesh.Strict}
	var all []*mesh.Mode
	for range 3 {
		m := &mesh.Mode{Inbound: levels[r.IntN(3)], Outbound: levels[r.IntN(3)], Outside: levels[r.IntN(3)]}
		for range r.IntN(2) {
			m.Admit = append(m.Admit, mesh.Admission{Port: uint16(r.IntN(2) * 80), From: some(r, netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::1/128"))})
		}
		m.Allowed = some(r, mesh.Exclusion{Port: 80}, mesh.Exclusion{Prefix: netip.MustParsePrefix("10.0.0.0/24")})
		if r.IntN(3) == 0 {
			m = nil
		}
		all = append(all, m)
	}
	if r.IntN(2) == 0 && all[2] != nil {
		all[2].Ports = []mesh.PortLevel{{Port: 80, Level: levels[1+r.IntN(2)]}}
	}
	return newModes(all...)
}

func (r dice) departure() Departure {
	c := r.connection()
	return Departure{Dialed: c.Destination, To: netip.AddrPortFrom(c.Source, c.Destination.Port()), Inside: r.IntN(2) == 0}
}

// all are the modes, of the widest scope first.
func (m modes) all() (all []*mesh.Mode) {
	for _, p := range m.policies {
		all = append(all, p.Mode)
	}
	if m.own != nil {
		all = append(all, m.own)
	}
	return all
}

// refuse decides in the slow way, by the words of mesh.Mode.
func (m modes) refuse(c Connection) bool {
	if !c.Peer.id.IsZero() {
		return false
	}
	strict := false
	for _, one := range m.all() {
		if one.Inbound != mesh.Inherited {
			strict = one.Inbound == mesh.Strict
		}
		for _, p := range one.Ports {
			if p.Port == c.Destination.Port() {
				strict = p.Level == mesh.Strict
			}
		}
	}
	for _, one := range m.all() {
		for _, a := range one.Admit {
			from := slices.ContainsFunc(a.From, contains(c.Source)) || len(a.From) == 0 && c.FromNode
			if from && (a.Port == 0 || a.Port == c.Destination.Port()) {
				return false
			}
		}
	}
	return strict
}

func (m modes) checkLeave(t *testing.T, set *Set, d Departure) {
	t.Helper()
	strict, outside, excepted := false, false, false
	for _, one := range m.all() {
		if one.Outbound != mesh.Inherited {
			strict = one.Outbound == mesh.Strict
		}
		if one.Outside != mesh.Inherited {
			outside = one.Outside == mesh.Strict
		}
		for _, e := range one.Allowed {
			excepted = excepted || e.Has(d.Dialed) || e.Has(d.To)
		}
	}
	want := !strict || excepted || !d.Inside && !outside
	if v := set.Leave(&d); v.Allowed != want || set.IsStrictOutbound() != strict {
		t.Fatalf("%+v: %s: want %v, of %+v", d, v, want, m.all())
	}
}

// The narrower scope counts, and what it leaves open the wider one says.
func TestModes(t *testing.T) {
	strict, permissive := &mesh.Mode{Inbound: mesh.Strict}, &mesh.Mode{Inbound: mesh.Permissive}
	port := func(l mesh.Level) *mesh.Mode { return &mesh.Mode{Ports: []mesh.PortLevel{{Port: 80, Level: l}}} }
	node := &mesh.Mode{Admit: []mesh.Admission{{Port: 80}}}
	block := &mesh.Mode{Admit: []mesh.Admission{{From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}}}
	plain := Connection{Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.2:80")}
	other, fromNode := plain, plain
	other.Destination = netip.MustParseAddrPort("10.0.0.2:81")
	fromNode.FromNode = true
	proved := plain
	proved.Peer = Proved(account("a", "x"))
	for name, row := range map[string]struct {
		modes modes
		from  Connection
		want  string
	}{
		"nothing said":                   {newModes(), plain, "no policy applies"},
		"strict mesh":                    {newModes(strict), plain, "plaintext, and the mode of the mesh is strict"},
		"strict mesh, proved":            {newModes(strict), proved, "no policy applies"},
		"permissive namespace":           {newModes(strict, permissive), plain, "no policy applies"},
		"strict namespace":               {newModes(permissive, strict), plain, "plaintext, and the mode of the namespace is strict"},
		"namespace that says nothing":    {newModes(strict, &mesh.Mode{}), plain, "plaintext, and the mode of the mesh is strict"},
		"permissive workload":            {newModes(strict, strict, permissive), plain, "no policy applies"},
		"strict workload":                {newModes(permissive, permissive, strict), plain, "plaintext, and the mode of the workload is strict"},
		"permissive port":                {newModes(strict, nil, port(mesh.Permissive)), plain, "no policy applies"},
		"permissive port, another":       {newModes(strict, nil, port(mesh.Permissive)), other, "plaintext, and the mode of the mesh is strict"},
		"strict port":                    {newModes(nil, nil, port(mesh.Strict)), plain, "plaintext, and the mode of the workload is strict"},
		"node where nodes are let in":    {newModes(strict, nil, node), fromNode, "no policy applies"},
		"node at another port":           {newModes(strict, nil, node), other, "plaintext, and the mode of the mesh is strict"},
		"no node where nodes are let in": {newModes(strict, nil, node), plain, "plaintext, and the mode of the mesh is strict"},
		"listed source":                  {newModes(strict, nil, block), plain, "no policy applies"},
		"not understood":                 {newModes(nil, nil, mesh.StrictMode()), plain, "plaintext, and the mode of the workload is strict"},
	} {
		if got := Compile(row.modes.policies, nil, row.modes.own).Decide(&row.from); got.String() != row.want {
			t.Errorf("%s: %s: want %s", name, got, row.want)
		}
	}
}

func TestLeave(t *testing.T) {
	inside := Departure{Dialed: netip.MustParseAddrPort("10.96.0.1:443"), To: netip.MustParseAddrPort("10.0.0.2:6443"), Inside: true}
	outside := Departure{Dialed: netip.MustParseAddrPort("192.0.2.1:443"), To: netip.MustParseAddrPort("192.0.2.1:443")}
	strict := &mesh.Mode{Outbound: mesh.Strict}
	listed := &mesh.Mode{Outbound: mesh.Strict, Outside: mesh.Strict, Allowed: []mesh.Exclusion{{Prefix: netip.MustParsePrefix("10.96.0.1/32"), Port: 443}}}
	for name, row := range map[string]struct {
		modes modes
		to    Departure
		want  string
	}{
		"nothing said":        {newModes(), inside, "no policy applies"},
		"strict":              {newModes(strict), inside, "plaintext, and the mode of the mesh is strict"},
		"strict, outside":     {newModes(strict), outside, "no policy applies"},
		"listed, as dialed":   {newModes(listed), inside, "an exception of the strict mode"},
		"not listed, outside": {newModes(listed), outside, "plaintext, and the mode of the mesh is strict"},
		"permissive workload": {newModes(listed, nil, &mesh.Mode{Outbound: mesh.Permissive}), outside, "no policy applies"},
	} {
		if got := Compile(row.modes.policies, nil, row.modes.own).Leave(&row.to); got.String() != row.want {
			t.Errorf("%s: %s: want %s", name, got, row.want)
		}
	}
}
