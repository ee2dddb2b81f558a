package node

import (
	"context"
	_ "embed"
	"errors"
	"fmt"

	"strings"
	"testing"
	"time"

	"tacit.dev/e2e/build"
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

// patience bounds whatever is waited for.
const patience = 2 * time.Minute

const (
	folder = "/etc/cni/net.d"
	own    = folder + "/00-tacit.conflist"
	base   = folder + "/10-ptp.conflist"
)

// site is a cluster and the test that looks at it.
type site struct {
	t *testing.T
	*mesh.Mesh
	wire *mesh.Recording
}

// TestNode is one cluster's life; a cluster for each part would cost half a minute more.
func TestNode(t *testing.T) {
	s := &site{Mesh: mesh.Start(t, mesh.Options{Bare: true}), t: t}
	s.apply(early)
	s.kubectl("wait", "-n", "early", "--for=condition=Ready", "pod/early", "--timeout=60s")
	if err := s.Install(s.patiently()); err != nil {
		t.Fatal(err)
	}
	s.wire = s.Record(t)
	s.apply(app)
	s.kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
	for _, part := range []struct {
		name string
		run  func(*site)
	}{
		{"a running pod is found", (*site).findsRunning},
		{"the plugin stays in the chain", (*site).staysInChain},
		{"pods of every kind", (*site).everyKind},
		{"the agent is away", (*site).agentAway},
		{"the node's pod is deleted", (*site).podDeleted},
		{"the node reboots", (*site).reboots},
	} {
		if !t.Run(part.name, func(t *testing.T) { s.t = t; part.run(s) }) {
			t.FailNow()
		}
	}
	s.t = t
	s.wire.Hidden("MARKER")
}

func (s *site) patiently() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *site) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.Kubectl(s.patiently(), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (s *site) apply(text string) {
	s.t.Helper()
	if _, err := s.Apply(s.patiently(), text); err != nil {
		s.t.Fatal(err)
	}
}

// on runs a command on a node.
func (s *site) on(node string, words ...string) string {
	s.t.Helper()
	out, err := s.Run(s.patiently(), node, words...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) await(what string, is func() error) (took time.Duration) {
	s.t.Helper()
	began := time.Now()
	if err := build.Poll(s.patiently(), is); err != nil {
		s.t.Fatalf("wait until %s: %v", what, err)
	}
	return time.Since(began)
}

// protected waits until a pod is.
func (s *site) protected(namespace, pod string) {
	s.t.Helper()
	s.await(pod+" is protected", func() error {
		out := s.kubectl("get", "pod", "-n", namespace, pod, "-o", `jsonpath={.status.conditions[?(@.type=="tacit.dev/Protected")].status}`)
		if out != "True" {
			return fmt.Errorf("condition %q", out)
		}
		return nil
	})
}

func (s *site) address(namespace, pod string) string {
	s.t.Helper()
	return s.kubectl("get", "pod", "-n", namespace, pod, "-o", "jsonpath={.status.podIP}")
}

// dial says something to the server, in words that must not be seen. It may have to
// wait for a lost SYN, which comes again after 1, 3 and 7 s.
func (s *site) dial(namespace, pod string) error {
	ctx, cancel := context.WithTimeout(s.patiently(), 10*time.Second)
	defer cancel()
	_, err := s.Kubectl(ctx, "exec", "-n", namespace, pod, "--", "/app", "dial", s.address("shop", "server")+":8080", "MARKER")
	return err
}

// dials waits until that succeeds.
func (s *site) dials(namespace, pod string) {
	s.t.Helper()
	s.await(pod+" reaches the server", func() error { return s.dial(namespace, pod) })
}

// findsRunning enrols a pod of which no runtime has ever told.
func (s *site) findsRunning() {
	s.kubectl("label", "namespace", "early", "tacit.dev/mesh=on")
	s.protected("early", "early")
	s.dials("early", "early")
	s.wire.TLS(s.address("early", "early"), s.address("shop", "server"), 8080)
}

// staysInChain has somebody change and remove files.
func (s *site) staysInChain() {
	const here = `for i in $(seq 100); do grep -q '"mtu": *%[1]d' ` + own + ` 2>/dev/null && grep -q tacit-cni ` + own + ` && echo $i && exit; sleep 0.01; done; ls ` + folder + `; cat ` + own + `; exit 1`
	text := s.on("n1", "cat", base)
	if n := strings.Count(s.on("n1", "cat", own), `"tacit-cni"`); n != 1 {
		s.t.Errorf("the plugin is %d times in the chain", n)
	}
	for mtu := 1400; mtu < 1403; mtu++ {
		changed := strings.Replace(text, `"type":`, fmt.Sprintf(`"mtu": %d, "type":`, mtu), 1)
		s.on("n1", "sh", "-c", "cat > "+base+".tmp <<'E'\n"+changed+"\nE\nmv "+base+".tmp "+base+"; "+fmt.Sprintf(here, mtu))
		s.on("n1", "sh", "-c", "rm "+own+"; "+fmt.Sprintf(here, mtu))
	}
	s.on("n1", "sh", "-c", "cat > "+base+" <<'E'\n"+text+"\nE")
	if files := s.on("n1", "ls", folder); strings.Contains(files, ".new") {
		s.t.Errorf("left over: %s", files)
	}
}

// everyKind runs pods that are more than one container that stays.
func (s *site) everyKind() {
	s.apply(strings.ReplaceAll(kinds, "SERVER", s.address("shop", "server")))
	s.kubectl("wait", "-n", "shop", "--for=condition=complete", "job/job", "--timeout=90s")
	s.kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=60s")
	s.protected("shop", "set-0")
	s.kubectl("delete", "pod", "-n", "shop", "set-0")
	s.kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=60s")
	s.protected("shop", "set-0")
	s.await("the client reaches the name of a pod of the set", func() error {
		_, err := s.Kubectl(s.patiently(), "exec", "-n", "shop", "client", "--", "/app", "dial", "set-0.set.shop.svc.cluster.local:8080", "MARKER")
		return err
	})
}

// pod makes one on n1.
func (s *site) pod(namespace, name string) {
	s.apply(`{apiVersion: v1, kind: Pod, metadata: {name: ` + name + `, namespace: ` + namespace + `}, spec: {nodeName: n1, terminationGracePeriodSeconds: 1,
		containers: [{name: app, image: "tacit.test/app:1", imagePullPolicy: Never, args: [sleep]}]}}`)
}

// agentAway has pods begin where no agent is: those that must be protected wait.
func (s *site) agentAway() {
	s.kubectl("patch", "daemonset", "-n", "tacit-system", "tacit-node", "-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"yes"}}}}}`)
	s.await("the agents have ended", func() error {
		if out := s.kubectl("get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "-o", "name"); out != "" {
			return errors.New(out)
		}
		return nil
	})
	s.pod("shop", "late")
	s.pod("plain", "late")
	s.kubectl("wait", "-n", "plain", "--for=condition=Ready", "pod/late", "--timeout=60s")
	s.await("the pod of the enrolled namespace is refused", func() error {
		events := s.kubectl("get", "events", "-n", "shop", "--field-selector=involvedObject.name=late,reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(events, "the pod cannot be protected and is not started") {
			return fmt.Errorf("events: %q", events)
		}
		return nil
	})
	if err := s.dial("shop", "client"); err == nil {
		s.t.Error("a captured pod reaches the server without agent and proxy")
	}
	if ready := s.kubectl("get", "node", "n1", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`); ready != "True" {
		s.t.Errorf("the node is Ready: %s", ready)
	}
	s.kubectl("patch", "daemonset", "-n", "tacit-system", "tacit-node", "-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}`)
	s.kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node", "--timeout=90s")
	s.kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/late", "--timeout=90s")
	s.protected("shop", "late")
	s.dials("shop", "late")
	s.dials("shop", "client")
}

// podDeleted takes agent and proxy of both nodes away at once.
func (s *site) podDeleted() {
	s.kubectl("delete", "pod", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--wait=false")
	// A connection that is established when the last listener is closed is reset; one
	// that comes later waits.
	const ending = 3 * time.Second
	began, tries, slowest := time.Now(), 0, time.Duration(0)
	for ; time.Since(began) < 10*time.Second; tries++ {
		at := time.Now()
		if err := s.dial("shop", "client"); err != nil {
			s.t.Logf("a new connection %.1f s after the pods were deleted: %v", at.Sub(began).Seconds(), err)
			if at.Sub(began) > ending {
				s.t.Errorf("refused while no proxy is there, want that it waits")
			}
		}
		slowest = max(slowest, time.Since(at))
	}
	s.t.Logf("%d new connections, one after the other, the slowest took %.1f s", tries, slowest.Seconds())
	s.kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node", "--timeout=90s")
	s.dials("shop", "client")
	s.protected("shop", "client")
}

// reboots cuts a node's power while the other one's pod keeps talking to it.
func (s *site) reboots() {
	before := s.kubectl("get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
	ctx, stop := context.WithCancel(s.patiently())
	talked := make(chan int)
	go func() { talked <- s.talk(ctx) }()
	if err := s.Reboot(s.patiently(), "n2"); err != nil {
		s.t.Error(err)
	}
	s.await("the server has begun again", func() error {
		after := s.kubectl("get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
		if after == before+" true" || !strings.HasSuffix(after, " true") {
			return errors.New(after)
		}
		return nil
	})
	s.protected("shop", "server")
	s.dials("shop", "client")
	stop()
	s.t.Logf("%d connections meanwhile", <-talked)
	s.wire.TLS(s.address("shop", "client"), s.address("shop", "server"), 8080)
}

// talk keeps saying the marker to the server, wherever it is, and counts.
func (s *site) talk(ctx context.Context) (n int) {
	for ctx.Err() == nil {
		ip, err := s.Kubectl(ctx, "get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.podIP}")
		if err == nil && ip != "" {
			_, err = s.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", strings.TrimSpace(ip)+":8080", "MARKER")
		}
		if err == nil {
			n++
		}
	}
	return n
}
