package control

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"tacit.dev/bench/scale/api"
	"tacit.dev/control/kube"
	"tacit.dev/wire/xds"
)

// apiServer is an API server in memory that has trouble with one ConfigMap.
type apiServer struct {
	*api.Store
	client  kube.Client
	trouble atomic.Pointer[trouble]
}

// trouble is what becomes of writes of a ConfigMap.
type trouble struct {
	name string
	do   http.HandlerFunc
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{Store: api.NewStore()}
	inner := api.NewServer(api.Config{Store: s.Store})
	l := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if now := s.trouble.Load(); now != nil && r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/"+now.name) {
			now.do(w, r)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(func() { l.CloseClientConnections(); l.Close() })
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: \"" + l.URL + "\"}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.client, err = kube.NewClient(file); err != nil {
		t.Fatal(err)
	}
	return s
}

// version is that of the ConfigMap of a shard, "" if there is none.
func (s *apiServer) version(shard int) string {
	if m := s.Get(api.ConfigMaps, "tacit-system", kube.CapturedMap(shard)); m != nil {
		return m.GetResourceVersion()
	}
	return ""
}

// 150,000 captured pods with long names are remembered: no shard comes near to what an API server takes. A
// pod that changes has one shard written.
func TestManyPodsAreRemembered(t *testing.T) {
	const pods, most = 150_000, 640 << 10
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	word := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = "bcdfghjklmnpqrstvwxz2456789"[random.IntN(27)]
		}
		return string(b)
	}
	server := newAPIServer(t)
	s := loaded(t, kube.NewStorage(server.client, "tacit-system"))
	var last memory
	for i := range pods {
		last = memory{
			UID:       fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", random.Uint32(), random.IntN(1<<16), random.IntN(1<<12), random.IntN(1<<12), random.Int64N(1<<48)),
			Namespace: fmt.Sprintf("payments-production-eu-%s", word(20)), Name: fmt.Sprintf("checkout-gateway-%s-%s-%s", word(20), word(10), word(5)),
			Node: fmt.Sprintf("ip-10-128-%d-%d.eu-central-1.compute.internal", i/30>>8, i/30&255), State: Announced,
		}
		s.put(last)
	}
	saved(t, s)
	largest, all := 0, 0
	before := make(map[int]string)
	for i := range kube.Shards {
		size := len(server.Get(api.ConfigMaps, "tacit-system", kube.CapturedMap(i)).(*corev1.ConfigMap).BinaryData["captured.json.gz"])
		largest, all, before[i] = max(largest, size), all+size, server.version(i)
	}
	t.Logf("%d bytes of a pod, %d of the largest shard", all/pods, largest)
	if largest > most {
		t.Errorf("a shard of %d bytes, want at most %d of the 1 MiB that an API server takes", largest, most)
	}
	last.State = Withdrawing
	s.put(last)
	saved(t, s)
	for i := range kube.Shards {
		if written := server.version(i) != before[i]; written != (i == shardOf(last.UID)) {
			t.Errorf("shard %d of %s is written: %v", i, last.UID, written)
		}
	}
	again, err := (&store{storage: kube.NewStorage(server.client, "tacit-system")}).load()
	if err != nil || len(again) != pods {
		t.Errorf("%d of %d pods remembered, error %v", len(again), pods, err)
	}
	for _, m := range again {
		if m.UID == last.UID && m != last {
			t.Errorf("%+v, want %+v", m, last)
		}
	}
}

// saved saves everything, however slow the machine.
func saved(t *testing.T, s *store) {
	t.Helper()
	for limit := time.Now().Add(patience); ; s.wait() {
		err := s.save()
		if err == nil {
			return
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
	}
}

// heldStorage saves when it is let.
type heldStorage struct {
	Storage
	gate chan struct{}
}

func (s *heldStorage) Load() (none [kube.Shards][]byte, err error) { return none, nil }
func (s *heldStorage) Save(int, []byte) error                      { <-s.gate; return nil }
func (s *heldStorage) String() string                              { return "held" }

// A write that takes long is waited for once; what changes meanwhile is saved by the next.
func TestASlowWriteIsWaitedForOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		storage := &heldStorage{gate: make(chan struct{})}
		s := loaded(t, storage)
		defer s.wait()
		for i, step := range []struct {
			put        State
			let, saved bool
			takes      time.Duration
		}{
			{put: Announced, takes: savePatience},
			{},
			{put: Withdrawing},
			{let: true}, // begins the next write
			{let: true, saved: true},
		} {
			if step.put != "" {
				s.put(memory{UID: "a", State: step.put})
			}
			if step.let {
				storage.gate <- struct{}{}
				synctest.Wait()
			}
			began := time.Now()
			if err := s.save(); (err == nil) != step.saved || s.keeps("a") != step.saved || time.Since(began) != step.takes {
				t.Errorf("step %d: error %v after %v, keeps %v", i, err, time.Since(began), s.keeps("a"))
			}
		}
	})
}

// A shard that cannot be written for good, be it refused or without an answer, holds up its own
// pods alone, and the Mesh says so.
func TestAShardThatCannotBeWritten(t *testing.T) {
	for name, do := range map[string]http.HandlerFunc{
		"is refused": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "request is too large", http.StatusRequestEntityTooLarge)
		},
		"has no answer": func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // else its context does not end
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, server := newBench(t, "n1"), newAPIServer(t)
			server.Put(api.Meshes, &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"name": kube.MeshName}, "spec": map[string]any{"enrollment": kube.All}}})
			server.Put(api.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
			broken := shardOf("uid-p0")
			storage := kube.NewStorage(server.client, "tacit-system")
			b.must(errorOf(storage.Load()), storage.Save(broken, []byte("[]")))
			server.trouble.Store(&trouble{kube.CapturedMap(broken), do})
			pod := func(i int) {
				server.Put(api.Pods, &corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("p%d", i), UID: types.UID(fmt.Sprintf("uid-p%d", i))},
					Spec:       corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{PodIP: fmt.Sprintf("10.30.1.%d", 10+i)},
				})
			}
			pod(0)
			b.startWith(server)
			n1 := b.node("n1", nil)
			n1.awaitEnroll("p0", true)
			n1.report("p0", xds.Captured)
			server.awaitReady(t, metav1.ConditionFalse, "NotSaved", fmt.Sprintf("shard %d", broken))
			for i := 1; i < 4; i++ {
				if shardOf(fmt.Sprintf("uid-p%d", i)) == broken {
					t.Fatalf("p%d has the shard of p0", i)
				}
				began := time.Now()
				pod(i)
				n1.awaitEnroll(fmt.Sprintf("p%d", i), true)
				n1.report(fmt.Sprintf("p%d", i), xds.Captured)
				n1.awaitDirect(fmt.Sprintf("10.30.1.%d", 10+i), true)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("p%d is announced after %v", i, took)
				}
			}
			n1.neverDirect("10.30.1.10")
			server.trouble.Store(nil)
			n1.awaitDirect("10.30.1.10", true)
			server.awaitReady(t, metav1.ConditionTrue, "Serving", "")
		})
	}
}

func errorOf(_ any, err error) error { return err }

// startWith is start with the objects, the storage and the display of an API server.
func (b *bench) startWith(s *apiServer) {
	b.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err, os.MkdirAll(b.dir, 0o755))
	b.addr = l.Addr().String()
	log := slog.New(slog.NewTextHandler(b.t.Output(), nil))
	c, err := New(Config{
		Source: kube.NewAPI(kube.APIConfig{Client: s.client}), Keys: kube.NewKeySecret(s.client, "tacit-system", "tacit-ca"), Listener: l, Nodes: b.nodes(),
		Storage: &bundled{Storage: kube.NewStorage(s.client, "tacit-system"), file: filepath.Join(b.dir, "bundle.pem")}, Display: kube.NewDisplay(s.client, 0, log),
		TrustDomain: "lab", Namespace: "tacit-system", GoneAfter: b.gone, Log: log,
	})
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go runControl(ctx, c, ended)
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			b.t.Errorf("run: %v", err)
		}
	})
	b.t.Cleanup(b.stop)
}

// bundled puts the roots where the test's nodes find them.
type bundled struct {
	Storage
	file string
}

func (s *bundled) PublishBundle(b []byte) error { return os.WriteFile(s.file, b, 0o644) }

// awaitReady waits until the Mesh has that condition Ready.
func (s *apiServer) awaitReady(t *testing.T, status metav1.ConditionStatus, reason, text string) {
	t.Helper()
	var m kube.Mesh
	for limit := time.Now().Add(patience); time.Now().Before(limit); {
		o := s.Get(api.Meshes, "", kube.MeshName).(*unstructured.Unstructured)
		m = kube.Mesh{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &m); err != nil {
			t.Fatal(err)
		}
		c := meta.FindStatusCondition(m.Status.Conditions, kube.MeshReady)
		if c != nil && c.Status == status && c.Reason == reason && strings.Contains(c.Message, text) {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
	t.Fatalf("no condition Ready %s, %s, %q: %s", status, reason, text, cmp.Diff(kube.MeshStatus{}, m.Status))
}
