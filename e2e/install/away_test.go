package install

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"

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
	out, err := s.Tacit(s.t.Context(), "uninstall", "--drain=3s")
	if err == nil || !strings.Contains(err.Error(), "--force") {
		s.t.Errorf("tacit uninstall without control: %v, want that it names --force\n%s", err, out)
	}
	s.tacit("uninstall", "--force")
	s.tacit(flags("uninstall")...) // again, with nothing there
	if diff := cmp.Diff(before, s.remains()); diff != "" {
		s.t.Errorf("cluster and nodes before tacit install and after tacit uninstall --force (-before +after):\n%s", diff)
	}
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
	const notice = "node n2 is not ready, and was not cleaned: run tacit uninstall again when it is back"
	if out := s.tacit("uninstall", "--drain=5s"); !strings.Contains(out, notice) {
		s.t.Errorf("tacit uninstall: %s\nwant: %s", out, notice)
	}
	if out := s.tacit("status"); !strings.Contains(out, "not installed") {
		s.t.Errorf("tacit status, when one node has not been cleaned: %q", out)
	}
	s.tacit(flags("install", "--wait=false")...) // the record is no hindrance
	s.tacit("uninstall", "--drain=30s")
	thaw()
	s.kubectl("wait", "--for=condition=Ready", "node/n2", "--timeout=2m")
	s.tacit("uninstall")
	s.eventually(func() error {
		if diff := cmp.Diff(before, s.remains()); diff != "" {
			return fmt.Errorf("cluster and nodes before tacit install and after tacit uninstall (-before +after):\n%s", diff)
		}
		return nil
	})
}
