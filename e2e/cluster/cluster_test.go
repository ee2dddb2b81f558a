package cluster_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/cluster"
)

// TestCluster is one cluster's life: the parts build on each other, and a cluster
// for each would cost a minute more.
func TestCluster(t *testing.T) {
	c := cluster.Start(t, cluster.Options{})
	t.Logf("%d nodes Ready after %.1fs", len(c.Nodes()), c.ReadyAfter.Seconds())
	s := startServers(t, c)
	for _, part := range []struct {
		name string
		run  func(serving)
	}{
		{"pods talk", serving.everyWay},
		{"exec, logs, port-forward", execLogsForward},
		{"restart of the runtime", restartRuntime},
		{"reboot", reboot},
		{"another node", addNode},
		{"a node less", removeNode},
		{"nothing left", down},
	} {
		if !t.Run(part.name, func(t *testing.T) { s.t = t; part.run(s) }) {
			t.FailNow()
		}
	}
}

func execLogsForward(s serving) {
	pod := s.pods()["n1"]
	if out := s.kubectl("exec", pod.Name, "--", "/app", "resolve", "localhost"); !strings.Contains(out, "127.0.0.1") {
		s.t.Errorf("exec printed %q", out)
	}
	if out := s.kubectl("logs", pod.Name); !strings.Contains(out, "serving on [::]:8080") {
		s.t.Errorf("logs are %q", out)
	}
	if got, want := greetingThroughPortForward(s, pod.Name), "this is "+pod.Name+" on n1"; !strings.Contains(got, want) {
		s.t.Errorf("through port-forward: %q, want %q", got, want)
	}
}

func greetingThroughPortForward(s serving, pod string) string {
	ctx, cancel := context.WithCancel(patiently(s.t))
	cmd := s.KubectlCommand(ctx, "port-forward", "pod/"+pod, ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }() // killed: that is no error
	var port int
	line, err := bufio.NewReader(out).ReadString('\n')
	if _, scanned := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d", &port); err != nil || scanned != nil {
		s.t.Fatalf("port-forward said %q: %v", line, err)
	}
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	greeting, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil && err != io.EOF {
		s.t.Error(err)
	}
	return greeting
}

// restartRuntime: the pod is the same container before and after, and new ones can
// be made.
func restartRuntime(s serving) {
	before := s.pods()["n1"]
	if err := s.RestartRuntime(patiently(s.t), "n1"); err != nil {
		s.t.Fatal(err)
	}
	after := s.pods()["n1"]
	if container(after) != container(before) {
		s.t.Errorf("container %s became %s", container(before), container(after))
	}
	s.kubectl("delete", "pod", before.Name)
	s.everyWay()
}

func container(p corev1.Pod) string { return p.Status.ContainerStatuses[0].ContainerID }

// reboot: the node says that it was one, what was on its disk is still there, and
// the pod is the same pod in a new container.
func reboot(s serving) {
	before := s.pods()["n2"]
	run := func(command ...string) string {
		out, err := s.Run(patiently(s.t), "n2", command...)
		if err != nil {
			s.t.Fatal(err)
		}
		return out
	}
	run("touch", "/var/lib/disk", "/run/memory")
	begin := time.Now()
	if err := s.Reboot(patiently(s.t), "n2"); err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("node Ready again after %.1fs", time.Since(begin).Seconds())
	if left := run("find", "/var/lib/disk", "/run", "-maxdepth", "1", "-name", "disk", "-o", "-name", "memory"); left != "/var/lib/disk\n" {
		s.t.Errorf("after the reboot there is %q", left)
	}
	err := build.Poll(patiently(s.t), func() error {
		p, err := s.Client().CoreV1().Pods("default").Get(s.t.Context(), before.Name, metav1.GetOptions{})
		if err == nil && (!podReady(*p) || container(*p) == container(before)) {
			err = fmt.Errorf("pod %s has not been started again", p.Name)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.everyWay()
}

func addNode(s serving) {
	begin := time.Now()
	name, err := s.AddNode(patiently(s.t))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("%s Ready after %.1fs", name, time.Since(begin).Seconds())
	if len(s.pods()) != 3 {
		s.t.Errorf("servers on %d nodes, want 3", len(s.pods()))
	}
	s.everyWay()
}

func removeNode(s serving) {
	if err := s.RemoveNode(patiently(s.t), "n1"); err != nil {
		s.t.Fatal(err)
	}
	if got, want := s.Nodes(), []string{"n2", "n3"}; !slices.Equal(got, want) {
		s.t.Errorf("nodes %v, want %v", got, want)
	}
	if out := s.kubectl("get", "nodes", "-o", "name"); out != "node/n2\nnode/n3\n" {
		s.t.Errorf("kubectl still sees %q", out)
	}
	s.everyWay()
}

func down(s serving) {
	r := record(s.t, s.View)
	begin := time.Now()
	if err := s.Down(patiently(s.t)); err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("down after %.1fs", time.Since(begin).Seconds())
	r.nothingLeft(s.t)
}

// TestTwoClusters: the same addresses twice on one machine.
func TestTwoClusters(t *testing.T) {
	first := startServers(t, cluster.Start(t, cluster.Options{Nodes: 1, NoDNS: true}))
	second := startServers(t, cluster.Start(t, cluster.Options{Nodes: 1, NoDNS: true}))
	for _, s := range []serving{first, second} {
		pod := s.pods()["n1"]
		if !strings.HasPrefix(pod.Status.PodIP, "10.244.1.") {
			t.Errorf("pod has %s", pod.Status.PodIP)
		}
		s.reaches(pod, net.JoinHostPort(pod.Status.PodIP, "8080"), pod.Name)
	}
	first.kubectl("delete", "daemonset", "server")
	if pods := second.pods(); len(pods) != 1 {
		t.Errorf("the other cluster has %d servers, want 1", len(pods))
	}
}

// TestDualStack: pods, services and their names have both families.
func TestDualStack(t *testing.T) {
	s := startServers(t, cluster.Start(t, cluster.Options{DualStack: true}))
	for node, p := range s.pods() {
		if len(p.Status.PodIPs) != 2 {
			t.Errorf("the pod on %s has %v, want an address of each family", node, p.Status.PodIPs)
		}
	}
	s.everyWay()
	out := s.kubectl("exec", s.pods()["n1"].Name, "--", "/app", "resolve", "server.default.svc.cluster.local")
	if !strings.Contains(out, "10.96.") || !strings.Contains(out, "fd00:10:96:") {
		t.Errorf("the service's name has %q, want both families", out)
	}
}
