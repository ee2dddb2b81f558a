package node

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tacit.dev/e2e/mesh"
)

var (
	//go:embed testdata/app.yaml
	app string
	//go:embed testdata/early.yaml
	early string
	//go:embed testdata/kinds.yaml
	kinds string
)

const (
	folder = "/etc/cni/net.d"
	own    = folder + "/00-multus-tacit.conflist"
	base   = folder + "/10-ptp.conflist"
	first  = folder + "/05-first.conf"
)

// site is a mesh and the witness of its wire.
type site struct {
	mesh.Case
	wire *mesh.Recording
}

// TestNode is one cluster's life; a cluster for each part would cost half a minute more.
func TestNode(t *testing.T) {
	s := &site{Case: mesh.Case{T: t, Mesh: mesh.Start(t, mesh.Options{Bare: true})}}
	s.Apply(early)
	s.Kubectl("wait", "-n", "early", "--for=condition=Ready", "pod/early", "--timeout=110s")
	if err := s.Mesh.Install(s.Patiently()); err != nil {
		t.Fatal(err)
	}
	s.wire = s.Mesh.Record(t)
	s.Apply(app)
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod", "--all", "--timeout=110s")
	for _, part := range []struct {
		name string
		run  func(*site)
	}{
		{"a running pod is found", (*site).findsRunning},
		{"the plugin stays in the chain", (*site).staysInChain},
		{"the runtime asks", (*site).answersRuntime},
		{"pods of every kind", (*site).everyKind},
		{"the agent is away", (*site).agentAway},
		{"the node's pod is deleted", (*site).podDeleted},
		{"the node reboots", (*site).reboots},
	} {
		if !t.Run(part.name, func(t *testing.T) { s.T = t; part.run(s) }) {
			t.FailNow()
		}
	}
	s.T = t
	s.wire.Hidden("MARKER")
}

// on runs a command on a node.
func (s *site) on(node string, words ...string) string {
	s.T.Helper()
	out, err := s.Mesh.Run(s.Patiently(), node, words...)
	if err != nil {
		s.T.Fatal(err)
	}
	return out
}

func (s *site) address(namespace, pod string) string {
	s.T.Helper()
	return s.Kubectl("get", "pod", "-n", namespace, pod, "-o", "jsonpath={.status.podIP}")
}

// dial says something to the server, in words that must not be seen. It may have to
// wait for a lost SYN, which comes again after 1, 3, 7 and 15 s.
func (s *site) dial(namespace, pod string) error {
	_, err := s.Mesh.Kubectl(s.Patiently(), "exec", "-n", namespace, pod, "--", "/app", "dial", s.address("shop", "server")+":8080", "MARKER")
	return err
}

// dials waits until that succeeds.
func (s *site) dials(namespace, pod string) {
	s.T.Helper()
	s.Await(pod+" reaches the server", func(context.Context) error { return s.dial(namespace, pod) })
}

// findsRunning enrolls a pod of which no runtime has ever told.
func (s *site) findsRunning() {
	s.Kubectl("label", "namespace", "early", "tacit.dev/mesh=on")
	s.Protected("early", "early")
	s.dials("early", "early")
	s.wire.TLS(s.address("early", "early"), s.address("shop", "server"), 8080)
}

// staysInChain has somebody change and remove files.
func (s *site) staysInChain() {
	const here = `for i in $(seq 1000); do grep -q '"mtu": *%[1]d' ` + own + ` 2>/dev/null && grep -q tacit-cni ` + own + ` && echo $i && exit; sleep 0.01; done; ls ` + folder + `; cat ` + own + `; exit 1`
	text := s.on("n1", "cat", base)
	if n := strings.Count(s.on("n1", "cat", own), `"tacit-cni"`); n != 1 {
		s.T.Errorf("the plugin is %d times in the chain", n)
	}
	quickest := map[string]int{} // looks
	follows := func(what string, mtu int, change string) {
		looks, err := strconv.Atoi(strings.TrimSpace(s.on("n1", "sh", "-c", change+"; "+fmt.Sprintf(here, mtu))))
		if err != nil {
			s.T.Error(err)
		}
		if before, had := quickest[what]; had {
			looks = min(looks, before)
		}
		quickest[what] = looks
	}
	for mtu := 1400; mtu < 1406; mtu += 2 {
		list, single := withMTU(s.T, text, mtu, mtu+1)
		follows("a changed file", mtu, written(base, list))
		follows("a removed file", mtu, "rm "+own)
		follows("an overwritten file", mtu, "cp "+base+" "+own)
		follows("another first file", mtu+1, written(first, single))
		follows("no other first file", mtu, "rm "+first)
	}
	for what, looks := range quickest {
		most := 100 // a look every 10 ms; a busy machine can delay one, but not each time
		if what == "no other first file" {
			most += 200 // it may come again: for 2 s nothing else is followed
		}
		if looks > most {
			s.T.Errorf("%s: put back after %d looks at best, want %d at most", what, looks, most)
		}
	}
	s.on("n1", "sh", "-c", written(base, text))
	s.Await("all is as it was", func(context.Context) error {
		files, now := s.on("n1", "ls", folder), s.on("n1", "cat", own)
		if strings.Contains(files, ".new") || strings.Contains(now, `"mtu": 14`) || strings.Count(now, `"tacit-cni"`) != 1 {
			return errors.New(files + now)
		}
		return nil
	})
}

// withMTU is a configuration with another MTU: the list, and as a file of its own the
// network that is first in it.
func withMTU(t *testing.T, text string, ofList, ofSingle int) (list, single string) {
	t.Helper()
	var c map[string]any
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	network := c["plugins"].([]any)[0].(map[string]any)
	network["mtu"] = ofList
	list = asJSON(t, c)
	network["mtu"], network["name"], network["cniVersion"] = ofSingle, "single", c["cniVersion"]
	return list, asJSON(t, network)
}

// written is a script that puts a file in place, whole.
func written(file, text string) string {
	return fmt.Sprintf("cat > %[1]s.tmp <<'E'\n%[2]s\nE\nmv %[1]s.tmp %[1]s", file, text)
}

// answersRuntime asks the plugin what a runtime of CNI 1.1 asks beside ADD and DEL, about
// a pod that is as ADD has left it, and about one that is in its place.
func (s *site) answersRuntime() {
	client := s.sandbox("client")
	if err := s.plugin("STATUS", client); err != nil {
		s.T.Errorf("STATUS: %v", err)
	}
	if err := s.plugin("CHECK", client); err != nil {
		s.T.Errorf("CHECK: %v", err)
	}
	client.Container = "another"
	if err := s.plugin("CHECK", client); err == nil || !strings.Contains(err.Error(), "the agent does not know this sandbox") {
		s.T.Errorf("CHECK of another sandbox: %v, want that the agent does not know it", err)
	}
}

// sandbox is what the runtime keeps of an ADD (libcni's cache).
type sandbox struct {
	Container string         `json:"containerId"`
	Netns     string         `json:"netns"`
	Args      [][2]string    `json:"cniArgs"`
	Result    map[string]any `json:"result"`
}

// sandbox is that of a pod of the shop on n1.
func (s *site) sandbox(pod string) (kept sandbox) {
	s.T.Helper()
	text := s.on("n1", "sh", "-c", fmt.Sprintf(`cd /var/lib/cni/results; cat $(grep -l '"K8S_POD_NAME","%s"' $(grep -l '"K8S_POD_NAMESPACE","shop"' pods-*))`, pod))
	if err := json.Unmarshal([]byte(text), &kept); err != nil || kept.Container == "" || kept.Netns == "" {
		s.T.Fatalf("the runtime's words about pod %s: %v in %s", pod, err, text)
	}
	return kept
}

// plugin runs the plugin on n1, as a runtime does.
func (s *site) plugin(command string, about sandbox) error {
	s.T.Helper()
	var list struct{ Plugins []map[string]any }
	if err := json.Unmarshal([]byte(s.on("n1", "cat", own)), &list); err != nil {
		s.T.Fatal(err)
	}
	config := list.Plugins[slices.IndexFunc(list.Plugins, func(p map[string]any) bool { return p["type"] == "tacit-cni" })]
	const version = "1.1.0"
	about.Result["cniVersion"] = version
	config["cniVersion"], config["name"], config["prevResult"] = version, "pods", about.Result
	var args []string
	for _, a := range about.Args {
		args = append(args, a[0]+"="+a[1])
	}
	out, err := s.Mesh.Run(s.Patiently(), "n1", "sh", "-c", fmt.Sprintf("CNI_COMMAND=%s CNI_CONTAINERID=%s CNI_NETNS=%s CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin CNI_ARGS='%s' /opt/cni/bin/tacit-cni <<'E'\n%s\nE",
		command, about.Container, about.Netns, strings.Join(args, ";"), asJSON(s.T, config)))
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// everyKind runs pods that are more than one container that stays.
func (s *site) everyKind() {
	s.Apply(strings.ReplaceAll(kinds, "SERVER", s.address("shop", "server")))
	s.Kubectl("wait", "-n", "shop", "--for=condition=complete", "job/job", "--timeout=110s")
	s.wire.TLS(s.Kubectl("get", "pods", "-n", "shop", "-l", "app=job", "-o", "jsonpath={.items[0].status.podIP}"), s.address("shop", "server"), 8080)
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=110s")
	s.Protected("shop", "set-0")
	s.Kubectl("delete", "pod", "-n", "shop", "set-0")
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=110s")
	s.Protected("shop", "set-0")
	s.Await("the client reaches the name of a pod of the set", func(ctx context.Context) error {
		_, err := s.Mesh.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", "set-0.set.shop.svc.cluster.local:8080", "MARKER")
		return err
	})
	s.wire.TLS(s.address("shop", "client"), s.address("shop", "set-0"), 8080)
	if logs := s.Kubectl("logs", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "-c", "agent", "--tail=-1"); strings.Contains(logs, "not every node knows") {
		s.T.Errorf("pods began before every node knew them, with every node there:\n%s", logs)
	}
}

// pod makes one on n1.
func (s *site) pod(namespace, name string) {
	s.Apply(`{apiVersion: v1, kind: Pod, metadata: {name: ` + name + `, namespace: ` + namespace + `}, spec: {nodeName: n1, terminationGracePeriodSeconds: 1,
		containers: [{name: app, image: "tacit.test/app:1", imagePullPolicy: Never, args: [sleep]}]}}`)
}

// agentAway has pods begin where no agent is: those that must be protected wait.
func (s *site) agentAway() {
	s.Kubectl("patch", "daemonset", "-n", "tacit-system", "tacit-node", "-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"yes"}}}}}`)
	s.KubectlPrints("", "get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "-o", "name") // the agents have ended
	s.pod("shop", "late")
	s.pod("plain", "late")
	s.Kubectl("wait", "-n", "plain", "--for=condition=Ready", "pod/late", "--timeout=110s")
	s.Await("the pod of the enrolled namespace is refused", func(context.Context) error {
		events := s.Kubectl("get", "events", "-n", "shop", "--field-selector=involvedObject.name=late,reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(events, "the pod cannot be protected and is not started") {
			return fmt.Errorf("events: %q", events)
		}
		return nil
	})
	if err := s.dial("shop", "client"); err == nil || !strings.Contains(err.Error(), "timeout") {
		s.T.Errorf("a captured pod without agent and proxy dials the server: %v, want that it waits in vain", err)
	}
	if ready := s.Kubectl("get", "node", "n1", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`); ready != "True" {
		s.T.Errorf("the node is Ready: %s", ready)
	}
	s.KubectlPrints("Unknown AgentAway", "get", "pod", "-n", "shop", "client", "-o",
		`jsonpath={.status.conditions[?(@.type=="tacit.dev/Protected")].status} {.status.conditions[?(@.type=="tacit.dev/Protected")].reason}`)
	s.checkFinds("LACKING pod shop/client: not protected", "LACKING pod shop/late: not protected")
	s.Kubectl("patch", "daemonset", "-n", "tacit-system", "tacit-node", "-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}`)
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node", "--timeout=110s")
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/late", "--timeout=110s")
	s.Protected("shop", "late")
	s.dials("shop", "late")
	s.dials("shop", "client")
	s.Kubectl("label", "namespace", "plain", "tacit.dev/mesh=on")
	s.Protected("plain", "late") // found in /proc: it began without an agent
	s.dials("plain", "late")
	s.wire.TLS(s.address("plain", "late"), s.address("shop", "server"), 8080)
}

// checkFinds has tacit check say what is wrong.
func (s *site) checkFinds(wrong ...string) {
	s.T.Helper()
	out, err := s.Mesh.Tacit(s.Patiently(), "check")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 {
		s.T.Errorf("tacit check: %v, want exit code 2", err)
	}
	for _, words := range wrong {
		if !strings.Contains(out, words) {
			s.T.Errorf("tacit check does not say %q:\n%s", words, out)
		}
	}
}

// podDeleted takes agent and proxy of both nodes away at once.
func (s *site) podDeleted() {
	s.Kubectl("delete", "pod", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--wait=false")
	// A connection that is established when the last listener of a node is closed is
	// reset; one that comes later waits.
	const ends = 2
	began, tries, failed, slowest := time.Now(), 0, 0, time.Duration(0)
	// For some seconds the proxies drain, and accept what is new; then there is nobody for a while.
	for ; time.Since(began) < 15*time.Second; tries++ {
		at := time.Now()
		if err := s.dial("shop", "client"); err != nil {
			failed++
			s.T.Logf("a new connection %.1f s after the pods were deleted: %v", at.Sub(began).Seconds(), err)
		}
		slowest = max(slowest, time.Since(at))
	}
	if failed > ends {
		s.T.Errorf("%d of %d new connections failed: want that one waits while no proxy is there", failed, tries)
	}
	s.T.Logf("%d new connections, one after the other, the slowest took %.1f s", tries, slowest.Seconds())
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node", "--timeout=110s")
	s.dials("shop", "client")
	s.Protected("shop", "client")
}

// reboots cuts a node's power while the other one's pod keeps talking to it.
func (s *site) reboots() {
	before := s.Kubectl("get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
	var talked atomic.Int32
	more := func() {
		n := talked.Load()
		s.Await("the client talks to the server", func(context.Context) error {
			if talked.Load() == n {
				return errors.New("not a word")
			}
			return nil
		})
	}
	ctx, stop := context.WithCancel(s.Patiently())
	ended := make(chan struct{})
	go func() { s.talk(ctx, &talked); close(ended) }()
	defer func() { stop(); <-ended }()
	more()
	if err := s.Mesh.Reboot(s.Patiently(), "n2"); err != nil {
		s.T.Error(err)
	}
	s.Await("the server has begun again", func(context.Context) error {
		after := s.Kubectl("get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
		if after == before+" true" || !strings.HasSuffix(after, " true") {
			return errors.New(after)
		}
		return nil
	})
	s.Protected("shop", "server")
	more()
	s.T.Logf("%d connections meanwhile", talked.Load())
	s.wire.TLS(s.address("shop", "client"), s.address("shop", "server"), 8080)
	s.wire.TLS(s.address("shop", "server"), s.address("shop", "peer"), 8080)
}

// talk keeps saying the marker to the server, wherever it is, and counts.
func (s *site) talk(ctx context.Context, n *atomic.Int32) {
	for ctx.Err() == nil {
		ip, err := s.Mesh.Kubectl(ctx, "get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.podIP}")
		if err == nil && ip != "" {
			_, err = s.Mesh.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", strings.TrimSpace(ip)+":8080", "MARKER")
		}
		if err == nil && ip != "" {
			n.Add(1)
		}
	}
}
