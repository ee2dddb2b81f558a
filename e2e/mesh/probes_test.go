package mesh_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestProbes: what the kubelet learns of a pod is how the application is, for every
// kind of probe; it learns of the end too; and it comes with its own address.
func TestProbes(t *testing.T) {
	s := enrolled(t)
	s.apply("probes.yaml")
	s.ready("http", "tcp", "grpc", "exec")
	s.captured("http", "tcp", "grpc", "exec", "deaf")
	t.Run("healthy", func(t *testing.T) { space{s.Mesh, t, s.name}.healthy() })
	t.Run("nobody listens", func(t *testing.T) { space{s.Mesh, t, s.name}.refused() })
	t.Run("while agent and proxy are replaced", func(t *testing.T) { space{s.Mesh, t, s.name}.replaced() })
	t.Run("told to fail", func(t *testing.T) { space{s.Mesh, t, s.name}.failing() })
}

// healthy: no probe has failed so far, and those over HTTP came from the node.
func (s space) healthy() {
	for _, name := range []string{"http", "tcp", "grpc", "exec"} {
		if n := restarts(s.pod(name)); n != 0 {
			s.t.Errorf("pod %s was started again %d times", name, n)
		}
	}
	node := s.pod("http").Status.HostIP
	number := node[strings.LastIndex(node, ".")+2:] // 172.30.0.1N
	own := []string{node, "10.244." + number + ".1"}
	var calls string
	s.eventually("a probe of each kind: startup, readiness, liveness", func() error { // the first of a kind comes within its period
		calls = s.exec("http", "/app", "get", "http://127.0.0.1:8080/probers")
		if n := strings.Count(calls, "\n"); n != 3 {
			return fmt.Errorf("%d kinds came:\n%s", n, calls)
		}
		return nil
	})
	for line := range strings.Lines(calls) {
		words := strings.Fields(line)
		if len(words) != 2 || !slices.Contains(own, words[1]) {
			s.t.Errorf("probes came from %q, want one of the node's addresses %q", line, own)
		}
	}
}

func restarts(p *corev1.Pod) int32 { return p.Status.ContainerStatuses[0].RestartCount }

// refused: a probe of a port where nobody listens fails as it does without a mesh,
// also one that only connects.
func (s space) refused() {
	for _, container := range []string{"tcp", "http", "grpc"} {
		s.eventually("a failed probe of container "+container, func() error {
			events, err := s.Client().CoreV1().Events(s.name).List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=deaf,reason=Unhealthy"})
			if err != nil {
				return err
			}
			for _, e := range events.Items {
				if strings.Contains(e.InvolvedObject.FieldPath, "{"+container+"}") {
					return nil
				}
			}
			return fmt.Errorf("%d other events", len(events.Items))
		})
	}
	for _, c := range s.pod("deaf").Status.ContainerStatuses {
		if c.Ready {
			s.t.Errorf("container %s, which listens nowhere, is ready", c.Name)
		}
	}
}

// replaced: a healthy pod stays healthy for its kubelet while its node has no proxy.
// One probe that fails would have it started again.
func (s space) replaced() {
	node := s.pod("http").Spec.NodeName
	s.kubectl("delete", "pod", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--field-selector=spec.nodeName="+node)
	s.eventually("the node has its pod again", func() error {
		ready, err := s.Kubectl(s.t.Context(), "get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node", "--field-selector=spec.nodeName="+node,
			"-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && ready != "True" {
			err = fmt.Errorf("ready: %q", ready)
		}
		return err
	})
	for _, name := range []string{"http", "tcp", "grpc", "exec"} {
		if n := restarts(s.pod(name)); n != 0 {
			s.t.Errorf("pod %s was started again %d times", name, n)
		}
	}
}

// failing: the kubelet starts again what says that it is not alive.
func (s space) failing() {
	failing := []string{"http", "grpc", "exec"}
	for _, name := range failing {
		_, _ = s.try("exec", name, "--", "/app", "post", "http://127.0.0.1:8080/fail") // may end with its container
	}
	for _, name := range failing {
		s.eventually("restart of "+name, func() error {
			if restarts(s.pod(name)) == 0 {
				return fmt.Errorf("pod %s has not been started again", name)
			}
			return nil
		})
	}
}
