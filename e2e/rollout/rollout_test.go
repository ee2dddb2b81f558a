package rollout

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/mesh"
)

// TestUnderLoad is one cluster's life under load: a cluster for each part would cost
// half a minute more.
func TestUnderLoad(t *testing.T) {
	m := mesh.Start(t, mesh.Options{Load: true})
	wire := m.Record(t)
	s := openShop(t, m)
	for _, part := range []struct {
		name   string
		change func(*shop)
		// kinds are the connections on which no request may fail.
		kinds []string
	}{
		{"nothing changes", func(*shop) {}, both},
		{"servers are rolled out", rollServers, both},
		{"clients are rolled out", rollClients, both},
		{"servers are scaled to one and back", scaleServers, both},
		{"each replica of control is replaced", replaceControl, both},
		{"the leader of control dies", killLeader, both},
		{"the API server is away", apiAway, both},
		{"the nodes' pods are rolled out", rollNodes, []string{"new"}},
	} {
		t.Run(part.name, func(t *testing.T) {
			s.T = t
			s.noneFailed(s.load(func() { part.change(s) }), part.kinds...)
		})
	}
	s.T = t
	if events := s.Kubectl("get", "events", "-n", "shop", "--field-selector=reason=NotProtected", "-o", "jsonpath={.items[*].message}"); events != "" {
		t.Errorf("pods were said to be unprotected: %s", events)
	}
	wire.Hidden("GET / HTTP", "this is server-")
	wire.Clear(`"kind":"kept"`) // what the clients tell the collector: the wire was seen
	t.Run("the namespace leaves and comes back", func(t *testing.T) {
		s.T = t
		s.noneFailed(s.load(s.leaveAndReturn), both...)
	})
}

// both kinds of connections: those that are kept, and new ones.
var both = []string{"kept", "new"}

func rollServers(s *shop) {
	s.Kubectl("rollout", "restart", "-n", "shop", "deployment/server")
	s.Kubectl("rollout", "status", "-n", "shop", "deployment/server")
}

func rollClients(s *shop) {
	s.Kubectl("rollout", "restart", "-n", "shop", "deployment/client")
	s.Kubectl("rollout", "status", "-n", "shop", "deployment/client")
}

func scaleServers(s *shop) {
	for _, n := range []string{"1", "5", "2"} {
		s.Kubectl("scale", "-n", "shop", "deployment/server", "--replicas="+n)
		s.Kubectl("rollout", "status", "-n", "shop", "deployment/server")
	}
}

func (s *shop) leaveAndReturn() {
	for _, to := range []string{"off", "on"} {
		s.Kubectl("label", "namespace", "shop", "--overwrite", "tacit.dev/mesh="+to)
		s.protected(to == "on")
	}
}

func replaceControl(s *shop) {
	for _, pod := range s.pods("tacit-system", "app.kubernetes.io/name=tacit-control") {
		s.Kubectl("delete", "pod", "-n", "tacit-system", pod)
		s.Kubectl("rollout", "status", "-n", "tacit-system", "deployment/tacit-control")
	}
}

func killLeader(s *shop) {
	s.Await("somebody leads", func(context.Context) error { return differs(s.leader(), "") })
	before := s.leader()
	s.Kubectl("delete", "pod", "-n", "tacit-system", before, "--grace-period=0", "--force")
	s.Await("somebody else leads", func(context.Context) error { return differs(s.leader(), before) })
	s.Kubectl("rollout", "status", "-n", "tacit-system", "deployment/tacit-control")
}

// away is how long the API server is stopped: much longer than a lease lives, so that
// control has no leader, and longer than until nodes count as lost. With TACIT_SOAK it
// is as long as users were promised.
func away() time.Duration {
	if os.Getenv("TACIT_SOAK") != "" {
		return 5 * time.Minute
	}
	return time.Minute
}

// apiAway stops the API server for a while.
func apiAway(s *shop) {
	pid, err := s.Mesh.Pid("control-plane", "kube-apiserver")
	if err != nil {
		s.T.Fatal(err)
	}
	renewed := []string{"get", "lease", "-n", "tacit-system", "tacit-control", "-o", "jsonpath={.spec.renewTime}"}
	before := s.Kubectl(renewed...)
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		s.T.Fatal(err)
	}
	s.steady(away())
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		s.T.Fatal(err)
	}
	s.Await("the API server answers and somebody leads", func(ctx context.Context) error {
		now, err := s.Mesh.Kubectl(ctx, renewed...)
		return cmp.Or(err, differs(strings.TrimSpace(now), before))
	})
}

func rollNodes(s *shop) {
	s.Kubectl("rollout", "restart", "-n", "tacit-system", "daemonset/tacit-node")
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node")
}

// leader is the pod that holds the lease of control.
func (s *shop) leader() string {
	s.T.Helper()
	holder := s.Kubectl("get", "lease", "-n", "tacit-system", "tacit-control", "-o", "jsonpath={.spec.holderIdentity}")
	name, _, _ := strings.Cut(holder, "@")
	return name
}

func differs(now, before string) error {
	if now == before || now == "" {
		return fmt.Errorf("it is %q, and was %q", now, before)
	}
	return nil
}
