package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// peers makes objects of lines NAMESPACE/NAME[@AGE] SPEC, AGE in seconds since 1970.
func peersOf(t *testing.T, lines ...string) (all []*PeerAuthentication) {
	t.Helper()
	for _, line := range lines {
		name, spec, _ := strings.Cut(line, " ")
		name, at, _ := strings.Cut(name, "@")
		namespace, name, _ := strings.Cut(name, "/")
		p := &PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: json.RawMessage(spec)}
		if at != "" {
			var seconds int64
			if _, err := fmt.Sscan(at, &seconds); err != nil {
				t.Fatal(err)
			}
			p.CreationTimestamp = metav1.Unix(seconds, 0)
		}
		all = append(all, p)
	}
	return all
}

// modePods are finance and web in foo, and web in bar.
func modePods() []*PodObject {
	pod := func(namespace, name, address string) *PodObject {
		return KeepPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name, LabelMesh: "on"}},
			Spec:       corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{PodIP: address},
		})
	}
	return []*PodObject{pod("foo", "finance", "10.1.0.1"), pod("foo", "web", "10.1.0.2"), pod("bar", "web", "10.1.0.3")}
}

// set compiles what is said of one pod.
func (r *Result) set(t *testing.T, pod string) (*policy.Set, netip.Addr) {
	t.Helper()
	for _, p := range r.Policies {
		if err := p.Check(); err != nil {
			t.Errorf("%s: %v", p.Key(), err)
		}
	}
	w := new(mesh.World).With(mesh.Changes{Workloads: r.Workloads, Policies: r.Policies}, time.Time{})
	for p := range w.Workloads() {
		if p.Namespace+"/"+p.Name() == pod {
			all, unknown := w.PoliciesOf(p)
			return policy.Compile(all, unknown, p.Mode), p.Addresses[0]
		}
	}
	t.Fatalf("no pod %s", pod)
	return nil, netip.Addr{}
}

// takes tells whether plaintext to a port of the pod is let in.
func (r *Result) takes(t *testing.T, pod string, port uint16) bool {
	t.Helper()
	set, at := r.set(t, pod)
	return set.Decide(&policy.Connection{Source: netip.MustParseAddr("192.0.2.1"), Destination: netip.AddrPortFrom(at, port)}).Allowed
}

// The examples and the precedence of Istio's documentation.
func TestPeerAuthentications(t *testing.T) {
	const strict, permissive, unset = `{"mtls":{"mode":"STRICT"}}`, `{"mtls":{"mode":"PERMISSIVE"}}`, `{"mtls":{"mode":"UNSET"}}`
	finance := func(rest string) string { return `{"selector":{"matchLabels":{"app":"finance"}}` + rest + `}` }
	for name, row := range map[string]struct {
		peers []string
		mesh  MeshSpec
		// strict are pods and ports that refuse plaintext; the others of finance, web and bar/web at 80 and 8080 take it.
		strict string
	}{
		"nothing":                              {nil, MeshSpec{}, ""},
		"example 1: a strict namespace":        {[]string{"foo/default " + strict}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"example 1 in the root namespace":      {[]string{"istio-system/default " + strict}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"example 2: permissive, but finance":   {[]string{"foo/default " + permissive, "foo/finance " + finance(`,"mtls":{"mode":"STRICT"}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"example 3: strict, but port 8080":     {[]string{"foo/default " + finance(`,"mtls":{"mode":"STRICT"},"portLevelMtls":{"8080":{"mode":"DISABLE"}}`)}, MeshSpec{}, "foo/finance:80"},
		"example 4: inherited, but port 8080":  {[]string{"foo/a " + strict, "foo/default " + finance(`,"mtls":{"mode":"UNSET"},"portLevelMtls":{"8080":{"mode":"DISABLE"}}`)}, MeshSpec{}, "foo/finance:80 foo/web:80 foo/web:8080"},
		"strict port of a permissive workload": {[]string{"foo/default " + finance(`,"portLevelMtls":{"8080":{"mode":"STRICT"}}`)}, MeshSpec{}, "foo/finance:8080"},
		"unset port":                           {[]string{"foo/default " + finance(`,"mtls":{"mode":"STRICT"},"portLevelMtls":{"8080":{"mode":"UNSET"}}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"unset inherits from the mesh":         {[]string{"foo/default " + unset, "istio-system/default " + strict}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"namespace before mesh":                {[]string{"foo/default " + permissive, "istio-system/default " + strict}, MeshSpec{}, "bar/web:80 bar/web:8080"},
		"the older one counts":                 {[]string{"foo/a@2 " + permissive, "foo/b@1 " + strict}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"the older one of the mesh counts":     {[]string{"istio-system/a@2 " + strict, "istio-system/b@1 " + permissive}, MeshSpec{}, ""},
		"the older one of a workload counts":   {[]string{"foo/a@2 " + finance(`,"mtls":{"mode":"PERMISSIVE"}`), "foo/b@1 " + finance(`,"mtls":{"mode":"STRICT"}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"of the same age the first by name":    {[]string{"foo/b " + permissive, "foo/a " + strict}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"empty selector is the namespace":      {[]string{`foo/a {"selector":{},"mtls":{"mode":"STRICT"}}`}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"selector in the root namespace":       {[]string{"istio-system/a " + finance(`,"mtls":{"mode":"STRICT"}`)}, MeshSpec{}, ""},
		"ports without a selector":             {[]string{`foo/a {"portLevelMtls":{"80":{"mode":"STRICT"}}}`}, MeshSpec{}, ""},
		"DISABLE is permissive":                {[]string{`foo/a {"mtls":{"mode":"DISABLE"}}`, "istio-system/a " + strict}, MeshSpec{}, "bar/web:80 bar/web:8080"},
		"the Mesh":                             {nil, MeshSpec{Mode: "Strict"}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"mesh level before the Mesh":           {[]string{"istio-system/a " + permissive}, MeshSpec{Mode: "Strict"}, ""},
		"unset mesh level":                     {[]string{"istio-system/a " + unset}, MeshSpec{Mode: "Strict"}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"a mode that there is not":             {[]string{`foo/a {"mtls":{"mode":"permissive"}}`}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"a field that is not known":            {[]string{"foo/a " + finance(`,"mtls":{"mode":"PERMISSIVE"},"newer":{}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"a spec that is none":                  {[]string{`foo/a "x"`}, MeshSpec{}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080"},
		"a strict port that is none":           {[]string{"foo/a " + finance(`,"portLevelMtls":{"http":{"mode":"STRICT"}}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"a permissive port that is none":       {[]string{"foo/a " + finance(`,"mtls":{"mode":"STRICT"},"portLevelMtls":{"http":{"mode":"PERMISSIVE"}}`)}, MeshSpec{}, "foo/finance:80 foo/finance:8080"},
		"a Mesh that was never understood":     {nil, MeshSpec{Mode: "strict"}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"an exception":                         {nil, MeshSpec{Mode: "Strict", Exceptions: []MeshException{{Namespace: "foo", Workload: "web", Ports: []int32{80}, From: []string{"192.0.2.0/24"}}}}, "foo/finance:80 foo/finance:8080 foo/web:8080 bar/web:80 bar/web:8080"},
		"an exception by labels":               {nil, MeshSpec{Mode: "Strict", Exceptions: []MeshException{{Namespace: "foo", Selector: map[string]string{"app": "web"}, Ports: []int32{80}, From: []string{"192.0.2.1"}}}}, "foo/finance:80 foo/finance:8080 foo/web:8080 bar/web:80 bar/web:8080"},
		"an exception for nodes, and no node":  {nil, MeshSpec{Mode: "Strict", Exceptions: []MeshException{{Namespace: "bar", Ports: []int32{80}}}}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"an exception that cannot be read":     {nil, MeshSpec{Mode: "Strict", Exceptions: []MeshException{{Namespace: "bar", Ports: []int32{80}, From: []string{"odd"}}}}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
		"an exception without ports, refused":  {nil, MeshSpec{Mode: "Strict", Exceptions: []MeshException{{Namespace: "bar", From: []string{"192.0.2.1"}}}}, "foo/finance:80 foo/finance:8080 foo/web:80 foo/web:8080 bar/web:80 bar/web:8080"},
	} {
		r := Build(Objects{Pods: modePods(), Peers: peersOf(t, row.peers...), Meshes: []*Mesh{{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: row.mesh}}}, policyConfig)
		var got []string
		for _, pod := range []string{"foo/finance", "foo/web", "bar/web"} {
			for _, port := range []uint16{80, 8080} {
				if !r.takes(t, pod, port) {
					got = append(got, fmt.Sprint(pod, ":", port))
				}
			}
		}
		if got := strings.Join(got, " "); got != row.strict {
			t.Errorf("%s: strict are %q: want %q", name, got, row.strict)
		}
	}
}

// What people see of each.
func TestPeerConditions(t *testing.T) {
	r := Build(Objects{Pods: modePods(), Peers: peersOf(t,
		`foo/a@1 {"mtls":{"mode":"STRICT"}}`, `foo/b@2 {"mtls":{"mode":"PERMISSIVE"}}`, `foo/c {"mtls":{"mode":"odd"},"selector":{"matchLabels":{"app":"x"}}}`,
		`istio-system/d {"selector":{"matchLabels":{"app":"x"}}}`, `istio-system/e {"mtls":{"mode":"DISABLE"}}`)}, policyConfig)
	got := make(map[string]string)
	for _, f := range r.Policed {
		got[f.Key()] = fmt.Sprint(f.Want[0].Status, " ", f.Want[0].Reason, ", ", f.Want[1].Status, " ", f.Want[1].Reason)
	}
	for key, want := range map[string]string{
		"foo/a": "True Accepted, True AtDestination", "foo/b": "True Accepted, False Older", "foo/c": "False Invalid, True AtDestination",
		"istio-system/d": "False Unsupported, False NotEnforced", "istio-system/e": "False Unsupported, True AtDestination",
	} {
		if got["PeerAuthentication "+key] != want {
			t.Errorf("%s: %s: want %s", key, got["PeerAuthentication "+key], want)
		}
	}
}

// More than are read: nobody knows what they say.
func TestPeersAreBounded(t *testing.T) {
	var list []*PeerAuthentication
	for i := range maxPeers + 1 {
		list = append(list, peersOf(t, fmt.Sprintf(`foo/p%04d {"mtls":{"mode":"PERMISSIVE"}}`, i))...)
	}
	r := Build(Objects{Pods: modePods(), Peers: list}, policyConfig)
	if r.takes(t, "foo/web", 80) || !r.takes(t, "bar/web", 80) {
		t.Error("want plaintext refused in foo alone")
	}
}

// Outbound: the Mesh, the namespace, the pod.
func TestOutboundModes(t *testing.T) {
	inside, outside := policy.Departure{To: netip.MustParseAddrPort("10.1.0.9:80"), Inside: true}, policy.Departure{To: netip.MustParseAddrPort("192.0.2.1:443")}
	for name, row := range map[string]struct {
		mesh            MeshOutbound
		namespace, pod  map[string]string
		inside, outside bool
		exceptions      string
	}{
		"nothing":                {MeshOutbound{}, nil, nil, true, true, ""},
		"strict":                 {MeshOutbound{Mode: "Strict"}, nil, nil, false, true, ""},
		"strict, listed":         {MeshOutbound{Mode: "Strict", Outside: "Listed"}, nil, nil, false, false, ""},
		"strict, allowed":        {MeshOutbound{Mode: "Strict", Outside: "Listed", Allowed: []string{"192.0.2.0/24", "10.1.0.9:80"}}, nil, nil, true, true, ""},
		"listed says nothing":    {MeshOutbound{Outside: "Listed"}, nil, nil, true, true, ""},
		"odd":                    {MeshOutbound{Mode: "odd", Outside: "odd"}, nil, nil, false, false, ""},
		"allowed, odd":           {MeshOutbound{Mode: "Strict", Allowed: []string{"odd"}}, nil, nil, false, true, ""},
		"permissive namespace":   {MeshOutbound{Mode: "Strict"}, map[string]string{AnnotationOutboundMode: "Permissive"}, nil, true, true, ""},
		"strict namespace":       {MeshOutbound{}, map[string]string{AnnotationOutboundMode: "Strict"}, nil, false, true, ""},
		"odd namespace":          {MeshOutbound{}, map[string]string{AnnotationOutboundMode: "odd"}, nil, false, true, ""},
		"permissive pod":         {MeshOutbound{Mode: "Strict"}, nil, map[string]string{AnnotationOutboundMode: "Permissive"}, true, true, "foo/web PlaintextAllowed"},
		"strict pod":             {MeshOutbound{}, nil, map[string]string{AnnotationOutboundMode: "Strict"}, false, true, ""},
		"pod with a destination": {MeshOutbound{Mode: "Strict"}, nil, map[string]string{AnnotationOutboundAllowed: "80"}, true, true, "foo/web PlaintextAllowed"},
	} {
		o := Objects{
			Pods: modePods(), Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "foo", Annotations: row.namespace}}},
			Meshes: []*Mesh{{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: MeshSpec{Outbound: &row.mesh}}},
		}
		o.Pods[1].Annotations = row.pod
		r := Build(o, policyConfig)
		set, _ := r.set(t, "foo/web")
		if a, b := set.Leave(&inside).Allowed, set.Leave(&outside).Allowed; a != row.inside || b != row.outside {
			t.Errorf("%s: leaves to the cluster %v, elsewhere %v: want %v and %v", name, a, b, row.inside, row.outside)
		}
		var got []string
		for _, e := range r.Exceptions {
			got = append(got, e.Namespace+"/"+e.Name+" "+e.Reason)
		}
		if got := strings.Join(got, ","); got != row.exceptions {
			t.Errorf("%s: exceptions %q: want %q", name, got, row.exceptions)
		}
	}
}

// A Mesh that is not understood leaves what held before.
func TestModeThatIsNotUnderstoodHolds(t *testing.T) {
	b := NewBuilder(policyConfig)
	apply := func(s MeshSpec) mesh.Mode {
		o := &Mesh{ObjectMeta: metav1.ObjectMeta{Name: MeshName}, Spec: s}
		k, _ := keyOf(o)
		b.Apply([]Event{{k, o}}, nil)
		return b.Mesh().Effective
	}
	odd := MeshSpec{Mode: "odd", Outbound: &MeshOutbound{Mode: "odd", Outside: "odd"}}
	for _, s := range []MeshSpec{{}, {Mode: StrictMode}, {Outbound: &MeshOutbound{Mode: StrictMode, Outside: OutsideListed}}} {
		want := apply(s)
		if got := apply(odd); !got.Equal(&want) || len(b.Mesh().Faults) != 3 {
			t.Errorf("%+v: then %+v holds: want %+v and 3 faults, have %q", s, got, want, b.Mesh().Faults)
		}
	}
}

// FuzzPeer: whatever is in a spec, what it comes to can be told, and what is not understood is no
// less strict than PERMISSIVE says.
func FuzzPeer(f *testing.F) {
	for _, s := range []string{`{"mtls":{"mode":"STRICT"}}`, `{"selector":{"matchLabels":{"app":"web"}},"portLevelMtls":{"80":{"mode":"PERMISSIVE"},"x":{}}}`, `{"mtls":null,"newer":1}`, `[]`, ``, `{"portLevelMtls":{"99999":{"mode":"STRICT"}}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, spec []byte) {
		p := keepPeer(&PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Namespace: "foo", Name: "p"}, Spec: spec})
		r := reader{cfg: policyConfig}
		read := r.readPeer(p)
		if err := withPeer(&mesh.Mode{Outbound: mesh.Strict}, &read).Check(); err != nil {
			t.Fatal(err)
		}
		if !json.Valid(spec) && len(spec) > 0 && (read.inbound != mesh.Strict || !slices.ContainsFunc(read.faults, func(f Fault) bool { return f.Effect == Denies })) {
			t.Fatalf("%+v of what is no JSON", read)
		}
	})
}
