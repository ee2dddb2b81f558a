package install

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/cluster"
	"tacit.dev/e2e/mesh"
)

// subject is a cluster on which Tacit is installed by the test.
type subject struct {
	*mesh.Mesh
	t *testing.T
}

func start(t *testing.T) subject {
	t.Helper()
	return subject{mesh.Start(t, mesh.Options{Options: cluster.Options{Nodes: 2}, Bare: true, Next: true}), t}
}

// in is the subject for a subtest.
func (s subject) in(t *testing.T) subject { return subject{s.Mesh, t} }

// flags are those that the tests' images need: a node has them, no registry does.
func flags(verb string, more ...string) []string {
	return append([]string{verb, "--set", "image.registry=tacit.test", "--set", "image.pullPolicy=Never"}, more...)
}

// tacit runs the program, which must succeed.
func (s subject) tacit(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 6*time.Minute)
	defer cancel()
	out, err := s.Tacit(ctx, args...)
	if err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func (s subject) kubectl(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	out, err := s.Kubectl(ctx, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s subject) apply(file string) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Apply(s.t.Context(), string(text)); err != nil {
		s.t.Fatal(err)
	}
}

// sh runs a script in a node.
func (s subject) sh(node, script string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	out, err := s.Run(ctx, node, "bash", "-c", script)
	if err != nil {
		s.t.Fatalf("node %s: %s: %v", node, script, err)
	}
	return out
}

// shop starts the application, and returns its pods when they are ready.
func (s subject) shop() []corev1.Pod {
	s.t.Helper()
	s.apply("shop.yaml")
	s.kubectl("rollout", "status", "-n", "shop", "--timeout=2m", "deployment/web")
	list, err := s.Client().CoreV1().Pods("shop").List(s.t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 6 {
		s.t.Fatalf("pods of the shop: %d, %v", len(list.Items), err)
	}
	return list.Items
}

// kinds are all of which a mesh could leave something.
const kinds = "namespaces,customresourcedefinitions,clusterroles,clusterrolebindings,secrets,configmaps,serviceaccounts,roles,rolebindings," +
	"daemonsets,deployments,services,networkpolicies,poddisruptionbudgets,resourcequotas," +
	"validatingwebhookconfigurations,mutatingwebhookconfigurations"

// remains is what a cluster and its nodes have of which a mesh may leave something:
// names of objects, conditions of pods, files, rules and routes in every network
// namespace.
func (s subject) remains() string {
	s.t.Helper()
	var b strings.Builder
	lines := strings.Fields(s.kubectl("get", kinds, "-A", "-o", "name"))
	slices.Sort(lines)
	fmt.Fprintln(&b, strings.Join(lines, "\n"))
	fmt.Fprintf(&b, "namespace: %s\n", s.kubectl("get", "namespaces", "--ignore-not-found", "tacit-system", "-o", "jsonpath={.metadata.labels} {.metadata.annotations}"))
	fmt.Fprintf(&b, "conditions: %q\n", s.kubectl("get", "pods", "-n", "shop", "-o", `jsonpath={.items[*].status.conditions[?(@.type=="tacit.dev/Protected")]}`))
	for _, node := range s.Nodes() {
		fmt.Fprintf(&b, "== %s\n%s", node, s.sh(node, `
			ls -A /etc/cni/net.d /opt/cni/bin; ls -d /run/tacit 2>&1 | sed 's/.*No such file.*/no run folder/'
			seen=
			for p in /proc/[0-9]*; do
				ns=$(readlink $p/ns/net) || continue
				case "$seen" in *"$ns"*) continue;; esac
				seen="$seen $ns"
				nsenter --net=$p/ns/net sh -c "nft list tables | grep tacit
					for f in 4 6; do ip -\$f rule | grep 31425; ip -\$f route show table 31425; done 2>/dev/null" || true
			done`))
	}
	return b.String()
}

// inside is a script that runs a command in a pod's network namespace.
func inside(p corev1.Pod, command string) string {
	return fmt.Sprintf(`
		for p in /proc/[0-9]*; do
			grep -q %s $p/cgroup 2>/dev/null && exec nsenter --net=$p/ns/net bash -c '%s'
		done; echo no process of the pod`, strings.ReplaceAll(string(p.UID), "-", "[-_]"), command)
}

// keepDialling has a pod make new connections to another one, some in a second, until
// stop is called, which tells how many had an answer and how many had not.
func (s subject) keepDialling(from, to corev1.Pod) (stop func() (answered, failed int)) {
	s.t.Helper()
	// To wait for input is also the pause; its end is the end.
	script := inside(from, fmt.Sprintf(`ok=0; failed=0
		while read -t 0.05; [ $? -gt 128 ]; do
			if exec 3<>/dev/tcp/%s/8080 && read -t 30 -u 3 line; then ok=$((ok+1)); else failed=$((failed+1)); date +%%T.%%N; fi
			exec 3>&-
		done 2>&1
		echo answered $ok failed $failed`, to.Status.PodIP))
	in, end := io.Pipe()
	var out bytes.Buffer
	ended := make(chan error, 1)
	ctx := context.WithoutCancel(s.t.Context())
	go func() {
		ended <- s.Enter(ctx, from.Spec.NodeName, cluster.Streams{In: in, Out: &out, Err: &out}, "bash", "-c", script)
	}()
	stop = sync.OnceValues(func() (answered, failed int) {
		end.Close()
		err := <-ended
		said := out.String()
		if _, serr := fmt.Sscanf(said[max(0, strings.LastIndex(said, "answered")):], "answered %d failed %d", &answered, &failed); serr != nil || err != nil {
			s.t.Errorf("dialling: %v, %v: %s", err, serr, said)
		}
		if failed > 0 {
			s.t.Logf("dialling: %s", said)
		}
		return answered, failed
	})
	s.t.Cleanup(func() { stop() })
	return stop
}

// held is a connection from inside of a pod's network namespace.
type held struct {
	t    *testing.T
	to   io.Writer
	from *bufio.Reader
}

// hold dials from a pod to another one, and keeps the connection until the test ends.
func (s subject) hold(from, to corev1.Pod) held {
	s.t.Helper()
	in, to2 := io.Pipe()
	from2, out := io.Pipe()
	script := inside(from, fmt.Sprintf("exec 3<>/dev/tcp/%s/8080; cat <&3 & cat >&3; kill $!", to.Status.PodIP))
	ended := make(chan error, 1)
	// The end of its input ends it. To be killed, as when the test's context ends first,
	// would leave the reading half behind.
	ctx := context.WithoutCancel(s.t.Context())
	go func() {
		ended <- s.Enter(ctx, from.Spec.NodeName, cluster.Streams{In: in, Out: out, Err: out}, "bash", "-c", script)
		out.Close()
	}()
	s.t.Cleanup(func() { to2.Close(); in.Close(); from2.Close(); <-ended })
	h := held{t: s.t, to: to2, from: bufio.NewReader(from2)}
	if greeting := h.line(); !strings.Contains(greeting, "this is "+to.Name) {
		s.t.Fatalf("%s dials %s: %q", from.Name, to.Name, greeting)
	}
	return h
}

func (h held) line() string {
	h.t.Helper()
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		text, err := h.from.ReadString('\n')
		got <- answer{text, err}
	}()
	select {
	case a := <-got:
		if a.err != nil {
			h.t.Fatalf("held connection: %v after %q", a.err, a.text)
		}
		return a.text
	case <-time.After(time.Minute):
		h.t.Fatal("held connection: no answer")
		return ""
	}
}

// echoes has the other end say a word.
func (h held) echoes(word string) {
	h.t.Helper()
	if _, err := fmt.Fprintln(h.to, word); err != nil {
		h.t.Fatalf("held connection: %v", err)
	}
	if got := strings.TrimSpace(h.line()); got != word {
		h.t.Errorf("held connection: got %q, want %q", got, word)
	}
}

// marker is what a pod says to another one.
const marker = "hello, it is me"

// dial has a pod say that to another one, once.
func (s subject) dial(from, to corev1.Pod) error {
	out, err := s.Kubectl(s.t.Context(), "exec", "-n", from.Namespace, from.Name, "--", "/app", "dial", to.Status.PodIP+":8080", marker)
	if err == nil && !strings.Contains(out, marker) {
		err = fmt.Errorf("answer %q", out)
	}
	return err
}

// eventually polls: what Kubernetes does takes a moment.
func (s subject) eventually(ask func() error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	if err := build.Poll(ctx, ask); err != nil {
		s.t.Fatal(err)
	}
}

// elsewhere is a pod on another node than p.
func elsewhere(all []corev1.Pod, p corev1.Pod) corev1.Pod {
	return all[slices.IndexFunc(all, func(o corev1.Pod) bool { return o.Spec.NodeName != p.Spec.NodeName })]
}
