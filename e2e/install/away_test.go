package install

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/e2e/mesh"
)

// testUpgrade has the next version's program upgrade the mesh, with the values of the
// first installation. The pods of the application go on dialling meanwhile.
func testUpgrade(s subject) {
	out := subject{s.Next(), s.t}.tacit("upgrade")
	if !strings.Contains(out, "6 of 6 enrolled pods protected") {
		s.t.Errorf("tacit upgrade: %s", out)
	}
	old := func(image string) bool { return !strings.HasSuffix(image, ":"+mesh.NextVersion) }
	s.eventually(func() error { // pods of the last version may not have ended yet
		images := strings.Fields(s.kubectl("get", "pods", "-n", "tacit-system", "-o", "jsonpath={.items[*].spec.containers[*].image}"))
		if len(images) != 6 || slices.ContainsFunc(images, old) { // two of control, and two in each node's pod
			return fmt.Errorf("Tacit runs the images %q, want those of version %s", images, mesh.NextVersion)
		}
		return nil
	})
}

// testControlAway uninstalls when nobody can release the pods.
func testControlAway(s subject, before string) {
	s.tacit(flags("install")...)
	s.kubectl("scale", "-n", "tacit-system", "deployment/tacit-control", "--replicas=0")
	s.kubectl("wait", "-n", "tacit-system", "--for=delete", "pod", "-l", "app.kubernetes.io/name=tacit-control", "--timeout=2m")
	s.unready("n1")
	out, err := s.Tacit(s.t.Context(), "uninstall", "--yes", "--drain=3s")
	if err == nil || !strings.Contains(err.Error(), "--force") {
		s.t.Errorf("tacit uninstall without control: %v, want that it names --force\n%s", err, out)
	}
	s.tacit("uninstall", "--yes", "--force")
	s.tacit(flags("uninstall", "--yes")...) // again, with nothing there
	if diff := cmp.Diff(before, s.remains()); diff != "" {
		s.t.Errorf("cluster and nodes before tacit install and after tacit uninstall --force (-before +after):\n%s", diff)
	}
}

// unready begins agent and proxy of a node again when nobody tells them what to do: they
// run, and do not say that they are ready.
func (s subject) unready(node string) {
	s.t.Helper()
	pods := func() []corev1.Pod {
		list, err := s.Client().CoreV1().Pods("tacit-system").List(s.t.Context(), metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/name=tacit-node", FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			s.t.Fatal(err)
		}
		return list.Items
	}
	before := pods()[0].Name
	s.kubectl("delete", "pod", "-n", "tacit-system", before)
	s.eventually(func() error {
		for _, p := range pods() {
			begun := len(p.Status.ContainerStatuses) == 2 && !slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Started == nil || !*c.Started })
			if ready := slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Ready }); ready {
				s.t.Fatalf("a container of %s is ready, and there is no control", p.Name)
			}
			if p.Name != before && begun {
				return nil
			}
		}
		return errors.New("agent and proxy have not begun again")
	})
}

// testNodeAway uninstalls while a node hangs, and again when it is back.
func testNodeAway(s subject, before string) {
	s.tacit(flags("install")...)
	if err := s.Freeze("n2"); err != nil {
		s.t.Fatal(err)
	}
	thaw := func() {
		if err := s.Thaw("n2"); err != nil {
			s.t.Error(err)
		}
	}
	defer thaw()
	s.kubectl("wait", "--for=condition=Ready=Unknown", "node/n2", "--timeout=2m")
	out, _ := s.Tacit(s.t.Context(), "check") // control or DNS may be on that node, and be missed on the other one
	if !strings.Contains(out, "note    node n2: not ready") {
		s.t.Errorf("tacit check, while node n2 is away: %s", out)
	}
	for _, pod := range strings.Fields(s.kubectl("get", "pods", "-n", "shop", "--field-selector=spec.nodeName=n2", "-o", "jsonpath={.items[*].metadata.name}")) {
		if strings.Contains(out, pod) {
			s.t.Errorf("tacit check speaks of pod %s, whose node is away: %s", pod, out)
		}
	}
	const notice = "node n2 is not ready, and was not cleaned: run tacit uninstall again when it is back"
	s.leaves(notice, "--drain=5s")
	if out := s.tacit("status"); !strings.Contains(out, "not installed") {
		s.t.Errorf("tacit status, when one node has not been cleaned: %q", out)
	}
	s.tacit(flags("install", "--wait=false")...) // the record is no hindrance
	s.leaves(notice, "--drain=30s")
	thaw()
	s.kubectl("wait", "--for=condition=Ready", "node/n2", "--timeout=2m")
	s.tacit("uninstall", "--yes")
	s.eventually(func() error {
		if diff := cmp.Diff(before, s.remains()); diff != "" {
			return fmt.Errorf("cluster and nodes before tacit install and after tacit uninstall (-before +after):\n%s", diff)
		}
		return nil
	})
}

// leaves uninstalls while a node is away, which the exit code tells.
func (s subject) leaves(notice string, more ...string) {
	s.t.Helper()
	out, err := s.Tacit(s.t.Context(), append([]string{"uninstall", "--yes"}, more...)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(out, notice) {
		s.t.Errorf("tacit uninstall: %v, want exit code 2 and %q\n%s", err, notice, out)
	}
}
