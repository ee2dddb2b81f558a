package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Each fault is told with its line and a remedy, and the exit code says whether there is one.
func TestPolicyCheck(t *testing.T) {
	const good = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: good, namespace: shop}
spec:
  rules:
  - from:
    - source: {namespaces: [web]}
`
	const bad = `# two policies, and what is none
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: shop}
- apiVersion: security.istio.io/v1beta1
  kind: AuthorizationPolicy
  metadata:
    name: bad
    namespace: shop
  spec:
    rules:
    - to:
      - operation:
          methods: [GET]
      when:
      - key: source.principal
        values:
        - cluster.local/ns/a/sa/b
        - elsewhere/ns/a/sa/b
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: audit}
spec: {action: AUDIT}
`
	for _, row := range []struct {
		name, text string
		want       string
		code       int
	}{
		{"good", good, "F:1: shop/good: ok\npolicies: 1, faults: 0\n", 0},
		{"bad", bad, `F:17: shop/bad: denies: spec.rules[0].to[0].operation.methods: a field of HTTP cannot be enforced without a waypoint
    remedy: remove it, or use principals, namespaces, serviceAccounts, ipBlocks and ports
F:22: shop/bad: never matches: spec.rules[0].when[0].values[1]: "elsewhere/ns/a/sa/b" never matches: the mesh admits no other trust domain than cluster.local
    remedy: use the trust domain cluster.local, or * instead
F:27: default/audit: ignored: spec.action: AUDIT is not supported: the access log has every connection
    remedy: remove the policy, or use the annotation istio.io/dry-run
policies: 2, faults: 3
`, 2},
		{"none", "kind: [", "", 1},
	} {
		file := filepath.Join(t.TempDir(), "p.yaml")
		if err := os.WriteFile(file, []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		cmd := policyCommand()
		cmd.SetOut(&out)
		cmd.SetArgs([]string{"check", file})
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		code := exitCode(cmd.ExecuteContext(t.Context()), &strings.Builder{})
		if diff := cmp.Diff(row.want, strings.ReplaceAll(out.String(), file, "F")); diff != "" || code != row.code {
			t.Errorf("%s: exit code %d, want %d (-want +got):\n%s", row.name, code, row.code, diff)
		}
	}
}
