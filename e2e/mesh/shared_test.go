package mesh_test

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/mesh"
)

//go:embed testdata
var testdata embed.FS

// shared is the cluster of all tests of this package: the first that asks starts
// it, and TestMain ends it.
var shared struct {
	once sync.Once
	mesh *mesh.Mesh
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.mesh != nil {
		if err := shared.mesh.Down(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

func cluster(t *testing.T) *mesh.Mesh {
	t.Helper()
	shared.once.Do(func() {
		o := mesh.Options{Programs: true}
		o.Name, o.DualStack, o.Progress = fmt.Sprintf("mesh-%d", os.Getpid()), true, os.Stderr
		shared.mesh, shared.err = mesh.Up(context.Background(), o)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.mesh
}

// space is a namespace of one test.
type space struct {
	*mesh.Mesh
	t    *testing.T
	name string
}

// enrolled makes a namespace whose pods are protected. When the test ends it looks
// for rules in the nodes' own namespaces, where there may never be one.
func enrolled(t *testing.T) space { return newSpace(t, "on") }

// plain makes a namespace that is not.
func plain(t *testing.T) space { return newSpace(t, "off") }

func newSpace(t *testing.T, enrollment string) space {
	t.Helper()
	words := strings.FieldsFunc(strings.ToLower(t.Name()), func(r rune) bool { return r < 'a' || r > 'z' })
	s := space{cluster(t), t, strings.Join(words[len(words)-1:], "-") + "-" + enrollment}
	s.applyText(fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {tacit.dev/mesh: %q}}\n", s.name, enrollment))
	t.Cleanup(s.end)
	s.eventually("the namespace has a service account", func() error { _, err := s.try("get", "serviceaccount", "default"); return err })
	return s
}

func (s space) end() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, node := range s.Nodes() {
		const ours = "nft list tables | grep tacit; ip rule | grep 31425; ip -6 rule | grep 31425; true"
		if found, err := s.Run(ctx, node, "sh", "-c", ours); err != nil || found != "" {
			s.t.Errorf("tables and rules in the namespace of %s: %q, %v: want none of Tacit's", node, found, err)
		}
	}
	if s.t.Failed() {
		out, _ := s.Kubectl(ctx, "get", "pods,endpointslices,events", "-n", s.name, "-o", "wide")
		s.t.Log(out, s.State(ctx))
	}
	if _, err := s.Kubectl(ctx, "delete", "namespace", s.name, "--wait=false"); err != nil {
		s.t.Error(err)
	}
}

func (s space) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s space) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	return s.Kubectl(ctx, append([]string{"-n", s.name}, args...)...)
}

// kubectlLast is for what ends a test, when its context has ended.
func (s space) kubectlLast(args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.Kubectl(ctx, args...); err != nil {
		s.t.Error(err)
	}
}

// apply makes the objects of a file in testdata. Pairs of words are replaced.
func (s space) apply(file string, replace ...string) {
	s.t.Helper()
	text, err := testdata.ReadFile("testdata/" + file)
	if err != nil {
		s.t.Fatal(err)
	}
	s.applyText(strings.NewReplacer(replace...).Replace(string(text)))
}

func (s space) applyText(yaml string) {
	s.t.Helper()
	cmd := s.KubectlCommand(s.t.Context(), "apply", "-f", "-", "-n", s.name)
	if strings.Contains(yaml, "kind: Namespace\n") {
		cmd = s.KubectlCommand(s.t.Context(), "apply", "-f", "-")
	}
	cmd.Stdin = strings.NewReader(yaml)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		s.t.Fatalf("kubectl apply: %v: %s", err, &said)
	}
}

// ready waits until these pods, or all of a selector, are ready.
func (s space) ready(pods ...string) {
	s.t.Helper()
	s.kubectl(append([]string{"wait", "--for=condition=Ready", "--timeout=2m"}, prefixed("pod/", pods)...)...)
}

func prefixed(prefix string, words []string) (out []string) {
	for _, w := range words {
		out = append(out, prefix+w)
	}
	return out
}

func (s space) pod(name string) *corev1.Pod {
	s.t.Helper()
	p, err := s.Client().CoreV1().Pods(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

func (s space) address(pod string) string { s.t.Helper(); return s.pod(pod).Status.PodIP }

// addresses has one of each family, IPv4 first.
func (s space) addresses(pod string) (all []string) {
	s.t.Helper()
	for _, ip := range s.pod(pod).Status.PodIPs {
		all = append(all, ip.IP)
	}
	if len(all) != 2 {
		s.t.Fatalf("pod %s has the addresses %q, want one of each family", pod, all)
	}
	return all
}

// exec runs a command in a pod and returns what it printed.
func (s space) exec(pod string, command ...string) string {
	s.t.Helper()
	return s.kubectl(append([]string{"exec", pod, "--"}, command...)...)
}

// eventually tries until it works.
func (s space) eventually(what string, try func() error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	if err := build.Poll(ctx, try); err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// inNetns runs a command in the network namespace of a pod, from its node: without
// it, a test that means to show what Tacit leaves alone could pass without Tacit.
const inNetns = `for p in /proc/[0-9]*; do
  if grep -qs "pod$1" "$p/cgroup"; then shift; exec nsenter --net="$p/ns/net" "$@"; fi
done
echo "no process of pod $1"
exit 1`

// captured waits until the pods have Tacit's rules and everybody is told of them.
func (s space) captured(pods ...string) {
	s.t.Helper()
	for _, name := range pods {
		s.eventually("pod "+name+" is captured", func() error {
			p := s.pod(name)
			tables, err := s.Run(s.t.Context(), p.Spec.NodeName, "sh", "-c", inNetns, "sh", string(p.UID), "nft", "list", "tables")
			if err == nil && !strings.Contains(tables, "inet tacit") {
				err = fmt.Errorf("on %s it has the tables %q", p.Spec.NodeName, tables)
			}
			return err
		})
		s.eventually("pod "+name+" is protected", func() error {
			is, err := s.try("get", "pod", name, "-o", `jsonpath={.status.conditions[?(@.type=="tacit.dev/Protected")].status}`)
			if err == nil && is != "True" {
				err = fmt.Errorf("its condition is %q", is)
			}
			return err
		})
	}
}
