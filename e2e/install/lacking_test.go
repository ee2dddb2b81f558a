package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var everything = metav1.ListOptions{}

// lack is something that a cluster may lack.
type lack struct {
	name string
	// make brings it about, and end undoes it.
	make, end func(s subject)
	args      func(s subject) []string
	// says are what tacit install says of it.
	says []string
}

// tacit install on a cluster that lacks something says what, and what to do, and
// changes nothing.
func TestInstallChangesNothingWhereSomethingIsLacking(t *testing.T) {
	s := start(t)
	nothing := func(subject) {}
	file := func(name string) (func(subject), func(subject)) {
		return func(s subject) { s.apply(name); s.settled() }, func(s subject) {
			s.kubectl("delete", "--wait", "--ignore-not-found", "-f", filepath.Join("testdata", name))
		}
	}
	meshMake, meshEnd := file("other-mesh.yaml")
	forbidMake, forbidEnd := file("forbidding.yaml")
	readerMake, readerEnd := file("reader.yaml")
	usual := func(subject) []string { return flags("install") }
	for _, l := range []lack{
		{"another mesh", meshMake, meshEnd, usual, []string{"istio-system/istio-cni-node", "remedy: uninstall Istio first"}},
		{"rights", readerMake, readerEnd, asReader, []string{"this user may not create clusterrolebindings", "remedy: install as a user with the role cluster-admin"}},
		{"a folder of plugins on one node", func(s subject) { s.sh("n1", "mkdir /opt/cni/other") }, func(s subject) { s.sh("n1", "rmdir /opt/cni/other") },
			func(subject) []string { return flags("install", "--set", "node.cni.binDir=/opt/cni/other") },
			[]string{"node n2", "/opt/cni/other", "remedy: name the folder of the runtime's plugins by --set node.cni.binDir"}},
		{"images", nothing, nothing, func(subject) []string { return flags("install", "--set", "image.tag=none") },
			[]string{"tacit.test/tacit-node:none", "remedy: push the images"}},
		// The last: the API server heeds a policy for a moment after it was deleted.
		{"privileged pods", forbidMake, forbidEnd, usual, []string{"nobody mounts folders of nodes here", "remedy: let this user create privileged pods"}},
	} {
		t.Run(l.name, func(t *testing.T) { l.test(s.in(t)) })
	}
}

func (l lack) test(s subject) {
	l.make(s)
	defer l.end(s)
	if l.name == "privileged pods" {
		s.forbidden()
	}
	before := s.remains()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	out, err := s.Tacit(ctx, l.args(s)...)
	s.t.Log(out)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 {
		s.t.Errorf("tacit install: %v, want exit code 2", err)
	}
	for _, words := range l.says {
		if !strings.Contains(out, words) {
			s.t.Errorf("tacit install does not say %q", words)
		}
	}
	if diff := cmp.Diff(before, s.remains()); diff != "" {
		s.t.Errorf("cluster and nodes (-before +after):\n%s", diff)
	}
}

// settled waits for what the cluster adds to a new namespace by itself.
func (s subject) settled() {
	s.t.Helper()
	s.eventually(func() error {
		for _, kind := range []string{"serviceaccounts/default", "configmaps/kube-root-ca.crt"} {
			want := len(strings.Fields(s.kubectl("get", "namespaces", "-o", "name")))
			kind, name, _ := strings.Cut(kind, "/")
			if got := len(strings.Fields(s.kubectl("get", kind, "-A", "-o", "name", "--field-selector=metadata.name="+name))); got != want {
				return fmt.Errorf("%d of %d namespaces have %s %s", got, want, kind, name)
			}
		}
		return nil
	})
}

// forbidden waits until the API server heeds the policy.
func (s subject) forbidden() {
	s.t.Helper()
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"try","namespace":"default"},"spec":{
		"containers":[{"name":"c","image":"tacit.test/pause:1"}],"volumes":[{"name":"v","hostPath":{"path":"/"}}]}}`
	file := filepath.Join(s.t.TempDir(), "pod.json")
	if err := os.WriteFile(file, []byte(pod), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.eventually(func() error {
		if _, err := s.Kubectl(s.t.Context(), "create", "--dry-run=server", "-f", file); err == nil || !strings.Contains(err.Error(), "nobody mounts folders") {
			return fmt.Errorf("the API server does not heed the policy yet: %v", err)
		}
		return nil
	})
}

// asReader installs by the kubeconfig of one who may only look.
func asReader(s subject) []string {
	s.t.Helper()
	s.eventually(func() error {
		_, err := s.Kubectl(s.t.Context(), "auth", "can-i", "list", "secrets", "-n", "tacit-system", "--as=system:serviceaccount:default:reader")
		return err
	})
	token := strings.TrimSpace(s.kubectl("create", "token", "reader"))
	server := s.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
	authority := s.kubectl("config", "view", "--minify", "--raw", "--flatten", "-o", "jsonpath={.clusters[0].cluster.certificate-authority-data}")
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c",
		"clusters":[{"name":"c","cluster":{"server":%q,"certificate-authority-data":%q}}],
		"users":[{"name":"u","user":{"token":%q}}],"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}]}`, server, authority, token)
	file := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return flags("install", "--kubeconfig", file)
}
