package xds

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

func encodeOrFail(t *testing.T, p *mesh.Policy) *message.Authorization {
	t.Helper()
	m, err := encodePolicy(p)
	if err != nil {
		t.Fatalf("encode %+v: %v", p, err)
	}
	return m.(*message.Authorization)
}

// A policy that does not say to whom it applies is not taken, nor one without a name.
func TestPolicyRefuses(t *testing.T) {
	for name, m := range map[string]*message.Authorization{
		"nothing":           {},
		"no name":           {Namespace: "ns"},
		"path for a name":   {Namespace: "ns", Name: ".."},
		"scope of tomorrow": {Namespace: "ns", Name: "p", Scope: 3},
	} {
		if p, err := decodePolicy(m); err == nil {
			t.Errorf("%s: taken as %+v", name, p)
		}
	}
	for _, names := range [][]string{{""}, {strings.Repeat("x", maxName+1)}, make([]string, mesh.MaxPoliciesOf+1)} {
		if w, err := decodeWorkload(&message.Workload{Uid: "u", Namespace: "ns", AuthorizationPolicies: names}); err == nil {
			t.Errorf("workload with %d policies is taken: %.60v", len(names), w)
		}
		if _, err := encodeWorkload(&mesh.Workload{UID: "u", Namespace: "ns", ID: mesh.ID{TrustDomain: "lab", Namespace: "ns", ServiceAccount: "sa"}, Policies: names}); err == nil {
			t.Errorf("workload with %d policies is told", len(names))
		}
	}
}

// What a proxy does not understand of a policy lets nobody in.
func TestPolicyThatIsNotUnderstoodDenies(t *testing.T) {
	foreign := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
	of := func(match *message.Match) *message.Authorization {
		return &message.Authorization{Namespace: "ns", Name: "p", Rules: []*message.Rule{{Clauses: []*message.Clause{{Matches: []*message.Match{match}}}}}}
	}
	match, rule, clause, policy := &message.Match{}, &message.Rule{}, &message.Clause{}, of(&message.Match{})
	for _, m := range []proto.Message{match, rule, clause, policy} {
		m.ProtoReflect().SetUnknown(foreign)
	}
	for name, m := range map[string]*message.Authorization{
		"match":              of(match),
		"rule":               {Namespace: "ns", Name: "p", Rules: []*message.Rule{rule}},
		"clause":             {Namespace: "ns", Name: "p", Rules: []*message.Rule{{Clauses: []*message.Clause{clause}}}},
		"policy":             policy,
		"action of tomorrow": {Namespace: "ns", Name: "p", Action: 2},
		"kind of pattern":    of(&message.Match{Principals: []*message.StringMatch{{}}}),
		"empty pattern":      of(&message.Match{Principals: []*message.StringMatch{{MatchType: &message.StringMatch_Prefix{}}}}),
		"port":               of(&message.Match{DestinationPorts: []uint32{65536}}),
		"range":              of(&message.Match{SourceIps: []*message.IPRange{{Address: make([]byte, 4), Length: 33}}}),
		"range of 5 bytes":   of(&message.Match{NotSourceIps: []*message.IPRange{{Address: make([]byte, 5)}}}),
		"service account":    of(&message.Match{ServiceAccounts: []*message.ServiceAccountMatch{{Namespace: "ns"}}}),
		"too many rules":     {Namespace: "ns", Name: "p", Rules: slices.Repeat([]*message.Rule{{}}, mesh.MaxPolicyRules+1)},
		"too many values":    of(&message.Match{DestinationPorts: slices.Repeat([]uint32{1}, mesh.MaxPolicyValues+1)}),
	} {
		p, err := decodePolicy(m)
		if err != nil || len(p.Rules) != 1 || p.Rules[0].Unenforceable == "" || len(p.Rules[0].Clauses) > 0 {
			t.Errorf("%s: taken as %+v, %v", name, p, err)
		}
	}
}

// Control tells a policy that is wrong as one that denies. A client that knows nothing of
// what cannot be enforced lets nobody in by it.
func TestPolicyThatIsWrongIsToldAsOneThatDenies(t *testing.T) {
	wrong := &mesh.Policy{Namespace: "ns", Name: "p", Scope: mesh.WholeMesh, Action: mesh.Allow, Rules: []mesh.Rule{{Clauses: []mesh.Clause{{{SourceIPs: []netip.Prefix{{}}}}}}}}
	m := encodeOrFail(t, wrong)
	if m.GetAction() != message.Action_DENY || len(m.GetRules()) != 1 || len(m.GetRules()[0].GetClauses()) != 0 || m.GetRules()[0].GetUnenforceable() == "" {
		t.Errorf("told as %v", m)
	}
	m = encodeOrFail(t, &mesh.Policy{Namespace: "ns", Name: "p", Scope: mesh.WholeMesh, Action: mesh.Allow, Rules: []mesh.Rule{{Unenforceable: "a method"}}})
	want := []*message.Clause{{Matches: []*message.Match{{}}}}
	if d := gocmp.Diff(want, m.GetRules()[0].GetClauses(), gocmp.Comparer(proto.Equal)); d != "" {
		t.Errorf("clauses of an Allow that cannot be enforced (-want +got):\n%s", d)
	}
}

// Our own proxies are told policies with the World, at once; a foreign client asks for
// either, and is told nothing of the other.
func TestPoliciesAreToldWithTheWorld(t *testing.T) {
	c := startControl(t, ServerConfig{Log: testLog(t)})
	r := newRandomMesh(1)
	service, policy := r.service(1), r.policy(1)
	if service.Key() != policy.Key() {
		t.Fatal("they should have the same name")
	}
	w := &seen{}
	run(t, NewWorldClient(ClientConfig{Conn: c.dial(t, "n1"), Node: "n1"}, w.change))
	c.connected(t, "n1")
	version := c.Update(Update{Changes: mesh.Changes{Services: []*mesh.Service{service}, Policies: []*mesh.Policy{policy}}})
	c.settle(t, version)
	for typeURL, name := range map[string]string{addressType: service.Key(), policyType: policy.Key()} {
		got, err := open(t, c.dial(t, "n2"), "n2", typeURL).Recv()
		if err != nil || len(got.GetResources()) != 1 || got.GetResources()[0].GetName() != name || got.GetResources()[0].GetResource().GetTypeUrl() != typeURL {
			t.Errorf("foreign client of %s is told %v, %v", typeURL, got, err)
		}
	}
	knows := func() (p *mesh.Policy, s *mesh.Service) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.world.Policy(policy.Key()), w.world.ServiceNamed(service.Key())
	}
	if p, s := knows(); p == nil || s == nil {
		t.Errorf("the World has %v and %v", p, s)
	}
	c.Update(Update{Changes: mesh.Changes{GonePolicies: []string{policy.Key()}}})
	c.until(t, "the policy is gone", func() bool { p, _ := knows(); return p == nil })
	if _, s := knows(); s == nil {
		t.Error("the service of that name is gone, too")
	}
}

// A foreign client that names policies is told of these, by the names that it knows.
func TestForeignClientAsksForPolicies(t *testing.T) {
	c := startControl(t, ServerConfig{Log: testLog(t)})
	policy := newRandomMesh(1).policy(1)
	c.Update(Update{Changes: mesh.Changes{Policies: []*mesh.Policy{policy}}})
	conn := c.dial(t, "n1")
	for _, row := range []struct {
		req             *message.DeltaDiscoveryRequest
		resources, gone []string
	}{
		{&message.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{policy.Key(), "ns/none"}}, []string{policy.Key()}, []string{"ns/none"}},
		{&message.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{policy.Key(): "old", "ns/none": "old"}}, []string{policy.Key()}, []string{"ns/none"}},
	} {
		g, err := message.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		row.req.TypeUrl = policyType
		if err := g.Send(row.req); err != nil {
			t.Fatal(err)
		}
		resp, err := g.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, r := range resp.GetResources() {
			names = append(names, r.GetName())
		}
		if !reflect.DeepEqual(names, row.resources) || !reflect.DeepEqual(resp.GetRemovedResources(), row.gone) {
			t.Errorf("told %v and that %v are gone: want %v and %v", names, resp.GetRemovedResources(), row.resources, row.gone)
		}
	}
}

// FuzzPolicy: no policy makes a proxy panic, and what it takes means the same when it is
// told again.
func FuzzPolicy(f *testing.F) {
	r := newRandomMesh(1)
	for i := range 40 {
		m, _ := encodePolicy(r.policy(i))
		b, _ := proto.Marshal(m)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		name, v, err := unpackAddress(&anypb.Any{TypeUrl: policyType, Value: b})
		if err != nil {
			return
		}
		p := v.(*mesh.Policy)
		for i, r := range p.Rules {
			if r.Unenforceable != "" && p.Action == mesh.Allow {
				p.Rules[i].Clauses = []mesh.Clause{{{}}} // they do not matter
			}
		}
		again, err := decodePolicy(encodeOrFail(t, p))
		if d := gocmp.Diff(p, again, cmpAddr, cmpPrefix); err != nil || d != "" || typeOf(name) != policyType {
			t.Fatalf("error %v (-want +got):\n%s", err, d)
		}
	})
}

// What a mode says that is not known, or not possible, is strict, and has no exceptions.
func TestModeThatIsNotUnderstoodIsStrict(t *testing.T) {
	newer := &message.Mode{Inbound: message.Level_LEVEL_PERMISSIVE}
	newer.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	for name, m := range map[string]*message.Mode{
		"a newer field":       newer,
		"a newer level":       {Inbound: 7, Outbound: 7, Outside: 7},
		"port 70000":          {Ports: []*message.PortLevel{{Port: 70000}}},
		"no port":             {Ports: []*message.PortLevel{{Level: message.Level_LEVEL_PERMISSIVE}}},
		"a range of 33 bits":  {Admit: []*message.Admission{{From: []*message.Range{{Address: make([]byte, 4), Length: 33}}}}},
		"every destination":   {Allowed: []*message.Exclusion{{}}},
		"an address of 3":     {Allowed: []*message.Exclusion{{Address: make([]byte, 3)}}},
		"an admission of 1e6": {Admit: []*message.Admission{{Port: 1e6}}},
	} {
		if got := decodeMode(m); !got.Equal(mesh.StrictMode()) {
			t.Errorf("%s: %+v", name, got)
		}
		e, err := newExtension(modeExtension, m)
		if err != nil {
			t.Fatal(err)
		}
		w, err := decodeWorkload(&message.Workload{Uid: "u", Namespace: "ns", Extensions: []*message.Extension{e}})
		if err != nil || !w.Mode.Equal(mesh.StrictMode()) {
			t.Errorf("%s, of a workload: %+v, %v", name, w, err)
		}
	}
	if m := modeOf([]*message.Extension{{Name: modeExtension, Config: &anypb.Any{TypeUrl: "nonsense"}}}); !m.Equal(mesh.StrictMode()) {
		t.Errorf("nonsense: %+v", m)
	}
	// With rules it is no mode, and denies.
	p, err := decodePolicy(&message.Authorization{Namespace: "d", Name: "x", Action: message.Action_DENY, Mode: &message.Mode{}, Rules: []*message.Rule{{}}})
	if err != nil || p.Mode != nil || len(p.Rules) != 1 || p.Rules[0].Unenforceable == "" {
		t.Errorf("a mode with rules: %+v, %v", p, err)
	}
}
