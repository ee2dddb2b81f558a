package node

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"strings"
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
	own    = folder + "/00-tacit.conflist"
	base   = folder + "/10-ptp.conflist"
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

// findsRunning enrols a pod of which no runtime has ever told.
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
	quickest := map[string]int{"a changed file": 1000, "a removed file": 1000} // looks
	follows := func(what string, mtu int, change string) {
		looks, err := strconv.Atoi(strings.TrimSpace(s.on("n1", "sh", "-c", change+"; "+fmt.Sprintf(here, mtu))))
		if err != nil {
			s.T.Error(err)
		}
		quickest[what] = min(quickest[what], looks)
	}
	for mtu := 1400; mtu < 1403; mtu++ {
		changed := strings.Replace(text, `"type":`, fmt.Sprintf(`"mtu": %d, "type":`, mtu), 1)
		follows("a changed file", mtu, "cat > "+base+".tmp <<'E'\n"+changed+"\nE\nmv "+base+".tmp "+base)
		follows("a removed file", mtu, "rm "+own)
	}
	for what, looks := range quickest {
		if looks > 100 { // a look every 10 ms; a busy machine can delay one, but not each time
			s.T.Errorf("%s: put back after %d looks at best, want 100 at most", what, looks)
		}
	}
	s.on("n1", "sh", "-c", "cat > "+base+" <<'E'\n"+text+"\nE")
	s.Await("nothing is left over", func(context.Context) error {
		if files := s.on("n1", "ls", folder); strings.Contains(files, ".new") {
			return errors.New(files)
		}
		return nil
	})
}

// everyKind runs pods that are more than one container that stays.
func (s *site) everyKind() {
	s.Apply(strings.ReplaceAll(kinds, "SERVER", s.address("shop", "server")))
	s.Kubectl("wait", "-n", "shop", "--for=condition=complete", "job/job", "--timeout=110s")
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=110s")
	s.Protected("shop", "set-0")
	s.Kubectl("delete", "pod", "-n", "shop", "set-0")
	s.Kubectl("rollout", "status", "-n", "shop", "statefulset/set", "--timeout=110s")
	s.Protected("shop", "set-0")
	s.Await("the client reaches the name of a pod of the set", func(ctx context.Context) error {
		_, err := s.Mesh.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", "set-0.set.shop.svc.cluster.local:8080", "MARKER")
		return err
	})
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
	s.Kubectl("patch", "daemonset", "-n", "tacit-system", "tacit-node", "-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}`)
	s.Kubectl("rollout", "status", "-n", "tacit-system", "daemonset/tacit-node", "--timeout=110s")
	s.Kubectl("wait", "-n", "shop", "--for=condition=Ready", "pod/late", "--timeout=110s")
	s.Protected("shop", "late")
	s.dials("shop", "late")
	s.dials("shop", "client")
}

// podDeleted takes agent and proxy of both nodes away at once.
func (s *site) podDeleted() {
	s.Kubectl("delete", "pod", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--wait=false")
	// A connection that is established when the last listener of a node is closed is
	// reset; one that comes later waits.
	const ends = 2
	began, tries, failed, slowest := time.Now(), 0, 0, time.Duration(0)
	for ; time.Since(began) < 10*time.Second; tries++ {
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
	ctx, stop := context.WithCancel(s.Patiently())
	talked := make(chan int)
	go func() { talked <- s.talk(ctx) }()
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
	s.dials("shop", "client")
	stop()
	s.T.Logf("%d connections meanwhile", <-talked)
	s.wire.TLS(s.address("shop", "client"), s.address("shop", "server"), 8080)
}

// talk keeps saying the marker to the server, wherever it is, and counts.
func (s *site) talk(ctx context.Context) (n int) {
	for ctx.Err() == nil {
		ip, err := s.Mesh.Kubectl(ctx, "get", "pod", "-n", "shop", "server", "-o", "jsonpath={.status.podIP}")
		if err == nil && ip != "" {
			_, err = s.Mesh.Kubectl(ctx, "exec", "-n", "shop", "client", "--", "/app", "dial", strings.TrimSpace(ip)+":8080", "MARKER")
		}
		if err == nil {
			n++
		}
	}
	return n
}
