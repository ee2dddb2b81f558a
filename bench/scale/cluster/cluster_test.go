package cluster

import (
	"context"
	"encoding/json"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"tacit.dev/bench/scale/api"
)

// dump is everything that there is, as JSON; times of this moment are left out.
func dump(t *testing.T, s *api.Store) string {
	t.Helper()
	text := ""
	for _, r := range []schema.GroupVersionResource{api.Nodes, api.Namespaces, api.Pods, api.Services, api.Slices} {
		for _, o := range s.List(r) {
			o.SetResourceVersion("")
			o.SetDeletionTimestamp(nil)
			b, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			text += string(b) + "\n"
		}
	}
	return text
}

// live runs a cluster for a while, and returns it with its store.
func live(t *testing.T, seed uint64, during func(context.Context, *Cluster)) (*Cluster, *api.Store) {
	t.Helper()
	s := api.NewStore()
	var c *Cluster
	synctest.Test(t, func(t *testing.T) {
		c = New(Config{Seed: seed, Pods: 300, Nodes: 7, Store: s})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { c.Run(ctx) })
		during(ctx, c)
		time.Sleep(startTime + endTime) // of the bubble: all that follows has happened
		synctest.Wait()
		cancel()
		running.Wait()
	})
	return c, s
}

func TestTheSameSeedMakesTheSame(t *testing.T) {
	churn := func(ctx context.Context, c *Cluster) {
		c.Churn(ctx, 97, time.Second) // no two things happen at one time
		c.Enroll()
		c.Roll(ctx)
	}
	_, one := live(t, 1, churn)
	_, again := live(t, 1, churn)
	_, other := live(t, 2, churn)
	if dump(t, one) != dump(t, again) {
		t.Error("the same seed made two clusters that differ")
	}
	if dump(t, one) == dump(t, other) {
		t.Error("two seeds made the same cluster")
	}
}

func TestNoAddressTwice(t *testing.T) {
	_, s := live(t, 3, func(ctx context.Context, c *Cluster) { c.Churn(ctx, 200, time.Second) })
	has := map[string]string{}
	dual := 0
	for _, o := range s.List(api.Pods) {
		p := o.(*corev1.Pod)
		for i, a := range p.Status.PodIPs {
			if other := has[a.IP]; other != "" {
				t.Errorf("%s and %s are both at %s", p.Name, other, a.IP)
			}
			if has[a.IP] = p.Name; Addresses(string(p.UID))[i].String() != a.IP {
				t.Errorf("%s is at %s, its UID %s says %v", p.Name, a.IP, p.UID, Addresses(string(p.UID)))
			}
		}
		if len(p.Status.PodIPs) == 2 {
			dual++
		}
	}
	if dual == 0 {
		t.Error("no pod has two addresses")
	}
}

func TestNumbers(t *testing.T) {
	c, s := live(t, 4, func(context.Context, *Cluster) {})
	for r, want := range map[schema.GroupVersionResource][2]int{api.Pods: {300, 300}, api.Namespaces: {15, 15}, api.Nodes: {7, 7}, api.Services: {20, 40}} {
		n := len(s.List(r))
		if n < want[0] || n > want[1] {
			t.Errorf("%d %s, want %d to %d", n, r.Resource, want[0], want[1])
		}
	}
	if n := c.Enrolled(); n != 270 {
		t.Errorf("%d pods are enrolled, want 270 of 300", n)
	}
	if all := c.Enroll(); len(all) != 30 || c.Enrolled() != 300 {
		t.Errorf("%d pods enrolled by a label, %d in all, want 30 and 300", len(all), c.Enrolled())
	}
}
