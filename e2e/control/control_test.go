package control

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"testing"

	"tacit.dev/e2e/mesh"
)

var (
	//go:embed testdata/app.yaml
	app string
	//go:embed testdata/job.yaml
	job string
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
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/client", "pod/never", "pod/of-the-node", "--timeout=110s")
	for _, part := range []struct {
		name string
		test func(*shop)
	}{
		{"nobody asked to be enrolled", nobodyEnrolled},
		{"some are left out", leftOut},
		{"by label", byLabel},
		{"by the Mesh", byMesh},
		{"a bad spec changes nothing", badSpec},
		{"a member of a StatefulSet comes back under its name", stableName},
		{"jobs of the mesh complete", jobs},
		{"a token of one node gets nothing of another", stolenToken},
		{"the startup taint is removed", startupTaint},
		{"a node joins", nodeJoins},
		{"the bundle is put back", bundleBack},
		{"the roots change", rootsChange},
	} {
		t.Run(part.name, func(t *testing.T) { s.T = t; part.test(s) })
	}
	s.T = t
}

func nobodyEnrolled(s *shop) {
	s.KubectlPrints("Labeled", "get", "mesh", "default", "-o", "jsonpath={.spec.enrollment}") // control has made it
	s.counts(0, 0)
	s.NotEnrolled("shop", "client")
	s.KubectlPrints("2/2", "get", "mesh", "default", "-o", "jsonpath={.status.nodes.ready}/{.status.nodes.total}")
}

// exceptions are the pods that are left out for a reason, as the Mesh lists them.
func exceptions(reason string) []string {
	return []string{"get", "mesh", "default", "-o", fmt.Sprintf(`jsonpath={.status.exceptions[?(@.reason==%q)].pods}`, reason)}
}

// leftOut are pods that can't be enrolled, whatever anybody asks for, and those that
// won't.
func leftOut(s *shop) {
	s.spec(`{"enrollment":"All"}`)
	s.KubectlPrints(`["shop/of-the-node"]`, exceptions("HostNetwork")...)
	s.KubectlPrints(`["shop/never"]`, exceptions("OptedOut")...)
	for _, namespace := range []string{"kube-system/", "tacit-system/"} {
		s.Await("the pods of "+namespace+" are listed", func(ctx context.Context) error {
			out, err := s.Mesh.Kubectl(ctx, exceptions("SystemNamespace")...)
			if err == nil && !strings.Contains(out, namespace) {
				err = errors.New(out)
			}
			return err
		})
	}
	for _, pod := range []string{"of-the-node", "never"} {
		s.NotEnrolled("shop", pod)
	}
	s.spec(`{"enrollment":"Labeled"}`)
	s.counts(0, 0)
}

func byLabel(s *shop) {
	s.Kubectl("label", "namespace", "shop", "tacit.dev/mesh=on")
	s.Protected("shop", "client")
	s.Protected("shop", "db-0")
	s.counts(2, 2)
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh=off")
	s.NotEnrolled("shop", "client")
	s.counts(1, 1)
	s.KubectlPrints(`["shop/client","shop/never"]`, exceptions("OptedOut")...)
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh-")
	s.Protected("shop", "client")
	s.Kubectl("label", "namespace", "shop", "tacit.dev/mesh-")
	s.counts(0, 0)
	s.NotEnrolled("shop", "client")
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh=on")
	s.Protected("shop", "client")
	s.counts(1, 1)
	s.Kubectl("label", "pod", "-n", "shop", "client", "tacit.dev/mesh-")
	s.NotEnrolled("shop", "client")
}

func byMesh(s *shop) {
	s.spec(`{"enrollment":"All"}`)
	s.counts(2, 2)
	s.Kubectl("wait", "--for=condition=Protected", "mesh/default", "--timeout=110s")
	s.spec(`{"enrollment":"None"}`)
	s.counts(0, 0)
	s.NotEnrolled("shop", "db-0")
	s.spec(`{"enrollment":"Labeled","namespaces":["shop"]}`)
	s.counts(2, 2)
	s.dials("db-0.db.shop:8080")
	if again := s.Kubectl("get", "pods", "-n", "shop", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"); again != "0 0 0 0" {
		s.T.Errorf("pods were started again %s times, want never", again)
	}
}

func badSpec(s *shop) {
	if out, err := s.Mesh.Kubectl(s.Patiently(), "patch", "mesh", "default", "--type=merge", "-p", `{"spec":{"enrollment":"everybody"}}`); err == nil {
		s.T.Errorf("enrollment everybody was taken: %s", out)
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

// jobs come and go one after the other, each with the address that the last one had;
// whoever dials, and has finished, is gone.
func jobs(s *shop) {
	addresses := map[string]bool{}
	for i := range 3 {
		name := fmt.Sprintf("job-%d", i)
		// host-local goes round; so it begins again at the first one that is free.
		if out, err := s.Mesh.Run(s.Patiently(), "n1", "sh", "-c", "rm /var/lib/cni/networks/pods/last_reserved_ip.*"); err != nil {
			s.T.Fatal(out, err)
		}
		s.Apply(strings.ReplaceAll(job, "NAME", name))
		s.Kubectl("wait", "-n", "shop", "--for=condition=Complete", "job/"+name, "--timeout=110s")
		addresses[s.Kubectl("get", "pods", "-n", "shop", "-l", "job-name="+name, "-o", "jsonpath={.items[*].status.podIP}")] = true
		if out := s.Kubectl("logs", "-n", "shop", "-l", "job-name="+name, "--tail=-1"); !strings.Contains(out, "hello from "+name) {
			s.T.Errorf("%s: %q", name, out)
		}
	}
	if len(addresses) != 1 {
		s.T.Errorf("the jobs' pods had the addresses %v, want that they share one", addresses)
	}
	s.counts(2, 2)
}

// bundle prints the roots that nodes verify control against.
var bundle = []string{"get", "configmap", "-n", "tacit-system", "tacit-bundle", "-o", `jsonpath={.data.bundle\.pem}`}

func bundleBack(s *shop) {
	before := s.Kubectl(bundle...)
	s.Kubectl("delete", "configmap", "-n", "tacit-system", "tacit-bundle")
	s.KubectlPrints(before, bundle...)
}

// rootsChange takes the CA away. Control makes another one; that nodes talk to it shows
// that they follow the bundle, for a pod that begins needs both.
func rootsChange(s *shop) {
	before := s.Kubectl(bundle...)
	s.Kubectl("delete", "secret", "-n", "tacit-system", "tacit-ca")
	s.Kubectl("rollout", "restart", "-n", "tacit-system", "deployment/tacit-control")
	s.Await("there are other roots", func(ctx context.Context) error {
		now, err := s.Mesh.Kubectl(ctx, bundle...)
		if err == nil && (now == "" || strings.TrimSpace(now) == before) {
			err = errors.New(now)
		}
		return err
	})
	s.Kubectl("rollout", "status", "-n", "tacit-system", "deployment/tacit-control")
	s.Await("those with the former roots have ended", func(ctx context.Context) error {
		pods, err := s.Mesh.Kubectl(ctx, "get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-control", "-o", "name")
		if err == nil && strings.Count(pods, "\n") != 2 {
			err = errors.New(pods)
		}
		return err
	})
	s.Apply(`{apiVersion: v1, kind: Pod, metadata: {name: later, namespace: shop}, spec: {nodeName: n1, terminationGracePeriodSeconds: 1,
		containers: [{name: app, image: "tacit.test/app:1", imagePullPolicy: Never, args: [sleep]}]}}`)
	s.Protected("shop", "later")
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
