package install

import (
	"fmt"
	"strings"
	"testing"

	"tacit.dev/e2e/cluster"
	"tacit.dev/e2e/mesh"
)

// Every node of the cluster starts with the startup taint. CoreDNS does not tolerate it: nobody answers
// names before control has taken the taint away, and control does that for nodes that have found it.
func TestEveryNodeStartsTainted(t *testing.T) {
	options := cluster.Options{Nodes: 2, Taints: []string{"tacit.dev/agent-not-ready=true:NoSchedule"}}
	s := subject{mesh.Start(t, mesh.Options{Options: options, Bare: true}), t}
	if out := s.kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.taints[*].key}"); strings.Count(out, "tacit.dev/agent-not-ready") != 2 {
		t.Fatalf("taints: %q, want that of two nodes", out)
	}
	t.Log(s.tacit(flags("install", "--timeout=3m")...))
	s.eventually(func() error {
		if out := s.kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.taints}"); strings.TrimSpace(out) != "" {
			return fmt.Errorf("taints %s, want none", out)
		}
		return nil
	})
	s.kubectl("rollout", "status", "-n", "kube-system", "--timeout=2m", "deployment/coredns")
	pods := s.shop()
	s.kubectl("label", "namespace", "shop", "tacit.dev/mesh=on")
	s.tacit("check", "--wait")
	if err := s.dial(pods[0], elsewhere(pods, pods[0])); err != nil {
		t.Error(err)
	}
}
