package control

import (
	"context"
	_ "embed"
	"fmt"
	"strings"
	"testing"
	"time"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/mesh"
)

//go:embed testdata/app.yaml
var app string

// patience bounds whatever is waited for.
const patience = 90 * time.Second

// shop is a namespace with an application.
type shop struct {
	t *testing.T
	*mesh.Mesh
}

func (s *shop) patiently() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *shop) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.Kubectl(s.patiently(), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// await waits until kubectl prints what is wanted.
func (s *shop) await(want string, args ...string) {
	s.t.Helper()
	ctx := s.patiently()
	err := build.Poll(ctx, func() error {
		out, err := s.Kubectl(ctx, args...)
		if err == nil && strings.TrimSpace(out) != want {
			err = fmt.Errorf("%q, want %q", out, want)
		}
		return err
	})
	if err != nil {
		s.t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
}

// protected waits until the condition of a pod is so; "" means that it has none.
func (s *shop) protected(pod, want string) {
	s.t.Helper()
	s.await(want, "get", "pod", "-n", "shop", pod, "-o", `jsonpath={.status.conditions[?(@.type=="tacit.dev/Protected")].status}`)
}

// mesh waits until the Mesh counts so many pods, for the spec as it is now.
func (s *shop) counts(enrolled, protected int) {
	s.t.Helper()
	generation := s.kubectl("get", "mesh", "default", "-o", "jsonpath={.metadata.generation}")
	s.await(fmt.Sprintf("%s %d %d 0", generation, enrolled, protected), "get", "mesh", "default", "-o",
		"jsonpath={.status.observedGeneration} {.status.pods.enrolled} {.status.pods.protected} {.status.pods.leaving}")
}

func (s *shop) spec(json string) {
	s.t.Helper()
	s.kubectl("patch", "mesh", "default", "--type=merge", "-p", `{"spec":`+json+`}`)
}

// dials waits until the client reaches the address: the cluster's DNS may know the pod
// before for a while.
func (s *shop) dials(address string) {
	s.t.Helper()
	ctx := s.patiently()
	err := build.Poll(ctx, func() error {
		out, err := s.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", address, "hello there")
		if err == nil && !strings.Contains(out, "hello there") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	if err != nil {
		s.t.Errorf("dial %s: %v", address, err)
	}
}

// TestControl is one cluster, for one costs half a minute.
func TestControl(t *testing.T) {
	m := mesh.Start(t, mesh.Options{})
	s := &shop{t: t, Mesh: m}
	if _, err := m.Apply(t.Context(), app); err != nil {
		t.Fatal(err)
	}
	s.kubectl("rollout", "status", "-n", "shop", "statefulset/db")
	s.kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/client")
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
		{"the bundle is put back", bundleBack},
	} {
		t.Run(part.name, func(t *testing.T) { s.t = t; part.test(s) })
	}
	s.t = t
}

func nobodyEnrolled(s *shop) {
	s.await("labelled", "get", "mesh", "default", "-o", "jsonpath={.spec.enrolment}") // control has made it
	s.counts(0, 0)
	s.protected("client", "")
	reasons := s.kubectl("get", "mesh", "default", "-o", "jsonpath={.status.exceptions[*].reason} {.status.nodes.ready}/{.status.nodes.total}")
	if reasons != "SystemNamespace 2/2" {
		s.t.Errorf("exceptions and nodes %q, want kube-system and Tacit's own, and two ready nodes", reasons)
	}
}

func byLabel(s *shop) {
	s.kubectl("label", "namespace", "shop", "tacit.dev/mesh=on")
	s.protected("client", "True")
	s.protected("db-0", "True")
	s.counts(2, 2)
	s.kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh=off")
	s.protected("client", "")
	s.counts(1, 1)
	s.await("shop/client", "get", "mesh", "default", "-o", `jsonpath={.status.exceptions[?(@.reason=="OptedOut")].pods[0]}`)
	s.kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh-")
	s.protected("client", "True")
	s.kubectl("label", "namespace", "shop", "tacit.dev/mesh-")
	s.counts(0, 0)
	s.protected("client", "")
}

func byMesh(s *shop) {
	s.spec(`{"enrolment":"all"}`)
	s.counts(2, 2)
	s.kubectl("wait", "--for=condition=Protected", "mesh/default", "--timeout=30s")
	s.spec(`{"enrolment":"none"}`)
	s.counts(0, 0)
	s.protected("db-0", "")
	s.spec(`{"enrolment":"labelled","namespaces":["shop"]}`)
	s.counts(2, 2)
	s.dials("db-0.db.shop:8080")
}

func badSpec(s *shop) {
	if out, err := s.Kubectl(s.patiently(), "patch", "mesh", "default", "--type=merge", "-p", `{"spec":{"enrolment":"everybody"}}`); err == nil {
		s.t.Errorf("enrolment everybody was taken: %s", out)
	}
	s.spec(`{"trustDomain":"other.example"}`)
	s.await("False NotUnderstood", "get", "mesh", "default", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].reason}`)
	s.counts(2, 2)
	s.spec(`{"trustDomain":null}`)
	s.kubectl("wait", "--for=condition=Ready", "mesh/default", "--timeout=30s")
}

func stableName(s *shop) {
	s.kubectl("delete", "pod", "-n", "shop", "db-0")
	s.kubectl("rollout", "status", "-n", "shop", "statefulset/db")
	s.protected("db-0", "True")
	s.dials("db-0.db.shop:8080")
}

// jobs come and go one after the other; whoever dials, and has finished, is gone.
func jobs(s *shop) {
	for i := range 3 {
		name := fmt.Sprintf("job-%d", i)
		s.kubectl("create", "job", "-n", "shop", name, "--image=tacit.test/app:1", "--", "/app", "dial", "db-0.db.shop:8080", "hello", "from", name)
		s.kubectl("wait", "-n", "shop", "--for=condition=Complete", "job/"+name, "--timeout=60s")
		if out := s.kubectl("logs", "-n", "shop", "job/"+name); !strings.Contains(out, "hello from "+name) {
			s.t.Errorf("%s: %q", name, out)
		}
	}
	s.counts(2, 2)
}

func bundleBack(s *shop) {
	args := []string{"get", "configmap", "-n", "tacit-system", "tacit-bundle", "-o", `jsonpath={.data.bundle\.pem}`}
	before := s.kubectl(args...)
	s.kubectl("delete", "configmap", "-n", "tacit-system", "tacit-bundle")
	s.await(before, args...)
}

func startupTaint(s *shop) {
	s.kubectl("taint", "node", "n2", "tacit.dev/agent-not-ready=true:NoSchedule", "example.com/other=true:PreferNoSchedule")
	s.await("example.com/other", "get", "node", "n2", "-o", "jsonpath={.spec.taints[*].key}")
	s.kubectl("taint", "node", "n2", "example.com/other-")
}
