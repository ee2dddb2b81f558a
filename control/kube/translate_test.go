package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/mesh"
	"tacit.dev/policy"
)

// policyConfig is a mesh as Istio's documentation has it.
var policyConfig = BuildConfig{TrustDomain: "cluster.local", Namespace: "tacit-system", RootNamespace: "istio-system"}

// policyPods are who is there: names are NAMESPACE/NAME, labels app=NAME and version.
const policyPods = `
apiVersion: v1
kind: Pod
metadata: {namespace: foo, name: httpbin, labels: {app: httpbin, version: v1, tacit.dev/mesh: "on"}}
spec: {nodeName: n1, serviceAccountName: httpbin}
status: {podIP: 10.1.0.1}
---
apiVersion: v1
kind: Pod
metadata: {namespace: foo, name: tcp-echo, labels: {app: tcp-echo, tacit.dev/mesh: "on"}}
spec: {nodeName: n1}
status: {podIP: 10.1.0.2}
---
apiVersion: v1
kind: Pod
metadata: {namespace: bar, name: httpbin, labels: {app: httpbin, version: v1, tacit.dev/mesh: "on"}}
spec: {nodeName: n1, serviceAccountName: httpbin}
status: {podIP: 10.1.0.3}
---
apiVersion: v1
kind: Service
metadata: {namespace: foo, name: echo}
spec: {clusterIP: 10.9.0.1, ports: [{name: tcp, port: 80, targetPort: 9000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: foo, name: echo-1, labels: {kubernetes.io/service-name: echo}}
addressType: IPv4
ports: [{name: tcp, port: 9000}]
endpoints: [{addresses: [10.1.0.2], targetRef: {kind: Pod, name: tcp-echo}}]
`

// doc is a policy: WHERE is NAMESPACE, or NAMESPACE/APP for a selector.
func doc(where, name, spec string) string {
	namespace, app, is := strings.Cut(where, "/")
	if is {
		spec = "selector: {matchLabels: {app: " + app + "}}, " + spec
	}
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: %s, name: %s}\nspec: {%s}\n", namespace, name, strings.TrimSuffix(spec, ", "))
}

// worldOf is what nodes know of the pods and the policies.
func worldOf(t *testing.T, policies string) *mesh.World {
	t.Helper()
	o, err := Decode([]byte(policyPods + policies))
	if err != nil {
		t.Fatal(err)
	}
	r := Build(o.kept(), policyConfig)
	return new(mesh.World).With(mesh.Changes{Workloads: r.Workloads, Services: r.Services, Policies: r.Policies}, time.Unix(0, 0))
}

// decide says what becomes of FROM>NAMESPACE/POD:PORT, where FROM is NAMESPACE/ACCOUNT, or an
// address for plaintext.
func decide(t *testing.T, w *mesh.World, connection string) bool {
	t.Helper()
	from, to, _ := strings.Cut(connection, ">")
	to, portText, _ := strings.Cut(to, ":")
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	c := policy.Connection{Source: netip.MustParseAddr("10.1.7.7")}
	if a, err := netip.ParseAddr(from); err == nil {
		c.Source = a
	} else if namespace, account, ok := strings.Cut(from, "/"); ok {
		c.Peer = policy.Proved(mesh.ID{TrustDomain: policyConfig.TrustDomain, Namespace: namespace, ServiceAccount: account})
	}
	for p := range w.Workloads() {
		if p.Namespace+"/"+p.Name() == to {
			c.Destination = netip.AddrPortFrom(p.Addresses[0], uint16(port))
			all, unknown := w.PoliciesOf(p)
			return policy.Compile(all, unknown, p.Mode).Decide(&c).Allowed
		}
	}
	t.Fatalf("%s: no such pod", connection)
	return false
}

// The examples and the precedence of Istio's documentation, as far as they are of connections,
// and what is not. Where Tacit differs a row says so, and docs/policy.md.
func TestPoliciesOfTheDocumentation(t *testing.T) {
	const curl = "principals: [cluster.local/ns/default/sa/curl]"
	from := func(source string) string { return "rules: [{from: [{source: {" + source + "}}]}]" }
	to := func(operation string) string { return "rules: [{to: [{operation: {" + operation + "}}]}]" }
	for _, row := range []struct {
		name, policies string
		allowed        string
		denied         string
	}{
		{"no policy allows", "", "default/curl>foo/httpbin:80 10.1.0.9>foo/httpbin:80", ""},
		{"allow-nothing", doc("foo", "p", ""), "default/curl>bar/httpbin:80", "default/curl>foo/httpbin:80 10.1.0.9>foo/tcp-echo:9000"},
		{"allow-all", doc("foo", "p", "rules: [{}]"), "default/curl>foo/httpbin:80 10.1.0.9>foo/httpbin:80", ""},
		{"deny-all", doc("foo", "p", "action: DENY, rules: [{}]"), "", "default/curl>foo/httpbin:80 10.1.0.9>foo/httpbin:80"},
		{"deny without rules does nothing", doc("foo", "p", "action: DENY"), "default/curl>foo/httpbin:80", ""},
		{"allow by principal, with a selector", doc("foo/httpbin", "p", from(curl)), "default/curl>foo/httpbin:80 x/y>foo/tcp-echo:9000", "x/y>foo/httpbin:80 default/other>foo/httpbin:80 10.1.0.9>foo/httpbin:80"},
		{"allow by namespace or principal", doc("foo", "p", "rules: [{from: [{source: {"+curl+"}}, {source: {namespaces: [test]}}]}]"), "default/curl>foo/httpbin:80 test/x>foo/httpbin:80", "default/x>foo/httpbin:80"},
		{"fields of a source are joined by and", doc("foo", "p", from("principals: ['*/sa/admin', '*/sa/dev'], namespaces: [prod, test], notIpBlocks: [10.1.7.7]")), "", "prod/admin>foo/httpbin:80"},
		{"the same from elsewhere", doc("foo", "p", from("principals: ['*/sa/admin', '*/sa/dev'], namespaces: [prod, test], notIpBlocks: [10.1.7.8]")), "prod/admin>foo/httpbin:80 test/dev>foo/httpbin:80", "prod/x>foo/httpbin:80 x/admin>foo/httpbin:80"},
		{"tcp ports", doc("foo/tcp-echo", "p", to(`ports: ["9000", "9001"]`)), "10.1.0.9>foo/tcp-echo:9000 x/y>foo/tcp-echo:9001", "x/y>foo/tcp-echo:9002"},
		{"deny a port", doc("foo/tcp-echo", "p", "action: DENY, "+to(`ports: ["9000"]`)), "x/y>foo/tcp-echo:9001", "x/y>foo/tcp-echo:9000"},
		{"not ports", doc("foo/tcp-echo", "p", "action: DENY, "+to(`notPorts: ["9000"]`)), "x/y>foo/tcp-echo:9000", "x/y>foo/tcp-echo:9001"},
		{"deny goes before allow", doc("foo", "a", from("namespaces: [test]")) + doc("foo", "d", "action: DENY, "+from("principals: ['*/ns/test/sa/bad']")), "test/good>foo/httpbin:80", "test/bad>foo/httpbin:80 x/y>foo/httpbin:80"},
		{"several allow", doc("foo", "a", from("namespaces: [a]")) + doc("foo", "b", from("namespaces: [b]")), "a/x>foo/httpbin:80 b/x>foo/httpbin:80", "c/x>foo/httpbin:80"},
		{"root namespace, and a namespace's own", doc("istio-system", "m", from("namespaces: [monitoring]")) + doc("foo", "own", from("namespaces: [a]")), "monitoring/x>foo/httpbin:80 a/x>foo/httpbin:80 monitoring/x>bar/httpbin:80", "a/x>bar/httpbin:80 c/x>foo/httpbin:80"},
		{"root namespace with a selector", doc("istio-system/httpbin", "m", ""), "x/y>foo/tcp-echo:9000", "x/y>foo/httpbin:80 x/y>bar/httpbin:80"},
		{"deny who is not of the mesh", doc("foo", "p", "action: DENY, "+from("notPrincipals: ['*']")), "x/y>foo/httpbin:80", "10.1.0.9>foo/httpbin:80"},
		{"allow who is of the mesh", doc("foo", "p", from("principals: ['*']")), "x/y>foo/httpbin:80", "10.1.0.9>foo/httpbin:80"},
		{"deny another namespace", doc("foo", "p", "action: DENY, "+from("notNamespaces: [foo]")), "foo/x>foo/httpbin:80", "bar/x>foo/httpbin:80 10.1.0.9>foo/httpbin:80"},
		{"prefix and suffix", doc("foo", "p", from("namespaces: [prod-*, '*-qa']")), "prod-a/x>foo/httpbin:80 a-qa/x>foo/httpbin:80", "a-prod/x>foo/httpbin:80 qa/x>foo/httpbin:80"},
		{"service accounts", doc("foo", "p", from("serviceAccounts: [local, bar/far]")), "foo/local>foo/httpbin:80 bar/far>foo/httpbin:80", "bar/local>foo/httpbin:80 foo/far>foo/httpbin:80 10.1.0.9>foo/httpbin:80"},
		{"not service accounts", doc("foo", "p", from("notServiceAccounts: [bad]")), "foo/x>foo/httpbin:80 10.1.0.9>foo/httpbin:80", "foo/bad>foo/httpbin:80"},
		{"ip blocks", doc("foo", "p", from("ipBlocks: [10.2.0.0/16, 10.1.0.9, 'fd00::/64']")), "10.2.3.4>foo/httpbin:80 10.1.0.9>foo/httpbin:80 fd00::1>foo/httpbin:80", "10.1.0.8>foo/httpbin:80 fd01::1>foo/httpbin:80"},
		{"conditions", doc("foo", "p", "rules: [{when: [{key: source.namespace, values: [a, b]}, {key: source.principal, notValues: ['*/sa/bad']}, {key: source.ip, values: [10.0.0.0/8]}, {key: destination.port, values: ['80']}, {key: destination.ip, notValues: [10.1.0.2]}]}]"), "a/x>foo/httpbin:80 b/x>foo/httpbin:80", "c/x>foo/httpbin:80 a/bad>foo/httpbin:80 a/x>foo/httpbin:81 a/x>foo/tcp-echo:80"},
		{"from, to and when are joined by and", doc("foo", "p", "rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.1.7.7]}]}]"), "a/x>foo/httpbin:80", "b/x>foo/httpbin:80 a/x>foo/httpbin:81"},
		{"dry run", strings.Replace(doc("foo", "p", ""), "name: p", "name: p, annotations: {istio.io/dry-run: 'true'}", 1), "x/y>foo/httpbin:80", ""},

		// What needs HTTP lets nobody in, and denies as far as the rest of its rule says.
		{"allow a method", doc("foo", "p", "rules: [{from: [{source: {"+curl+"}}], to: [{operation: {methods: [GET]}}]}]"), "", "default/curl>foo/httpbin:80 x/y>foo/httpbin:80"},
		{"allow a method, or a port", doc("foo", "p", "rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: ['90']}}]}]"), "x/y>foo/httpbin:90", "x/y>foo/httpbin:80"},
		{"deny a method on a port", doc("foo", "p", "action: DENY, "+to(`methods: [POST], ports: ["8080"]`)), "x/y>foo/httpbin:80", "x/y>foo/httpbin:8080"},
		{"deny a method of a namespace: differs from ztunnel, which denies nobody", doc("foo", "p", "action: DENY, rules: [{from: [{source: {namespaces: [dev]}}], to: [{operation: {methods: [POST]}}]}]"), "x/y>foo/httpbin:80", "dev/y>foo/httpbin:80"},
		{"deny a path: differs from ztunnel, which denies nobody", doc("foo", "p", "action: DENY, "+to("paths: [/admin*]")), "", "x/y>foo/httpbin:80"},
		{"deny by a token", doc("foo", "p", "action: DENY, rules: [{when: [{key: 'request.auth.claims[iss]', values: [x]}]}]"), "", "x/y>foo/httpbin:80"},
		{"deny a remote address", doc("foo", "p", "action: DENY, "+from("remoteIpBlocks: [192.0.2.1]")), "", "x/y>foo/httpbin:80"},
		{"one of two alternatives needs HTTP", doc("foo", "p", "action: DENY, rules: [{to: [{operation: {ports: ['90']}}, {operation: {paths: [/x]}}]}]"), "", "x/y>foo/httpbin:80 x/y>foo/httpbin:90"},

		// What is no value lets nobody in: Istio passes over it, or refuses the object.
		{"a port that is none, allowed: as ztunnel, which matches nothing then", doc("foo", "p", to("ports: [http]")), "", "x/y>foo/httpbin:80"},
		{"a port that is none, denied", doc("foo", "p", "action: DENY, "+to("ports: [http]")), "", "x/y>foo/httpbin:80"},
		{"an address that is none", doc("foo", "p", from("ipBlocks: [10.1.7.7, nonsense]")), "", "x/y>foo/httpbin:80"},
		{"a principal that can be nobody's, denied: differs, Istio denies nobody", doc("foo", "p", "action: DENY, "+from("principals: ['spiffe://cluster.local/ns/a/sa/b']")), "", "x/y>foo/httpbin:80"},
		{"a star in the middle", doc("foo", "p", "action: DENY, "+from("principals: ['*/ns/a/*']")), "", "x/y>foo/httpbin:80"},
		{"an empty source", doc("foo", "p", "rules: [{from: [{source: {}}]}]"), "", "x/y>foo/httpbin:80"},
		{"a field that nobody knows, allowed", doc("foo", "p", from(curl+", moons: [1]")), "", "default/curl>foo/httpbin:80"},
		{"a field that nobody knows, denied", doc("foo", "p", "action: DENY, "+from(curl+", moons: [1]")), "", "x/y>foo/httpbin:80"},
		{"an action that nobody knows", doc("foo/httpbin", "p", "action: MAYBE"), "x/y>foo/tcp-echo:9000", "x/y>foo/httpbin:80"},
		{"a selector with a star: who is meant is not known", doc("foo/'http*'", "p", "rules: [{}]"), "x/y>bar/httpbin:80", "x/y>foo/httpbin:80 x/y>foo/tcp-echo:9000"},

		// Actions and targets.
		{"custom: differs, ztunnel passes over it", doc("foo", "p", "action: CUSTOM, provider: {name: x}, "+to("ports: ['80']")), "x/y>foo/httpbin:81", "x/y>foo/httpbin:80"},
		{"audit", doc("foo", "p", "action: AUDIT, rules: [{}]"), "x/y>foo/httpbin:80", ""},
		{"a Service: differs, Istio needs a waypoint", doc("foo", "p", "targetRefs: [{kind: Service, name: echo}], "+from("namespaces: [a]")), "a/x>foo/tcp-echo:9000 x/y>foo/httpbin:80", "x/y>foo/tcp-echo:9000"},
		{"a port of a Service is not that of its pod", doc("foo", "p", "targetRef: {kind: Service, name: echo}, "+to("ports: ['9000']")), "", "x/y>foo/tcp-echo:9000"},
		{"a Service that is not there", doc("foo", "p", "targetRefs: [{kind: Service, name: none}]"), "x/y>foo/tcp-echo:9000", ""},
		{"a Gateway", doc("foo", "p", "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: g}]"), "x/y>foo/tcp-echo:9000", ""},
		// Policies that contradict each other, and that speak of what is not there.
		{"the same is allowed and denied", doc("foo", "a", from(curl)) + doc("foo", "b", "action: DENY, "+from(curl)), "", "default/curl>foo/httpbin:80 x/y>foo/httpbin:80"},
		{"all is allowed, and nothing is", doc("foo", "a", "rules: [{}]") + doc("foo", "b", ""), "x/y>foo/httpbin:80", ""},
		{"the mesh denies what a namespace allows", doc("istio-system", "m", "action: DENY, "+from(curl)) + doc("foo", "a", from(curl)), "", "default/curl>foo/httpbin:80"},
		{"a namespace denies what the mesh allows", doc("istio-system", "m", from(curl)) + doc("foo", "a", "action: DENY, "+from(curl)), "default/curl>bar/httpbin:80", "default/curl>foo/httpbin:80"},
		{"a pod denies what its namespace allows", doc("foo", "a", from(curl)) + doc("foo/httpbin", "b", "action: DENY, "+from(curl)), "default/curl>foo/tcp-echo:9000", "default/curl>foo/httpbin:80"},
		{"a range and its rest", doc("foo", "a", from("ipBlocks: [10.0.0.0/8], notIpBlocks: [10.0.0.0/8]")), "", "10.1.0.9>foo/httpbin:80 x/y>foo/httpbin:80"},
		{"who is and is not", doc("foo", "a", from("principals: ['*'], notPrincipals: ['*']")), "", "x/y>foo/httpbin:80 10.1.0.9>foo/httpbin:80"},
		{"an account that is not there", doc("foo", "a", from("serviceAccounts: [none/none]")), "none/none>foo/httpbin:80", "x/y>foo/httpbin:80"},
		{"a namespace that is not there", doc("foo", "a", from("namespaces: [none]")), "none/x>foo/httpbin:80", "x/y>foo/httpbin:80"},
		{"labels that no pod has", doc("foo/none", "a", ""), "x/y>foo/httpbin:80", ""},
		{"a namespace of its own that is not there", doc("none", "a", ""), "x/y>foo/httpbin:80", ""},
		{"a Service, and a selector", doc("foo/httpbin", "p", "targetRefs: [{kind: Service, name: echo}], rules: [{}]"), "", "x/y>foo/tcp-echo:9000 x/y>foo/httpbin:80"},
	} {
		w := worldOf(t, row.policies)
		for _, c := range strings.Fields(row.allowed) {
			if !decide(t, w, c) {
				t.Errorf("%s: %s is denied", row.name, c)
			}
		}
		for _, c := range strings.Fields(row.denied) {
			if decide(t, w, c) {
				t.Errorf("%s: %s is allowed", row.name, c)
			}
		}
	}
}

// The status says where a policy is enforced, and why it is not.
func TestWhereAPolicyIsEnforced(t *testing.T) {
	const outside = "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: bar, name: out, labels: {app: out}}\nspec: {nodeName: n1}\nstatus: {podIP: 10.1.0.4}\n"
	for policy, want := range map[string]string{
		doc("foo", "p", ""):                                          "True AtDestination",
		doc("foo/httpbin", "p", ""):                                  "True AtDestination",
		doc("bar", "p", ""):                                          "False OutsideMesh",
		doc("bar/httpbin", "p", ""):                                  "True AtDestination",
		doc("bar/out", "p", ""):                                      "False OutsideMesh",
		doc("istio-system", "p", ""):                                 "True AtDestination",
		doc("istio-system/out", "p", ""):                             "False OutsideMesh",
		doc("foo/none", "p", ""):                                     "False NoPods",
		doc("empty", "p", ""):                                        "False NoPods",
		doc("foo", "p", "action: AUDIT"):                             "False NotEnforced",
		doc("foo", "p", "action: MAYBE"):                             "True AtDestination",
		doc("foo", "p", "targetRefs: [{kind: Service, name: echo}]"): "True AtDestination",
		strings.Replace(doc("foo", "p", ""), "name: p", "name: p, annotations: {istio.io/dry-run: 'true'}", 1): "False DryRun",
	} {
		o, err := Decode([]byte(policyPods + outside + policy))
		if err != nil {
			t.Fatal(err)
		}
		facts := Build(o.kept(), policyConfig).Policed
		if c := facts[0].Want[1]; string(c.Status)+" "+c.Reason != want || c.Message == "" {
			t.Errorf("%s: %s %s (%s), want %s", policy, c.Status, c.Reason, c.Message, want)
		}
	}
}

// Of another trust domain than cluster.local, principals of cluster.local are its own.
func TestPrincipalsOfAnotherTrustDomain(t *testing.T) {
	r := reader{cfg: BuildConfig{TrustDomain: "td.example"}}
	p := &AuthorizationPolicy{Spec: json.RawMessage(`{"rules":[{"from":[{"source":{"principals":["cluster.local/ns/a/sa/b","cluster.local/ns/a/*","*/ns/a/sa/b","old/ns/a/sa/b"]}}]}]}`)}
	p.Namespace, p.Name = "n", "p"
	got := r.translate(p)
	want := []mesh.Pattern{{Text: "td.example/ns/a/sa/b"}, {Kind: mesh.Prefix, Text: "td.example/ns/a/"}, {Kind: mesh.Suffix, Text: "/ns/a/sa/b"}, {Text: "old/ns/a/sa/b"}}
	if is := got.policy.Rules[0].Clauses[0][0].Principals; !slices.Equal(is, want) {
		t.Errorf("principals %v, want %v", is, want)
	}
	if len(got.faults) != 1 || got.faults[0].Effect != Never || !strings.Contains(got.faults[0].Path, "principals[3]") {
		t.Errorf("faults %+v: want one, of the principal of another trust domain", got.faults)
	}
}

// Beyond each bound the policy denies, and says so.
func TestPoliciesAreBounded(t *testing.T) {
	for name, spec := range map[string]string{
		"bytes":       `{"rules":[{"from":[{"source":{"namespaces":["` + strings.Repeat("a", maxPolicySpec) + `"]}}]}]}`,
		"rules":       `{"rules":[` + strings.Repeat(`{},`, maxPolicyRules) + `{}]}`,
		"values":      `{"rules":[{"to":[{"operation":{"ports":[` + strings.Repeat(`"1",`, maxRuleValues) + `"1"]}}]}]}`,
		"targets":     `{"targetRefs":[` + strings.Repeat(`{"kind":"Service","name":"s"},`, maxTargets) + `{"kind":"Service","name":"s"}],"rules":[{}]}`,
		"faults":      `{"action":"DENY","rules":[` + strings.Repeat(`{"to":[{"operation":{"ports":["x"]}}]},`, 2*maxPolicyFaults) + `{}]}`,
		"a long text": `{"rules":[{"from":[{"source":{"namespaces":["` + strings.Repeat("a", 2000) + `"]}}]}]}`,
	} {
		p := &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p"}, Spec: json.RawMessage(spec)}
		faults := CheckPolicy(keepPolicy(p), policyConfig)
		r := reader{cfg: policyConfig}
		got := r.translate(keepPolicy(p))
		if c := accepted(got.faults); c.Status != metav1.ConditionFalse || len(c.Message) > 4096 || len(faults) == 0 || len(faults) > maxPolicyFaults {
			t.Errorf("%s: %d faults, condition %+.300v", name, len(faults), c)
		}
		c := policy.Connection{Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.2:1")}
		if policy.Compile([]*mesh.Policy{got.policy}, nil, nil).Decide(&c).Allowed {
			t.Errorf("%s: it lets somebody in", name)
		}
	}
	var o Objects
	for i := range maxPolicies + 2 {
		o.Policies = append(o.Policies, &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: fmt.Sprintf("p%04d", i)}, Spec: json.RawMessage(`{"rules":[{}]}`)})
	}
	r := Build(o, policyConfig)
	if len(r.Policies) != maxPolicies+1 || r.Policies[0].Name != standIn || r.Policies[0].Action != mesh.Deny || r.Policies[0].Scope != mesh.WholeNamespace {
		t.Errorf("%d policies, the first %+v: want %d and one that denies", len(r.Policies), r.Policies[0], maxPolicies)
	}
	if f := r.Policed[maxPolicies]; f.Want[0].Reason != TooMuch || r.Policed[0].Want[0].Reason != Accepted {
		t.Errorf("the first that is too much shows %+v", f.Want)
	}
}

// Whoever has more labels than are read may have any.
func TestPodsOfTooManyLabels(t *testing.T) {
	many := policyPods
	for i := range maxPodLabels {
		many = strings.Replace(many, "app: tcp-echo", fmt.Sprintf("app: tcp-echo, l%d: x", i), 1)
	}
	for policies, allowed := range map[string]bool{"": true, doc("foo", "p", "rules: [{}]"): true, doc("foo/other", "p", "rules: [{}]"): false, doc("bar/other", "p", "rules: [{}]"): true} {
		o, err := Decode([]byte(many + policies))
		if err != nil {
			t.Fatal(err)
		}
		r := Build(o.kept(), policyConfig)
		w := new(mesh.World).With(mesh.Changes{Workloads: r.Workloads, Policies: r.Policies}, time.Unix(0, 0))
		if got := decide(t, w, "x/y>foo/tcp-echo:9000"); got != allowed {
			t.Errorf("%q: allowed %v, want %v", policies, got, allowed)
		}
	}
}

// Whatever an object says, what comes of it is bounded, can be told to nodes, and never lets
// in by a rule that is not understood.
func FuzzTranslate(f *testing.F) {
	for _, spec := range []string{
		"", "{}", "null", `"x"`, `{"rules":null}`, `{"rules":[{}]}`, `{"rules":[null]}`, `{"action":"DENY","rules":[{"from":[{"source":null}],"to":[{}],"when":[{"key":"source.ip","values":["::ffff:1.2.3.4/96","1.2.3.4%x"]}]}]}`,
		`{"selector":{"matchLabels":{"a":"b"}},"targetRefs":[{"kind":"Service","name":"s"}]}`, `{"targetRef":{"kind":"Gateway","name":"g"}}`,
		`{"rules":[{"from":[{"source":{"principals":["*","a*","*a","**",""],"notPrincipals":["*"],"ipBlocks":["0.0.0.0/0"],"notIpBlocks":["::/0"],"serviceAccounts":["a/b/c"]}}]}]}`,
	} {
		f.Add([]byte(spec), "true")
	}
	f.Fuzz(func(t *testing.T, spec []byte, dry string) {
		p := &AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", Annotations: map[string]string{AnnotationDryRun: dry}}, Spec: spec}
		r := reader{cfg: policyConfig}
		got := r.translate(keepPolicy(p))
		if len(got.faults) > maxPolicyFaults || len(got.services) > maxTargets || len(got.labels) > maxPodLabels {
			t.Fatalf("%d faults, %d services, %d labels", len(got.faults), len(got.services), len(got.labels))
		}
		if got.policy == nil {
			if len(got.faults) == 0 {
				t.Fatal("nothing is enforced, and nobody is told")
			}
			return
		}
		if err := got.policy.Check(); err != nil {
			t.Fatal(err)
		}
		if got.policy.Scope == mesh.Named && len(got.labels)+len(got.services) == 0 {
			t.Fatal("it is for nobody")
		}
		for _, x := range got.policy.Rules {
			if x.Unenforceable != "" && !slices.ContainsFunc(got.faults, func(f Fault) bool { return f.Effect == Denies }) {
				t.Fatalf("rule %+v, and nobody is told", x)
			}
		}
		if c := accepted(got.faults); len(c.Message) > 4096 {
			t.Fatalf("a message of %d bytes", len(c.Message))
		}
	})
}
