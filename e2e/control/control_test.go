package control

import (
	"context"
	_ "embed"
	"fmt"
	"strings"
	"testing"

	"tacit.dev/e2e/mesh"
)

var (
	//go:embed testdata/app.yaml
	app string
	//go:embed testdata/joining.yaml
	joining string
)

// shop is a namespace with an application.
type shop struct{ mesh.Case }

// counts waits until the Mesh counts so many pods, for the spec as it is now.
func (s *shop) counts(enrolled, protected int) {
	s.T.Helper()
	generation := s.Kubectl("get", "mesh", "default", "-o", "jsonpath={.metadata.generation}")
	s.KubectlPrints(fmt.Sprintf("%s %d %d 0", generation, enrolled, protected), "get", "mesh", "default", "-o",
		"jsonpath={.status.observedGeneration} {.status.pods.enrolled} {.status.pods.protected} {.status.pods.leaving}")
}

func (s *shop) spec(json string) {
	s.T.Helper()
	s.Kubectl("patch", "mesh", "default", "--type=merge", "-p", `{"spec":`+json+`}`)
}

// dials waits until the client reaches the address: the cluster's DNS may know the pod
// before for a while.
func (s *shop) dials(address string) {
	s.T.Helper()
	s.Await("the client reaches "+address, func(ctx context.Context) error {
		out, err := s.Mesh.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", address, "hello there")
		if err == nil && !strings.Contains(out, "hello there") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
}

// TestControl is one cluster, for one costs half a minute.
func TestControl(t *testing.T) {
	s := &shop{mesh.Case{T: t, Mesh: mesh.Start(t, mesh.Options{})}}
	s.Apply(app)
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/db")
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/client", "--timeout=110s")
	for _, part := range []struct {
		name string
		test func(*shop)
	}{
		{"nobody asked to be enrolled", nobodyEnrolled},
		{"by label", byLabel},
		{"by the Mesh", byMesh},
		{"a bad spec changes nothing", badSpec},
		{"a member of a StatefulSet comes back under its name", stableName},
		{"jobs of the mesh complete", jobs},
		{"a token of one node gets nothing of another", stolenToken},
		{"the startup taint is removed", startupTaint},
		{"a node joins", nodeJoins},
		{"the bundle is put back", bundleBack},
	} {
		t.Run(part.name, func(t *testing.T) { s.T = t; part.test(s) })
	}
	s.T = t
}

func nobodyEnrolled(s *shop) {
	s.KubectlPrints("labelled", "get", "mesh", "default", "-o", "jsonpath={.spec.enrolment}") // control has made it
	s.counts(0, 0)
	s.NotEnrolled("shop", "client")
	// kube-system and Tacit's own, and two ready nodes
	s.KubectlPrints("SystemNamespace 2/2", "get", "mesh", "default", "-o", "jsonpath={.status.exceptions[*].reason} {.status.nodes.ready}/{.status.nodes.total}")
}

func byLabel(s *shop) {
	s.Kubectl("label", "namespace", "shop", "tacit.dev/mesh=on")
	s.Protected("shop", "client")
	s.Protected("shop", "db-0")
	s.counts(2, 2)
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh=off")
	s.NotEnrolled("shop", "client")
	s.counts(1, 1)
	s.KubectlPrints("shop/client", "get", "mesh", "default", "-o", `jsonpath={.status.exceptions[?(@.reason=="OptedOut")].pods[0]}`)
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh-")
	s.Protected("shop", "client")
	s.Kubectl("label", "namespace", "shop", "tacit.dev/mesh-")
	s.counts(0, 0)
	s.NotEnrolled("shop", "client")
}

func byMesh(s *shop) {
	s.spec(`{"enrolment":"all"}`)
	s.counts(2, 2)
	s.Kubectl("wait", "--for=condition=Protected", "mesh/default", "--timeout=110s")
	s.spec(`{"enrolment":"none"}`)
	s.counts(0, 0)
	s.NotEnrolled("shop", "db-0")
	s.spec(`{"enrolment":"labelled","namespaces":["shop"]}`)
	s.counts(2, 2)
	s.dials("db-0.db.shop:8080")
}

func badSpec(s *shop) {
	if out, err := s.Mesh.Kubectl(s.Patiently(), "patch", "mesh", "default", "--type=merge", "-p", `{"spec":{"enrolment":"everybody"}}`); err == nil {
		s.T.Errorf("enrolment everybody was taken: %s", out)
	}
	s.spec(`{"trustDomain":"other.example"}`)
	s.KubectlPrints("False NotUnderstood", "get", "mesh", "default", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].reason}`)
	s.counts(2, 2)
	s.spec(`{"trustDomain":null}`)
	s.Kubectl("wait", "--for=condition=Ready", "mesh/default", "--timeout=110s")
}

func stableName(s *shop) {
	s.Kubectl("delete", "pod", "-n", "shop", "db-0")
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/db")
	s.Protected("shop", "db-0")
	s.dials("db-0.db.shop:8080")
}

// jobs come and go one after the other; whoever dials, and has finished, is gone.
func jobs(s *shop) {
	for i := range 3 {
		name := fmt.Sprintf("job-%d", i)
		s.Kubectl("create", "job", "-n", "shop", name, "--image=tacit.test/app:1", "--", "/app", "dial", "db-0.db.shop:8080", "hello", "from", name)
		s.Kubectl("wait", "-n", "shop", "--for=condition=Complete", "job/"+name, "--timeout=110s")
		if out := s.Kubectl("logs", "-n", "shop", "-l", "job-name="+name, "--tail=-1"); !strings.Contains(out, "hello from "+name) {
			s.T.Errorf("%s: %q", name, out)
		}
	}
	s.counts(2, 2)
}

func bundleBack(s *shop) {
	args := []string{"get", "configmap", "-n", "tacit-system", "tacit-bundle", "-o", `jsonpath={.data.bundle\.pem}`}
	before := s.Kubectl(args...)
	s.Kubectl("delete", "configmap", "-n", "tacit-system", "tacit-bundle")
	s.KubectlPrints(before, args...)
}

func startupTaint(s *shop) {
	s.Kubectl("taint", "node", "n2", "tacit.dev/agent-not-ready=true:NoSchedule", "example.com/other=true:PreferNoSchedule")
	s.KubectlPrints("example.com/other", "get", "node", "n2", "-o", "jsonpath={.spec.taints[*].key}")
	s.Kubectl("taint", "node", "n2", "example.com/other-")
}

// nodeJoins adds a node that has the startup taint. The first pod that the scheduler has
// for it begins when there is an agent: already its first words are hidden.
func nodeJoins(s *shop) {
	wire := s.Mesh.Record(s.T)
	s.Apply(joining)
	node, err := s.Mesh.AddNode(s.Patiently(), "tacit.dev/agent-not-ready=true:NoSchedule")
	if err != nil {
		s.T.Fatal(err)
	}
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/joining", "--timeout=110s")
	s.Protected("shop", "joining")
	address := func(pod string) string {
		return s.Kubectl("get", "pod", "-n", "shop", pod, "-o", "jsonpath={.status.podIP}")
	}
	wire.TLS(address("joining"), address("db-0"), 8080)
	wire.Hidden("MARKER")
	s.Kubectl("delete", "pod", "-n", "shop", "joining")
	if err := s.Mesh.RemoveNode(s.Patiently(), node); err != nil {
		s.T.Error(err)
	}
}
