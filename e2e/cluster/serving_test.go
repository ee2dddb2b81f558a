package cluster_test

import (
	"context"
	_ "embed"
	"fmt"
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

//go:embed testdata/server.yaml
var serverYAML string

// serving is a cluster with a server on every node.
type serving struct {
	*cluster.Cluster
	t *testing.T
}

func startServers(t *testing.T, c *cluster.Cluster) serving {
	t.Helper()
	if _, err := c.Apply(t.Context(), serverYAML); err != nil {
		t.Fatal(err)
	}
	s := serving{c, t}
	s.rollout("daemonset/server")
	return s
}

// patiently is a context for what takes seconds, and minutes on a busy machine.
func patiently(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func (s serving) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.Kubectl(patiently(s.t), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s serving) rollout(what string, more ...string) {
	s.t.Helper()
	s.kubectl(append([]string{"rollout", "status", "--timeout=3m", what}, more...)...)
}

// pods are the servers that run, one on each node, by the nodes' names.
func (s serving) pods() map[string]corev1.Pod {
	s.t.Helper()
	all := map[string]corev1.Pod{}
	err := build.Poll(patiently(s.t), func() error {
		clear(all)
		list, err := s.Client().CoreV1().Pods("default").List(s.t.Context(), metav1.ListOptions{LabelSelector: "app=server"})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.DeletionTimestamp == nil && podReady(p) {
				all[p.Spec.NodeName] = p
			}
		}
		if len(all) != len(s.Nodes()) {
			return fmt.Errorf("servers on %d nodes of %d", len(all), len(s.Nodes()))
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

func podReady(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// reaches has a pod dial until the answer has the words: rules of a new endpoint
// may come a moment after its pod is ready.
func (s serving) reaches(from corev1.Pod, address string, words ...string) {
	s.t.Helper()
	err := build.Poll(patiently(s.t), func() error {
		out, err := s.Kubectl(s.t.Context(), "exec", from.Name, "--", "/app", "dial", address, "hello there")
		if err != nil {
			return err
		}
		for _, w := range append(words, "hello there") {
			if !strings.Contains(out, w) {
				return fmt.Errorf("no %q in %q", w, out)
			}
		}
		return nil
	})
	if err != nil {
		s.t.Errorf("%s on %s dials %s: %v", from.Name, from.Spec.NodeName, address, err)
	}
}

// everyWay has every pod reach every pod, and the service by address and by name.
func (s serving) everyWay() {
	s.t.Helper()
	pods := s.pods()
	service, err := s.Client().CoreV1().Services("default").Get(s.t.Context(), "server", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.rollout("deployment/coredns", "-n", "kube-system")
	for _, from := range pods {
		for _, to := range pods {
			for _, ip := range to.Status.PodIPs {
				s.reaches(from, net.JoinHostPort(ip.IP, "8080"), "this is "+to.Name+" on "+to.Spec.NodeName)
			}
		}
		for _, ip := range service.Spec.ClusterIPs {
			s.reaches(from, net.JoinHostPort(ip, "80"), "this is server-")
		}
		s.reaches(from, "server.default.svc.cluster.local:80", "this is server-")
	}
}
