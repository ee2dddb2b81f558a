package cli

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

// testObjects are a shop in the mesh, a client and a server that are not, and two nodes.
func testObjects(t *testing.T) kube.Objects {
	t.Helper()
	var text strings.Builder
	text.WriteString(`
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {tacit.dev/mesh: "on", kubernetes.io/metadata.name: shop}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy, labels: {kubernetes.io/metadata.name: legacy}}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.1.1.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDR: 10.1.2.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.0.2}]}
`)
	for i, p := range []struct{ space, name, shown string }{
		{"shop", "frontend", "True"}, {"shop", "cart", "True"}, {"shop", "db", "True"}, {"legacy", "report", ""}, {"legacy", "ledger", ""},
	} {
		status := ""
		if p.shown != "" {
			status = `, {type: tacit.dev/Protected, status: "True", reason: Captured, lastTransitionTime: "2026-01-02T00:00:00Z"}`
		}
		fmt.Fprintf(&text, `---
apiVersion: v1
kind: Pod
metadata:
  name: %[2]s-7d4b9-x1
  namespace: %[1]s
  uid: uid-%[2]s
  labels: {app: %[2]s, pod-template-hash: 7d4b9}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: %[2]s-7d4b9, uid: x, controller: true}]
spec: {nodeName: n1, serviceAccountName: %[2]s, containers: [{name: c, ports: [{containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.1.%[3]d, podIPs: [{ip: 10.1.1.%[3]d}], conditions: [{type: Ready, status: "True"}%[4]s]}
`, p.space, p.name, i+2, status)
	}
	o, err := kube.Decode([]byte(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

var both = modeChange{kube.StrictMode, true, true}

var seenAt = time.Date(2026, 1, 3, 4, 5, 6, 0, time.UTC)

func partyAt(name string) mesh.Party {
	space, workload, _ := strings.Cut(name, "/")
	switch {
	case space == "node":
		return mesh.Party{Where: mesh.AtNode, Node: workload}
	case space == "block":
		where, block := mesh.Outside, netip.MustParsePrefix(workload)
		if block.IsSingleIP() {
			where = mesh.InCluster
		}
		return mesh.Party{Where: where, Block: block}
	}
	return mesh.Party{Where: mesh.AtWorkload, Namespace: space, Workload: workload, Account: workload}
}

func pair(crossing mesh.Crossing, from, to string, port uint16, last time.Time) mesh.Pair {
	reporter := mesh.ByDestination
	if crossing == mesh.PlaintextOut {
		reporter = mesh.BySource
	}
	return mesh.Pair{
		Way:         mesh.Way{Source: partyAt(from), Destination: partyAt(to), Port: port, Crossing: crossing, Reporter: reporter},
		Connections: 3, Bytes: 1000, First: last.Add(-time.Hour), Last: last,
	}
}

// testObserved has one of everything.
func testObserved(t *testing.T, objects kube.Objects) observed {
	o := observed{present: newPresent(objects, kube.BuildConfig{TrustDomain: "mesh.example", Namespace: namespace})}
	o.Pairs = []mesh.Pair{
		pair(mesh.CrossedByTLS, "shop/frontend", "shop/cart", 8080, seenAt),
		pair(mesh.CrossedByTLS, "shop/frontend", "shop/cart", 9090, seenAt),
		pair(mesh.CrossedByTLS, "shop/db", "shop/cart", 9090, seenAt),
		pair(mesh.CrossedByTLS, "shop/cart", "shop/db", 5432, seenAt),
		pair(mesh.Denied, "shop/frontend", "shop/db", 5432, seenAt),
		pair(mesh.PlaintextIn, "shop/cart", "shop/db", 5432, time.Date(2026, 1, 2, 0, 0, 10, 0, time.UTC)), // before it was protected
		pair(mesh.PlaintextIn, "legacy/report", "shop/db", 5432, seenAt),
		pair(mesh.PlaintextIn, "node/n2", "shop/cart", 8080, seenAt),
		pair(mesh.PlaintextOut, "shop/cart", "legacy/ledger", 7000, seenAt),
		pair(mesh.PlaintextOut, "shop/cart", "block/203.0.113.0/24", 443, seenAt),
	}
	slices.SortFunc(o.Pairs, kube.ComparePairs)
	return o
}

func TestFlows(t *testing.T) {
	o := testObserved(t, testObjects(t))
	o.Other, o.Dropped = 1, 7
	var out strings.Builder
	if err := showFlows(&out, o.PairShard, modeTarget{"shop", "db"}, false); err != nil {
		t.Fatal(err)
	}
	want := `FROM           TO         PORT  CROSSED       CONNECTIONS  BYTES  FIRST                 LAST
shop/db        shop/cart  9090  mtls          3            1000   2026-01-03T03:05:06Z  2026-01-03T04:05:06Z
legacy/report  shop/db    5432  plaintext in  3            1000   2026-01-03T03:05:06Z  2026-01-03T04:05:06Z
shop/cart      shop/db    5432  mtls          3            1000   2026-01-03T03:05:06Z  2026-01-03T04:05:06Z
shop/cart      shop/db    5432  plaintext in  3            1000   2026-01-01T23:00:10Z  2026-01-02T00:00:10Z
shop/frontend  shop/db    5432  denied        3            1000   2026-01-03T03:05:06Z  2026-01-03T04:05:06Z
not complete: nodes had no room to record the ends of 1 connection
not complete: control has forgotten the oldest 7 pairs
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	out.Reset()
	if err := showFlows(&out, o.PairShard, modeTarget{}, true); err != nil || !strings.Contains(out.String(), `"crossing": "plaintext in"`) {
		t.Errorf("as JSON: %v\n%s", err, out.String())
	}
	for _, bad := range []string{"/", "shop/", "a/b/c", "/web"} {
		if _, err := parseModeTarget([]string{bad}); err == nil {
			t.Errorf("%q is a scope", bad)
		}
	}
}

// A dry run names exactly who would break, with what to do about each.
func TestStrictDryRun(t *testing.T) {
	o := testObserved(t, testObjects(t))
	const rest = "would break: 3 (observed since 2026-01-01T23:00:10Z)\n"
	want := `client legacy/report: not enrolled
    legacy/report -> shop/db:5432, 3 connections, first 2026-01-03T03:05:06Z, last 2026-01-03T04:05:06Z
    remedy: enroll it: kubectl label namespace legacy tacit.dev/mesh=on
client node n2: its host network
    node n2 -> shop/cart:8080, 3 connections, first 2026-01-03T03:05:06Z, last 2026-01-03T04:05:06Z
    remedy: admit nodes: annotate the pods of shop/cart with tacit.dev/admit-nodes=8080
server legacy/ledger: not enrolled
    shop/cart -> legacy/ledger:7000, 3 connections, first 2026-01-03T03:05:06Z, last 2026-01-03T04:05:06Z
    remedy: enroll it: kubectl label namespace legacy tacit.dev/mesh=on; or allow it: annotate the pods of shop/cart with tacit.dev/outbound-allowed=7000
`
	var out strings.Builder
	if !o.tellBreaks(&out, o.breaks(modeTarget{}, both, seenAt.Add(-24*time.Hour))) {
		t.Error("nobody would break")
	}
	if d := cmp.Diff(want+rest, out.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for _, row := range []struct {
		scope modeTarget
		since time.Time
		want  []string
	}{
		{modeTarget{"shop", "db"}, seenAt, []string{"client legacy/report: not enrolled"}},
		{modeTarget{"shop", "cart"}, seenAt, []string{"client node n2: its host network", "server legacy/ledger: not enrolled"}},
		{modeTarget{"legacy", ""}, seenAt, nil},
		{modeTarget{}, seenAt.Add(time.Second), nil},
	} {
		var got []string
		for _, b := range o.breaks(row.scope, both, row.since) {
			got = append(got, b.who)
		}
		if d := cmp.Diff(row.want, got); d != "" {
			t.Errorf("%v (-want +got):\n%s", row.scope, d)
		}
	}
}

// Whoever strange is named as what it is.
func TestWhoWouldBreak(t *testing.T) {
	o := testObserved(t, testObjects(t))
	for want, p := range map[string]mesh.Pair{
		"client 10.1.2.1: the host network of node n2, or a pod that is gone": pair(mesh.PlaintextIn, "block/10.1.2.1/32", "shop/db", 1, seenAt),
		"client 10.9.9.9: no pod is known there":                              pair(mesh.PlaintextIn, "block/10.9.9.9/32", "shop/db", 1, seenAt),
		"client 203.0.113.0/24: outside of the cluster":                       pair(mesh.PlaintextIn, "block/203.0.113.0/24", "shop/db", 1, seenAt),
		"client legacy/cron: it has no pods now":                              pair(mesh.PlaintextIn, "legacy/cron", "shop/db", 1, seenAt),
		"client shop/cart: enrolled, and it still sends plaintext":            pair(mesh.PlaintextIn, "shop/cart", "shop/db", 1, seenAt),
		"server shop/db: enrolled, and port 1 is excluded":                    pair(mesh.PlaintextOut, "shop/cart", "shop/db", 1, seenAt),
		"server node n1: its host network":                                    pair(mesh.PlaintextOut, "shop/cart", "node/n1", 1, seenAt),
		"server legacy/gone: it has no pods now":                              pair(mesh.PlaintextOut, "shop/cart", "legacy/gone", 1, seenAt),
		"server 10.9.9.9: no pod is known there":                              pair(mesh.PlaintextOut, "shop/cart", "block/10.9.9.9/32", 1, seenAt),
	} {
		o.Pairs = []mesh.Pair{p}
		if got := o.breaks(modeTarget{}, both, seenAt); len(got) != 1 || got[0].who != want || got[0].remedy == "" {
			t.Errorf("%+v, want %q", got, want)
		}
	}
}

func TestSuggest(t *testing.T) {
	o := testObserved(t, testObjects(t))
	var out strings.Builder
	if err := o.suggest(&out, modeTarget{}, true); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "suggest.yaml")
	if os.Getenv("TACIT_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), out.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	slices.Reverse(o.Pairs)
	var again strings.Builder
	if err := o.suggest(&again, modeTarget{}, true); err != nil || again.String() != out.String() {
		t.Errorf("another order, another text (%v)", err)
	}
}

// Applied, what is suggested denies nothing that was observed, and what was not.
func TestSuggestedPoliciesAllowWhatWasObserved(t *testing.T) {
	objects := testObjects(t)
	o := testObserved(t, objects)
	var text strings.Builder
	if err := o.suggest(&text, modeTarget{}, false); err != nil {
		t.Fatal(err)
	}
	suggested, err := kube.Decode([]byte(text.String()))
	if err != nil || len(suggested.Policies) != 2 {
		t.Fatalf("%d policies: %v", len(suggested.Policies), err)
	}
	cfg := kube.BuildConfig{TrustDomain: "mesh.example", Namespace: namespace}
	for _, p := range suggested.Policies {
		if faults := kube.CheckPolicy(p, cfg); len(faults) > 0 {
			t.Errorf("policy %s: %v", p.Name, faults)
		}
	}
	objects.Policies = suggested.Policies
	now := newPresent(objects, cfg)
	for _, row := range []struct {
		client, server string
		port           uint16
		want           string
	}{
		{"shop/frontend", "shop/cart", 8080, "yes: shop/frontend (spiffe://mesh.example/ns/shop/sa/frontend) -> shop/cart:8080: allowed by rule 0 of policy shop/cart\n"},
		{"shop/frontend", "shop/cart", 9090, "yes: shop/frontend (spiffe://mesh.example/ns/shop/sa/frontend) -> shop/cart:9090: allowed by rule 0 of policy shop/cart\n"},
		{"shop/db", "shop/cart", 9090, "yes: shop/db (spiffe://mesh.example/ns/shop/sa/db) -> shop/cart:9090: allowed by rule 1 of policy shop/cart\n"},
		{"shop/db", "shop/cart", 8080, "no: shop/db (spiffe://mesh.example/ns/shop/sa/db) -> shop/cart:8080: allowed by no rule of policy shop/cart or of another one\n"},
		{"shop/frontend", "shop/db", 5432, "no: shop/frontend (spiffe://mesh.example/ns/shop/sa/frontend) -> shop/db:5432: allowed by no rule of policy shop/db or of another one\n"},
		{"legacy/report", "shop/db", 5432, "yes: legacy/report (not enrolled: no identity) -> shop/db:5432: allowed by rule 1 of policy shop/db\n"},
		{"legacy/report", "shop/db", 22, "no: legacy/report (not enrolled: no identity) -> shop/db:22: allowed by no rule of policy shop/db or of another one\n"},
		{"192.168.0.2", "shop/cart", 8080, "yes: 192.168.0.2 (no identity) -> shop/cart:8080: allowed by rule 2 of policy shop/cart\n"},
		{"192.168.0.1", "shop/cart", 8080, "no: 192.168.0.1 (no identity) -> shop/cart:8080: allowed by no rule of policy shop/cart or of another one\n"},
		{"shop/cart", "legacy/ledger", 7000, "yes: shop/cart (spiffe://mesh.example/ns/shop/sa/cart) -> legacy/ledger:7000: the server is not enrolled, so no policy is enforced there\n"},
		{"shop/db", "shop/frontend", 1, "yes: shop/db (spiffe://mesh.example/ns/shop/sa/db) -> shop/frontend:1: no policy applies\n"},
	} {
		var out strings.Builder
		yes, err := now.whoCan(&out, row.client, row.server, row.port)
		if d := cmp.Diff(row.want, out.String()); d != "" || err != nil || yes != strings.HasPrefix(row.want, "yes") {
			t.Errorf("%v %v (-want +got):\n%s", yes, err, d)
		}
	}
	for _, row := range [][2]string{{"shop/nobody", "shop/cart"}, {"shop/cart", "shop/nobody"}, {"fd00::1", "shop/cart"}} {
		if yes, err := now.whoCan(&strings.Builder{}, row[0], row[1], 1); yes {
			t.Errorf("%v: yes (%v)", row, err)
		}
	}
}

// The command reads files, and its exit code is the answer.
func TestPolicyWhoCan(t *testing.T) {
	file := filepath.Join(t.TempDir(), "all.yaml")
	text := `apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {tacit.dev/mesh: "on"}}
spec: {nodeName: n1, containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 81}]}]}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some, namespace: shop}
spec: {rules: [{to: [{operation: {ports: ["80"]}}]}]}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		server string
		code   int
	}{{"shop/web:80", 0}, {"shop/web:81", 1}, {"shop/web", 2}, {"shop/gone", 2}, {"shop/web:0", 2}, {"shop/web:x", 2}} {
		cmd := policyCommand()
		cmd.SetOut(&strings.Builder{})
		cmd.SetErr(&strings.Builder{})
		cmd.SetArgs([]string{"who-can", "-f", file, "shop/web", row.server})
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		if code := exitCode(cmd.ExecuteContext(t.Context()), &strings.Builder{}); code != row.code {
			t.Errorf("%s: exit code %d, want %d", row.server, code, row.code)
		}
	}
}
