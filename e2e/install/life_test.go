package install

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// within is how long it may take from tacit install until all is protected.
const within = 20 * time.Second

// From a running application to a protected one and back, with nothing left.
func TestInstallProtectsAndUninstallLeavesNothing(t *testing.T) {
	s := start(t)
	pods := s.shop()
	client := pods[0]
	server := elsewhere(pods, client)
	connection := s.hold(client, server)
	dialling := s.keepDialling(client, server)
	before := s.remains()
	t.Run("dry run", func(t *testing.T) { testDryRun(s.in(t), before) })

	s.kubectl("label", "namespace", "shop", "tacit.dev/mesh=on")
	began := time.Now()
	out := s.tacit(flags("install")...)
	took := time.Since(began)
	t.Logf("from tacit install to all pods of a running 6-pod application protected: %.1f s\n%s", took.Seconds(), out)
	if took > within || !strings.Contains(out, "6 of 6 enrolled pods protected") {
		t.Errorf("took %v, want %v at most, and 6 protected pods", took, within)
	}
	connection.echoes("still")
	s.eventually(func() error { return s.dial(client, server) })

	t.Run("wire", func(t *testing.T) { testWire(s.in(t), server, beside(pods, client)) })
	t.Run("check", func(t *testing.T) { testCheck(s.in(t)) })
	t.Run("before it is deleted", func(t *testing.T) { testPredelete(s.in(t)) })
	t.Run("values", func(t *testing.T) { testValues(s.in(t)) })
	t.Run("again", func(t *testing.T) { testAgain(s.in(t)) })
	t.Run("helm", func(t *testing.T) { testHelm(s.in(t)) })
	t.Run("privileges", func(t *testing.T) { testPrivileges(s.in(t)) })
	t.Run("access", func(t *testing.T) { testAccess(s.in(t)) })
	t.Run("disruptions", func(t *testing.T) { testDisruptions(s.in(t)) })
	t.Run("ports", func(t *testing.T) { testPorts(s.in(t)) })
	t.Run("keep", func(t *testing.T) { testKeep(s.in(t)) })
	t.Run("upgrade", func(t *testing.T) { testUpgrade(s.in(t)) })

	if out, err := s.Tacit(t.Context(), "uninstall"); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("tacit uninstall, without a terminal to ask at: %v, want that it names --yes\n%s", err, out)
	}
	t.Log(s.tacit("uninstall", "--yes"))
	connection.echoes("and still")
	wire := s.Record(t)
	if err := s.dial(client, server); err != nil {
		t.Error(err)
	}
	wire.Clear(marker)
	if diff := cmp.Diff(before, s.remains()); diff != "" {
		t.Errorf("cluster and nodes before tacit install and after tacit uninstall (-before +after):\n%s", diff)
	}
	if answered, failed := dialling(); failed > 0 || answered < 100 {
		t.Errorf("new connections from before tacit install to after tacit uninstall: %d answered, %d failed", answered, failed)
	} else {
		t.Logf("new connections from before tacit install to after tacit uninstall: %d, none failed", answered)
	}
	if out := s.tacit("status"); !strings.Contains(out, "not installed") {
		t.Errorf("tacit status: %q", out)
	}

	t.Run("control is away", func(t *testing.T) { testControlAway(s.in(t), before) })
	t.Run("a node is away", func(t *testing.T) { testNodeAway(s.in(t), before) })
}

// beside is another pod on the node of p.
func beside(all []corev1.Pod, p corev1.Pod) corev1.Pod {
	return all[slices.IndexFunc(all, func(o corev1.Pod) bool { return o.Spec.NodeName == p.Spec.NodeName && o.Name != p.Name })]
}

// testWire looks whether "protected" is true, between two pods that have not met before.
func testWire(s subject, client, server corev1.Pod) {
	wire := s.Record(s.t)
	if err := s.dial(client, server); err != nil {
		s.t.Error(err)
	}
	wire.TLS(client.Status.PodIP, server.Status.PodIP, 8080)
	wire.Hidden("this is "+server.Name, marker)
}

func testCheck(s subject) {
	for _, args := range [][]string{{"check"}, {"status"}} {
		s.eventually(func() error { // a probe of a busy machine may have been late
			out, err := s.Tacit(s.t.Context(), args...)
			if err == nil && !strings.Contains(out, "6 of 6 enrolled pods") {
				err = errors.New("no 6 protected pods")
			}
			s.t.Log(out)
			return err
		})
	}
}

// testPredelete runs what the chart has Helm and Argo CD run before they delete: it refuses while pods are
// in the mesh.
func testPredelete(s subject) {
	out, err := s.Kubectl(s.t.Context(), "exec", "-n", "tacit-system", "deployment/tacit-control", "--", "/tacit-control", "predelete", "--timeout=5s")
	if err == nil || !strings.Contains(err.Error(), "6 pods are in the mesh") {
		s.t.Errorf("tacit-control predelete: %v, want that it refuses\n%s", err, out)
	}
}

// testDryRun has the API server read the manifests; nothing is there afterwards.
func testDryRun(s subject, before string) {
	manifests := filepath.Join(s.t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(manifests, []byte(s.tacit(flags("install", "--dry-run")...)), 0o600); err != nil {
		s.t.Fatal(err)
	}
	kinds := s.kubectl("create", "--dry-run=client", "-f", manifests, "-o", "name")
	for _, want := range []string{"namespace/tacit-system", "daemonset.apps/tacit-node", "deployment.apps/tacit-control", "customresourcedefinition.apiextensions.k8s.io/meshes.tacit.dev"} {
		if !strings.Contains(kinds, want) {
			s.t.Errorf("tacit install --dry-run printed no %s, only\n%s", want, kinds)
		}
	}
	if diff := cmp.Diff(before, s.remains()); diff != "" {
		s.t.Errorf("cluster and nodes (-before +after tacit install --dry-run):\n%s", diff)
	}
}

// testValues upgrades with a file of values, as Helm has it; the earlier ones stay.
func testValues(s subject) {
	file := filepath.Join(s.t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte("control: {logLevel: debug}\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.tacit("upgrade", "--values", file)
	s.eventually(func() error { // the pods with the earlier values end
		pods := s.kubectl("get", "pods", "-n", "tacit-system", "-o", "name")
		if n := strings.Count(pods, "\n"); n != 4 {
			return fmt.Errorf("%d pods of Tacit, want 4:\n%s", n, pods)
		}
		return nil
	})
	container := s.kubectl("get", "deployment", "-n", "tacit-system", "tacit-control", "-o", "jsonpath={.spec.template.spec.containers[0]}")
	for _, want := range []string{"--log-level=debug", `"image":"tacit.test/tacit-control:e2e"`} {
		if !strings.Contains(container, want) {
			s.t.Errorf("after tacit upgrade --values control is %s: want %s", container, want)
		}
	}
	for _, verb := range []string{"install", "upgrade"} {
		if out := s.tacit(verb, "--dry-run"); !strings.Contains(out, "--log-level=debug") || !strings.Contains(out, "image: tacit.test/tacit-control:e2e") {
			s.t.Errorf("tacit %s --dry-run leaves out values that were given before:\n%s", verb, out)
		}
	}
	if out, err := s.Tacit(s.t.Context(), "upgrade", "--set", "trustDomain=other.example"); err == nil || !strings.Contains(err.Error(), "trustDomain=cluster.local") {
		s.t.Errorf("another trust domain: %v, want that it is refused\n%s", err, out)
	}
}

// testAgain installs what is installed: nothing restarts.
func testAgain(s subject) {
	pods := func() string { return s.kubectl("get", "pods", "-n", "tacit-system", "-o", "name") }
	before := pods()
	out := s.tacit("install") // the values of the first time stay
	if !strings.Contains(out, "ready: control, 2 nodes") {
		s.t.Errorf("tacit install, again: %s", out)
	}
	if diff := cmp.Diff(before, pods()); diff != "" {
		s.t.Errorf("pods of Tacit (-before +after the second install):\n%s", diff)
	}
}

// testHelm looks for what helm list reads.
func testHelm(s subject) {
	out := s.kubectl("get", "secrets", "-n", "tacit-system", "-l", "owner=helm,name=tacit,status=deployed", "-o", "jsonpath={.items[*].type}")
	if out != "helm.sh/release.v1" {
		s.t.Errorf("release of Helm: %q", out)
	}
}

// processes are those of a role on a node, by what /proc says of them.
func (s subject) process(node, role string) map[string]string {
	s.t.Helper()
	out := s.sh(node, fmt.Sprintf(`for p in /proc/[0-9]*; do
		[ "$(tr '\0' ' ' <$p/cmdline 2>/dev/null | cut -d' ' -f1-2)" = "/tacit-node %s" ] && cat $p/status && echo "Root: $p/root" && exit 0
	done; echo none`, role))
	status := map[string]string{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.Join(strings.Fields(value), " ")
	}
	if status["Root"] == "" {
		s.t.Fatalf("node %s has no %s", node, role)
	}
	return status
}

func testPrivileges(s subject) {
	// CHOWN 0, NET_BIND_SERVICE 10, NET_ADMIN 12, SYS_PTRACE 19, SYS_ADMIN 21 (capability.h).
	agent := fmt.Sprintf("%016x", 1<<0|1<<10|1<<12|1<<19|1<<21)
	none := fmt.Sprintf("%016x", 0)
	for _, node := range s.Nodes() {
		for role, want := range map[string]map[string]string{
			"agent": {"CapEff": agent, "CapPrm": agent, "CapBnd": agent, "CapInh": none, "Uid": "0 0 0 0", "NoNewPrivs": "1", "Seccomp": "2"},
			"proxy": {"CapEff": none, "CapPrm": none, "CapBnd": none, "CapInh": none, "Uid": "65532 65532 65532 65532", "NoNewPrivs": "1", "Seccomp": "2"},
		} {
			got := map[string]string{}
			status := s.process(node, role)
			for key := range want {
				got[key] = status[key]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				s.t.Errorf("%s on %s (-want +got):\n%s", role, node, diff)
			}
			if said := s.sh(node, "touch "+status["Root"]+"/x 2>&1 || true"); !strings.Contains(said, "Read-only file system") {
				s.t.Errorf("%s on %s writes to its root: %q", role, node, said)
			}
		}
	}
}

// testAccess: neither agent nor proxy gets anything of the API server, and nobody but
// control gets the keys of the CA.
func testAccess(s subject) {
	// What everybody may, who is anybody at all.
	out := s.kubectl("auth", "can-i", "--list", "--no-headers", "--as=system:serviceaccount:tacit-system:tacit-node",
		"--as-group=system:serviceaccounts", "--as-group=system:serviceaccounts:tacit-system", "--as-group=system:authenticated")
	if !strings.Contains(out, "selfsubject") {
		s.t.Errorf("tacit-node may: %q, want at least to ask who it is", out)
	}
	for line := range strings.Lines(out) {
		resource := strings.Fields(line)[0]
		if !strings.HasPrefix(resource, "self") && !strings.HasPrefix(resource, "[") && !strings.HasPrefix(resource, "clustertrustbundles") {
			s.t.Errorf("tacit-node may: %s", strings.TrimSpace(line))
		}
	}
	for _, may := range []struct{ account, secret, answer string }{
		{"tacit-control", "tacit-ca", "yes"}, {"tacit-control", "another", "no"}, {"tacit-node", "tacit-ca", "no"}, {"default", "tacit-ca", "no"},
	} {
		out, _ := s.Kubectl(s.t.Context(), "auth", "can-i", "get", "secrets/"+may.secret, "-n", "tacit-system", "--as=system:serviceaccount:tacit-system:"+may.account)
		if got := strings.TrimSpace(out); got != may.answer { // no is an error of kubectl, too
			s.t.Errorf("may %s read Secret %s: %q, want %s", may.account, may.secret, got, may.answer)
		}
	}
	for role, audience := range map[string]string{"agent": "tacit-agent", "proxy": "tacit-proxy"} {
		root := s.process("n1", role)["Root"]
		secrets := strings.Fields(s.sh("n1", "ls "+root+"/var/run/secrets"))
		if !slices.Equal(secrets, []string{"tacit"}) {
			s.t.Errorf("%s has the secrets %q, want that for control alone", role, secrets)
		}
		token := strings.TrimSpace(s.sh("n1", "cat "+root+"/var/run/secrets/tacit/token"))
		claims, err := base64.RawURLEncoding.DecodeString(strings.Split(token+"..", ".")[1])
		if want := fmt.Sprintf(`"aud":[%q]`, audience); err != nil || !strings.Contains(string(claims), want) {
			s.t.Errorf("the token of %s says %s, %v: want %s", role, claims, err, want)
		}
		code := s.sh("n1", "curl -sk -m 30 -o /dev/null -w '%{http_code}' -H 'Authorization: Bearer "+token+"' https://10.96.0.1/api/v1/namespaces")
		if want := fmt.Sprint(http.StatusUnauthorized); code != want {
			s.t.Errorf("the API server on the token of %s: %s, want %s", role, code, want)
		}
	}
}

// testDisruptions: what Kubernetes does when a node is drained, or is short of something.
func testDisruptions(s subject) {
	pods := func() []corev1.Pod {
		list, err := s.Client().CoreV1().Pods("tacit-system").List(s.t.Context(), everything)
		if err != nil {
			s.t.Fatal(err)
		}
		return list.Items
	}
	var control []corev1.Pod
	for _, p := range pods() {
		if strings.HasPrefix(p.Name, "tacit-control") {
			control = append(control, p)
		}
		if !strings.HasPrefix(p.Spec.PriorityClassName, "system-") {
			s.t.Errorf("%s has the priority %q", p.Name, p.Spec.PriorityClassName)
		}
		for _, c := range p.Spec.Containers {
			if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() {
				s.t.Errorf("container %s of %s requests %v", c.Name, p.Name, c.Resources.Requests)
			}
		}
	}
	if len(control) != 2 || control[0].Spec.NodeName == control[1].Spec.NodeName {
		s.t.Fatalf("replicas of control are not on two nodes: %v", control)
	}
	evict := func(p corev1.Pod) error {
		return s.Client().PolicyV1().Evictions("tacit-system").Evict(s.t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace}})
	}
	s.eventually(func() error { return evict(control[0]) }) // the controller may not have counted yet
	if err := evict(control[1]); !apierrors.IsTooManyRequests(err) {
		s.t.Errorf("eviction of the other replica, too: %v, want that it has to wait", err)
	}
	s.eventually(func() error {
		if n := len(pods()); n != 4 {
			return fmt.Errorf("%d pods of Tacit, want 4", n)
		}
		return nil
	})
	s.kubectl("rollout", "status", "-n", "tacit-system", "--timeout=2m", "deployment/tacit-control")
	// That they are enforced is the network's to show, which here enforces none.
	if policies := s.kubectl("get", "networkpolicies", "-n", "tacit-system", "-o", "name"); strings.Count(policies, "\n") != 3 {
		s.t.Errorf("network policies:\n%s", policies)
	}
}

// testPorts: metrics may be reached from elsewhere; profiles, dumps, and the agent
// not at all.
func testPorts(s subject) {
	pods, err := s.Client().CoreV1().Pods("tacit-system").List(s.t.Context(), everything)
	if err != nil || len(pods.Items) != 4 {
		s.t.Fatalf("pods of Tacit: %d, %v", len(pods.Items), err)
	}
	code := func(p corev1.Pod, port int, path string) string {
		return strings.TrimSpace(s.sh("n1", fmt.Sprintf("curl -s -m 30 -o /dev/null -w '%%{http_code}, exit %%{exitcode}' http://%s:%d%s || true", p.Status.PodIP, port, path)))
	}
	status := func(code int) string { return fmt.Sprintf("%d, exit 0", code) }
	const refused = "000, exit 7"
	for _, p := range pods.Items {
		agent := http.StatusNotFound
		if strings.HasPrefix(p.Name, "tacit-node") {
			agent = http.StatusOK
		}
		for _, tt := range []struct {
			port int
			path string
			want string
		}{
			{15025, "/metrics/agent", status(agent)},
			{15025, "/metrics", status(http.StatusOK)}, {15025, "/readyz", status(http.StatusOK)},
			{15025, "/debug/pprof/heap", status(http.StatusNotFound)}, {15025, "/dump/pods", status(http.StatusNotFound)},
			{15020, "/healthz", refused}, {15021, "/healthz", refused}, {15022, "/healthz", refused},
		} {
			if got := code(p, tt.port, tt.path); got != tt.want {
				s.t.Errorf("%s, port %d, %s: %s, want %s", p.Name, tt.port, tt.path, got, tt.want)
			}
		}
	}
}

// testKeep uninstalls but for the kind and the CA, and installs again: the mesh has
// the same roots and the same Mesh.
func testKeep(s subject) {
	bundle := func() string {
		return s.kubectl("get", "configmap", "-n", "tacit-system", "tacit-bundle", "-o", "jsonpath={.data}")
	}
	spec := func() string { return s.kubectl("get", "mesh", "default", "-o", "jsonpath={.spec}") }
	s.kubectl("patch", "mesh", "default", "--type=merge", "-p", `{"spec":{"namespaces":["elsewhere"]}}`)
	root, said := bundle(), spec()
	s.tacit("uninstall", "--yes", "--keep-crd", "--keep-ca")
	if got := spec(); got != said {
		s.t.Errorf("Mesh: %s, want %s", got, said)
	}
	left := s.kubectl("get", "all,secrets,leases,serviceaccounts,roles,networkpolicies,resourcequotas", "-n", "tacit-system", "-o", "name")
	if want := "secret/tacit-ca\nserviceaccount/default\n"; left != want {
		s.t.Errorf("in tacit-system: %q, want %q", left, want)
	}
	if out := s.tacit(flags("install")...); !strings.Contains(out, "6 of 6 enrolled pods protected") {
		s.t.Errorf("tacit install, with a CA that was kept: %s", out)
	}
	if got := bundle(); got != root {
		s.t.Errorf("roots: %s, want %s", got, root)
	}
}
