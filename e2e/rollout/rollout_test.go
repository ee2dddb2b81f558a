package rollout

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

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
		// clients are how many ask, one after the other or at once.
		clients int
		// kinds are the connections on which no request may fail.
		kinds []string
	}{
		{"nothing changes", func(*shop) {}, 2, both},
		{"servers are rolled out", rollServers, 2, both},
		{"clients are rolled out", rollClients, 4, both},
		{"servers are scaled to one and back", scaleServers, 2, both},
		{"each replica of control is replaced", replaceControl, 2, both},
		{"the leader of control dies", killLeader, 2, both},
		{"the API server is away", apiAway, 2, both},
		{"the nodes' pods are deleted", deleteNodes, 2, nil},
		{"the nodes' pods are rolled out", rollNodes, 2, []string{"new"}},
	} {
		t.Run(part.name, func(t *testing.T) {
			s.T = t
			s.noneFailed(s.load(func() { part.change(s) }), part.clients, part.kinds...)
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
		s.noneFailed(s.load(s.leaveAndReturn), 2, both...)
		again := m.Record(t) // connections of before have ended with those clients
		s.noneFailed(s.load(func() {}), 2, both...)
		again.Hidden("GET / HTTP", "this is server-")
		again.Clear(`"kind":"kept"`)
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

// deleteNodes takes agent and proxy of every node away, at once: what is on its way then
// may fail. That all is well afterwards is the next part's to show.
func deleteNodes(s *shop) {
	s.Kubectl("delete", "pod", "-n", "tacit-system", "-l", nodePods)
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node")
}

func rollNodes(s *shop) {
	without, nodes := s.nodesWithout(), len(s.pods("tacit-system", nodePods))
	s.Kubectl("rollout", "restart", "-n", "tacit-system", "daemonset/tacit-node")
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node")
	// What clients keep open stays with the old proxies for as long as these drain.
	s.Await("the nodes' pods of before have ended", func(context.Context) error {
		if list := s.pods("tacit-system", nodePods); len(list) != nodes {
			return fmt.Errorf("there are %v", list)
		}
		return nil
	})
	if nodes := without(); len(nodes) > 0 {
		s.T.Errorf("nodes were without a ready pod of Tacit: %v", nodes)
	}
}

const nodePods = "app.kubernetes.io/name=tacit-node"

// nodesWithout watches the nodes' pods of Tacit until its result is called, which says
// which nodes had none for a time that was ready and not about to end.
func (s *shop) nodesWithout() func() map[string]bool {
	s.T.Helper()
	pods := s.Mesh.Client().CoreV1().Pods("tacit-system")
	list, err := pods.List(s.Patiently(), metav1.ListOptions{LabelSelector: nodePods})
	if err != nil {
		s.T.Fatal(err)
	}
	events, err := pods.Watch(s.Patiently(), metav1.ListOptions{LabelSelector: nodePods, ResourceVersion: list.ResourceVersion})
	if err != nil {
		s.T.Fatal(err)
	}
	serving := map[string]map[string]bool{} // pods by node
	for _, p := range list.Items {
		serving[p.Spec.NodeName] = map[string]bool{p.Name: true}
	}
	without := make(chan map[string]bool)
	go func() {
		found := map[string]bool{}
		for e := range events.ResultChan() {
			p, ok := e.Object.(*corev1.Pod)
			if !ok || serving[p.Spec.NodeName] == nil {
				continue // not on a node yet
			}
			serves := e.Type != watch.Deleted && p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			})
			if serving[p.Spec.NodeName][p.Name] = serves; !slices.Contains(slices.Collect(maps.Values(serving[p.Spec.NodeName])), true) {
				found[p.Spec.NodeName] = true
			}
		}
		without <- found
	}()
	return func() map[string]bool { events.Stop(); return <-without }
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
