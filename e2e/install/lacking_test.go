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

// tacit check and tacit install on a cluster that lacks something say what, and what to
// do, and change nothing.
func TestInstallChangesNothingWhereSomethingIsLacking(t *testing.T) {
	s := start(t)
	file := func(name string) (func(subject), func(subject)) {
		return func(s subject) { s.apply(name); s.settled() }, func(s subject) {
			s.kubectl("delete", "--wait", "--ignore-not-found", "-f", filepath.Join("testdata", name))
		}
	}
	meshMake, meshEnd := file("other-mesh.yaml")
	forbidMake, forbidEnd := file("forbidding.yaml")
	readerMake, readerEnd := file("reader.yaml")
	ciliumMake, ciliumEnd := file("cilium.yaml")
	weakMake, weakEnd := file("weakening.yaml")
	usual := func(subject) []string { return flags("install") }
	folder := func(script string) func(subject) {
		return func(s subject) {
			for _, node := range s.Nodes() {
				s.sh(node, script)
			}
		}
	}
	for _, l := range []lack{
		{"another mesh", meshMake, meshEnd, usual, []string{"istio-system/istio-cni-node", "remedy: uninstall Istio first"}},
		{"rights", readerMake, readerEnd, asReader, []string{"this user may not ", "create/delete/patch clusterrolebindings.rbac.authorization.k8s.io", "remedy: install as a user with the role cluster-admin"}},
		{"a folder of plugins on one node", func(s subject) { s.sh("n1", "mkdir /opt/cni/other") }, func(s subject) { s.sh("n1", "rmdir /opt/cni/other") },
			func(subject) []string { return flags("install", "--set", "node.cni.binDir=/opt/cni/other") },
			[]string{"node n2", "/opt/cni/other", "remedy: name the folder of the runtime's plugins by --set node.cni.binDir"}},
		{"a network", folder("mkdir /etc/cni/other"), folder("rmdir /etc/cni/other"),
			func(subject) []string { return flags("install", "--set", "node.cni.confDir=/etc/cni/other") },
			[]string{"node n1: network", "node n2: network", "remedy: install the network of the cluster first"}},
		{"room beside another network", ciliumMake, ciliumEnd, usual, []string{"cni-exclusive", "remedy: helm upgrade cilium --reuse-values --set cni.exclusive=false"}},
		// In a namespace that somebody else has made: it keeps its labels.
		{"images", func(s subject) { s.kubectl("create", "namespace", "tacit-system"); s.settled() },
			func(s subject) { s.kubectl("delete", "namespace", "tacit-system") }, func(subject) []string { return flags("install", "--set", "image.tag=none") },
			[]string{"tacit.test/tacit-node:none", "remedy: push the images"}},
		{"nf_tables in the kernel", func(s subject) { folder(withoutNetfilter)(s); weakMake(s); s.weakened() },
			func(s subject) { weakEnd(s); folder("rm -r /var/lib/kubelet/seccomp")(s) }, usual,
			[]string{"node n1: rules", "node n2: rules", "remedy: the kernel needs nf_tables with nat, redirect, tproxy, fib"}},
		// The last: the API server heeds a policy for a moment after it was deleted.
		{"privileged pods", func(s subject) { forbidMake(s); s.forbidden() }, forbidEnd, usual, []string{"nobody mounts folders of nodes here", "remedy: let this user create privileged pods"}},
	} {
		t.Run(l.name, func(t *testing.T) { l.test(s.in(t)) })
	}
}

func (l lack) test(s subject) {
	l.make(s)
	defer l.end(s)
	before := s.remains()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	args := l.args(s)
	for _, verb := range []string{"check", "install"} {
		args[0] = verb
		out, err := s.Tacit(ctx, args...)
		s.t.Log(out)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 {
			s.t.Errorf("tacit %s: %v, want exit code 2", verb, err)
		}
		for _, words := range l.says {
			if !strings.Contains(out, words) {
				s.t.Errorf("tacit %s does not say %q", verb, words)
			}
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
	s.eventually(func() error {
		if _, err := s.try(`"volumes":[{"name":"v","hostPath":{"path":"/"}}]`); err == nil || !strings.Contains(err.Error(), "nobody mounts folders") {
			return fmt.Errorf("the API server does not heed the policy yet: %v", err)
		}
		return nil
	})
}

// withoutNetfilter puts a seccomp profile on a node that answers as a kernel without
// nf_tables does: socket(AF_NETLINK, …, NETLINK_NETFILTER) fails with EPROTONOSUPPORT.
const withoutNetfilter = `mkdir /var/lib/kubelet/seccomp; cat >/var/lib/kubelet/seccomp/no-nf-tables.json <<'E'
{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 93,
	"args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}, {"index": 2, "value": 12, "op": "SCMP_CMP_EQ"}]}]}
E`

// weakened waits until the API server heeds the policy.
func (s subject) weakened() {
	s.t.Helper()
	s.eventually(func() error {
		if out, err := s.try(`"securityContext":{}`); err != nil || !strings.Contains(out, "no-nf-tables.json") {
			return fmt.Errorf("the API server does not heed the policy yet: %v\n%s", err, out)
		}
		return nil
	})
}

// try has the API server say what would become of a visitor with this in its spec.
func (s subject) try(spec string) (string, error) {
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"try","namespace":"default","labels":{"tacit.dev/visit":"check"}},"spec":{` + spec + `,
		"containers":[{"name":"c","image":"tacit.test/pause:1"}]}}`
	file := filepath.Join(s.t.TempDir(), "pod.json")
	if err := os.WriteFile(file, []byte(pod), 0o600); err != nil {
		return "", err
	}
	return s.Kubectl(s.t.Context(), "create", "--dry-run=server", "-o", "json", "-f", file)
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
