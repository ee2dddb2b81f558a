package lab

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// cluster is two nodes, pods in all states of an endpoint, and a service with a
// named target port that differs between them.
func cluster(t *testing.T) (*corev1.Service, []*pod) {
	t.Helper()
	n1, n2 := &node{name: "n1", number: 1}, &node{name: "n2", number: 2}
	make := func(name string, n *node, host int, target int32, change func(*pod)) *pod {
		p := &pod{
			podSpec: podSpec{
				namespace: "default", name: name, account: "web", labels: map[string]string{"app": "web"},
				ports: []corev1.ContainerPort{{Name: "http", ContainerPort: target}},
			},
			node: n, uid: "uid-" + name, address: podAddress(n.number, host), running: true, ready: true,
		}
		change(p)
		return p
	}
	s := &corev1.Service{}
	s.Namespace, s.Name = "default", "web"
	s.Spec.Selector = map[string]string{"app": "web"}
	for _, text := range []string{"a@80:http", "b@81:9090"} {
		port, err := servicePort(text)
		if err != nil {
			t.Fatal(err)
		}
		s.Spec.Ports = append(s.Spec.Ports, port)
	}
	(&Cluster{}).allocateLocked(s)
	return s, []*pod{
		make("ready", n1, 2, 8080, func(*pod) {}),
		make("other-port", n2, 2, 8081, func(*pod) {}),
		make("unready", n1, 3, 8080, func(p *pod) { p.ready = false }),
		make("terminating", n2, 3, 8080, func(p *pod) { p.deleted = p.created.AddDate(1, 0, 0) }),
		make("pending", n2, 4, 8080, func(p *pod) { p.running = false }),
		make("another", n2, 5, 8080, func(p *pod) { p.labels = map[string]string{"app": "db"} }),
		make("elsewhere", n2, 6, 8080, func(p *pod) { p.namespace = "other" }),
	}
}

func TestEndpointSlices(t *testing.T) {
	s, pods := cluster(t)
	var b strings.Builder
	for _, slice := range sliceObjects(s, pods) {
		text, err := yaml.Marshal(slice)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("---\n" + string(text))
	}
	golden(t, "testdata/slices.yaml", b.String())
}

func TestRuleset(t *testing.T) {
	s, pods := cluster(t)
	golden(t, "testdata/services.nft", ruleset(virtuals(s, sliceObjects(s, pods))))
}

// Endpoints that terminate and still serve are used only when no other is left.
func TestTerminatingEndpoints(t *testing.T) {
	s, pods := cluster(t)
	count := func(pods []*pod) (n int) {
		for _, v := range virtuals(s, sliceObjects(s, pods)) {
			n += len(v.endpoints)
		}
		return n
	}
	// Two ports, two families.
	if got, want := count(pods), 2*2*2; got != want {
		t.Errorf("with two ready endpoints: %d, want %d", got, want)
	}
	if got, want := count(pods[2:]), 1*2*2; got != want {
		t.Errorf("with a terminating endpoint only: %d, want %d", got, want)
	}
	if got := count(pods[4:]); got != 0 {
		t.Errorf("without endpoints: %d", got)
	}
}

// Without a selector somebody else keeps the slices.
func TestNoSelector(t *testing.T) {
	s, pods := cluster(t)
	s.Spec.Selector = nil
	if got := sliceObjects(s, pods); got != nil {
		t.Errorf("got %v", got)
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if os.Getenv("TACIT_UPDATE") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got; TACIT_UPDATE=1 writes it):\n%s", path, diff)
	}
}

func TestParseCall(t *testing.T) {
	type result struct {
		Words   []string
		Options []option
		Rest    []string
	}
	for _, test := range []struct {
		args string
		want result
	}{
		{"n1/server listen=8080 --sa=web --user nobody", result{
			Words: []string{"n1/server"}, Options: []option{{"listen", "8080"}, {"sa", "web"}, {"user", "nobody"}}}},
		{"job client -- curl --retry 3 a=b", result{Words: []string{"job", "client"}, Rest: []string{"curl", "--retry", "3", "a=b"}}},
		{"namespace default tacit.dev/mesh- x=y", result{
			Words: []string{"namespace", "default", "tacit.dev/mesh-"}, Options: []option{{"x", "y"}}}},
		{"n1/a label=k=v", result{Words: []string{"n1/a"}, Options: []option{{"label", "k=v"}}}},
	} {
		var got result
		var err error
		got.Words, got.Options, got.Rest, err = parseCall(strings.Fields(test.args))
		if err != nil {
			t.Errorf("%s: %v", test.args, err)
		}
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(option{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.args, diff)
		}
	}
	if _, _, _, err := parseCall([]string{"pod", "--listen"}); err == nil {
		t.Error("a flag without its value was accepted")
	}
}

func TestParseOptions(t *testing.T) {
	o, err := ParseOptions([]string{"mesh=off", "bin=/x", "proxy.dial-timeout=2s", "control.leaf-ttl=1m", "proxy.ttl=1m"})
	if err != nil {
		t.Fatal(err)
	}
	want := Options{Bin: "/x", TrustDomain: "lab", CNITimeout: 30 * time.Second, Flags: map[string][]string{
		"proxy": {"--dial-timeout=2s", "--ttl=1m"}, "control": {"--leaf-ttl=1m"}}}
	if diff := cmp.Diff(want, o); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, bad := range []string{"mesh=maybe", "word", "kubelet.flag=1", "color=red"} {
		if _, err := ParseOptions([]string{bad}); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}
