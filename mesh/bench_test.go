package mesh

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"
)

// town is a mesh of pods with names as they are: a service of each ten, five Deployments'
// pods each, a node of each hundred. The first service has 5,000 endpoints.
type town struct{ pods int }

const crowd = 5000

func (c town) all() (all Changes) {
	for i := range c.pods {
		all.Workloads = append(all.Workloads, c.pod(i, 0))
	}
	for i := range c.pods / 10 {
		all.Services = append(all.Services, c.service(i))
	}
	for i := range c.pods / 100 {
		all.Places = append(all.Places, &Place{
			Name: fmt.Sprintf("Kubernetes//Node/%s", c.node(i)), Node: c.node(i), Addresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 20, byte(i >> 8), byte(i)})},
			Ranges: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)},
		})
	}
	return all
}

// pod is the i-th one; each life of it has another name and address.
func (c town) pod(i, life int) *Workload {
	owner := i / 5
	app, ns := fmt.Sprintf("checkout-service-%d", owner), fmt.Sprintf("team-%04d-payments", owner/4)
	name := fmt.Sprintf("%s-%08x-%05d", app, uint32(owner)*2654435761, i*7+life)
	service := owner / 2
	if i < crowd {
		service = 0
	}
	key := strings.Clone(c.service(service).Key())
	n := i + life*c.pods
	return &Workload{
		UID: "Kubernetes//Pod/" + ns + "/" + name, Namespace: ns, Name: name, Node: c.node(i % (c.pods / 100)), Zone: fmt.Sprintf("eu-central-1%c", 'a'+i%3),
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})},
		ID:        ID{fmt.Sprint("cluster", ".local"), strings.Clone(ns), app}, Direct: true, Enrolled: true, Ready: true,
		Services:  map[string][]Port{key: {{80, 8080}, {9090, 9090}}},
		OwnerName: strings.Clone(app), OwnerKind: "deployment", CanonicalName: strings.Clone(app), CanonicalRevision: fmt.Sprint("v", owner%9), Cluster: "Kubernetes",
	}
}

func (c town) node(i int) string {
	return fmt.Sprintf("ip-10-0-%d-%d.eu-central-1.compute.internal", i>>8, i&255)
}

func (c town) service(i int) *Service {
	name, ns := fmt.Sprintf("checkout-service-%d", i*2), fmt.Sprintf("team-%04d-payments", i*2/4)
	return &Service{
		Namespace: ns, Name: name, Hostname: name + "." + ns + ".svc.cluster.local",
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 200 + byte(i>>16), byte(i >> 8), byte(i)})}, Ports: []Port{{80, 8080}, {9090, 9090}},
	}
}

// change is one pod that gives way to another, as in a rollout.
func (c town) change(i, life int) Changes {
	return Changes{Workloads: []*Workload{c.pod(i, life+1)}, Gone: []string{c.pod(i, life).UID}}
}

// One pod that gives way to another, at 10,000 and at 100,000 pods, and in a service of
// 5,000 endpoints; what it allocates the collector has to find.
func BenchmarkWith(b *testing.B) {
	small, large := town{10_000}, town{100_000}
	type row struct {
		name  string
		town  town
		first int
		world *World
		spent time.Duration
		bytes uint64
	}
	rows := []*row{{name: "10k", town: small, first: crowd}, {name: "100k", town: large, first: crowd}, {name: "crowd", town: large}}
	now := time.Now()
	for _, r := range rows {
		r.world = new(World).With(r.town.all(), now)
	}
	lives := map[string]int{}
	for n := 0; b.Loop(); n++ {
		for _, r := range rows {
			i := r.first + n*7%(crowd-1)
			who := fmt.Sprint(r.name, i)
			c := r.town.change(i, lives[who])
			lives[who]++
			now = now.Add(time.Millisecond)
			var before, after runtime.MemStats
			if n%100 == 0 {
				runtime.ReadMemStats(&before)
			}
			start := time.Now()
			r.world = r.world.With(c, now)
			r.spent += time.Since(start)
			if n%100 == 0 {
				runtime.ReadMemStats(&after)
				r.bytes += (after.TotalAlloc - before.TotalAlloc) * 100
			}
		}
	}
	for _, r := range rows {
		b.ReportMetric(float64(r.spent.Microseconds())/float64(b.N), "µs/change-"+r.name)
		b.ReportMetric(float64(r.bytes)/float64(b.N)/1024, "kB/change-"+r.name)
	}
	b.ReportMetric(float64(rows[1].spent)/float64(rows[0].spent), "ratio-100k/10k")
}

// BenchmarkFirst is the first word of control at 100,000 pods, and what is kept of it.
func BenchmarkFirst(b *testing.B) {
	var w *World
	kept, spent := uint64(0), time.Duration(0)
	for b.Loop() {
		w = nil
		before := live()
		c := town{100_000}.all()
		start := time.Now()
		w = new(World).With(c, time.Now())
		spent += time.Since(start)
		c = Changes{}
		kept = live() - before
	}
	b.ReportMetric(float64(kept)/1e6, "MB")
	b.ReportMetric(float64(spent.Milliseconds())/float64(b.N), "ms/first")
	runtime.KeepAlive(w)
}

func live() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
