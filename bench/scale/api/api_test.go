package api

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/control/kube"
)

// serve serves an API until the test ends, and returns control's own client of it.
func serve(t *testing.T, s *Store) kube.Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		review := func(token string) (audience, user, node string, ok bool) {
			return "proxy", "node", "n1", token == "good"
		}
		if err := NewServer(Config{Store: s, Review: review}).Run(ctx, l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: \"http://%s\"}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n", l.Addr())
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.NewClient(file)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func configMap(size int) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a", Namespace: "b"}, BinaryData: map[string][]byte{"c": bytes.Repeat([]byte{1}, size)}}
}

func TestWritesAreRefusedAsByTheRealOne(t *testing.T) {
	maps := serve(t, NewStore()).CoreV1().ConfigMaps("b")
	if _, err := maps.Create(t.Context(), configMap(maxConfigMap), metav1.CreateOptions{}); !apierrors.IsRequestEntityTooLargeError(err) {
		t.Errorf("a ConfigMap of more than 1 MiB: %v", err)
	}
	made, err := maps.Create(t.Context(), configMap(1000), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Create(t.Context(), configMap(1000), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("made twice: %v", err)
	}
	if _, err := maps.Update(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := maps.Update(t.Context(), made, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("written on an old version: %v", err)
	}
}

func TestSourceFollows(t *testing.T) {
	s := NewStore()
	pod := func(name string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "b", Name: name}}
	}
	s.Put(Pods, pod("first"))
	source := kube.NewAPI(kube.APIConfig{Client: serve(t, s)})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	told := make(chan string, 100)
	var running sync.WaitGroup
	running.Go(func() {
		if err := source.Run(ctx, func(events []kube.Event) {
			for _, e := range events {
				told <- fmt.Sprint(e.Name, e.Object != nil)
			}
		}); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	await := func(want string) {
		t.Helper()
		var got []string
		for {
			select {
			case text := <-told:
				if got = append(got, text); text == want {
					return
				}
			case <-ctx.Done():
				t.Fatalf("told of %s, want %s", strings.Join(got, " "), want)
			}
		}
	}
	await("firsttrue")
	s.Put(Pods, pod("second"))
	await("secondtrue")
	s.Delete(Pods, "b", "first")
	await("firstfalse")
}

func TestReview(t *testing.T) {
	c := serve(t, NewStore())
	r := kube.NewReviewer(kube.ReviewerConfig{Client: c.Reviews, ProxyAudience: "proxy", AgentAudience: "agent", Users: []string{"node"}})
	if p, err := r.Authenticate(t.Context(), "good"); err != nil || p.Node != "n1" || p.Agent {
		t.Errorf("a good token is that of %v, %v", p, err)
	}
	if p, err := r.Authenticate(t.Context(), "bad"); err == nil {
		t.Errorf("a bad token is that of %v", p)
	}
}
