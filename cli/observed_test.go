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
	if err := showFlows(&out, o.PairShard, scope{"shop", "db"}, false); err != nil {
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
	if err := showFlows(&out, o.PairShard, scope{}, true); err != nil || !strings.Contains(out.String(), `"crossing": "plaintext in"`) {
		t.Errorf("as JSON: %v\n%s", err, out.String())
	}
	for _, bad := range []string{"/", "shop/", "a/b/c", "/web"} {
		if _, err := parseScope([]string{bad}); err == nil {
			t.Errorf("%q is a scope", bad)
		}
	}
}

func TestSuggest(t *testing.T) {
	o := testObserved(t, testObjects(t))
	var out strings.Builder
	if err := o.suggest(&out, scope{}, true); err != nil {
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
	if err := o.suggest(&again, scope{}, true); err != nil || again.String() != out.String() {
		t.Errorf("another order, another text (%v)", err)
	}
}
