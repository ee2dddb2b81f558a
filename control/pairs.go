package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/pause"
)

const (
	// maxPairs bounds the pairs of a cluster, and fewPairs is how many stay of more than that.
	maxPairs, fewPairs = 20000, 18000
	// savePairsEvery is how often new pairs are saved at most, countPairsEvery how often those
	// are of which only the sums differ.
	savePairsEvery, countPairsEvery = 10 * time.Second, time.Minute
)

// pairStorage is what pairs needs of a Storage.
type pairStorage interface {
	// LoadPairs returns what was saved last, by shard; nil is what was never saved.
	LoadPairs() ([kube.PairShards][]byte, error)
	// SavePairs keeps b as a shard, in the stead of whatever is there.
	SavePairs(shard int, b []byte) error
}

// pairs is what nodes saw, summed up. A node is heard about workloads of which it has pods.
// What is lost with the process is what was not saved yet. It is safe for concurrent use.
type pairs struct {
	hosts   *hosts
	storage pairStorage
	log     *slog.Logger
	metrics *pairMetrics
	now     func() time.Time // time.Now, but in tests

	mu     sync.Mutex // guards what follows
	of     map[mesh.Way]*keptPair
	shards [kube.PairShards]pairShard
	// other and dropped are those of kube.PairShard.
	other, dropped uint64
}

type keptPair struct {
	mesh.Pair
	shard int
}

// pairShard is what differs from what is saved: a pair is new or gone, or only sums are others.
type pairShard struct {
	news, sums bool
	saved      time.Time
}

type pairMetrics struct {
	known                   prometheus.Gauge
	dropped, untold, refuse prometheus.Counter
}

func newPairMetrics(r prometheus.Registerer) *pairMetrics {
	m := &pairMetrics{
		known: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tacit_control_pairs", Help: "Pairs of workloads, nodes and blocks of addresses that had connections, as nodes tell."}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_pairs_dropped_total", Help: "Pairs that were forgotten because there are more than are kept."}),
		untold: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_pairs_untold_total", Help: "Connections that nodes had no room to tell apart."}),
		refuse: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tacit_control_pairs_refused_total", Help: "Pairs told by a node that has no pod of that workload."}),
	}
	r.MustRegister(m.known, m.dropped, m.untold, m.refuse)
	return m
}

func newPairs(s pairStorage, h *hosts, m *pairMetrics, log *slog.Logger) *pairs {
	return &pairs{hosts: h, storage: s, metrics: m, log: log, now: time.Now, of: make(map[mesh.Way]*keptPair)}
}

// load reads what an earlier process saved. A shard that cannot be understood is left out, and
// said: nobody is let in or kept out by it.
func (p *pairs) load() error {
	saved, err := p.storage.LoadPairs()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	differ := p.shards
	for i, b := range saved {
		if b == nil {
			continue
		}
		one, err := kube.UnpackPairs(b)
		if err != nil {
			p.log.Warn("what nodes saw before is not known", "shard", i, "error", err)
			continue
		}
		p.other, p.dropped = p.other+one.Other, p.dropped+one.Dropped
		for _, pair := range one.Pairs {
			p.addLocked(pair)
		}
	}
	p.shards = differ
	p.boundLocked()
	return nil
}

// put adds what a node saw.
func (p *pairs) put(node string, seen mesh.Pairs) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if seen.Other > 0 {
		p.other += seen.Other
		p.shards[0].sums = true
		p.metrics.untold.Add(float64(seen.Other))
	}
	refused := 0
	for _, one := range seen.List {
		own, is := p.hosts.find(node, *one.Own())
		if !is {
			refused++
			continue
		}
		*one.Own() = own
		if one.Last.After(now) {
			one.Last = now
		}
		if one.First.After(one.Last) {
			one.First = one.Last
		}
		p.addLocked(one)
	}
	if refused > 0 { // also of pods that this leader does not know yet
		p.metrics.refuse.Add(float64(refused))
		p.log.Debug("node told of connections of pods that it does not have", "node", node, "pairs", refused)
	}
	p.boundLocked()
}

func (p *pairs) addLocked(one mesh.Pair) {
	had := p.of[one.Way]
	if had == nil {
		had = &keptPair{one, pairShardOf(&one.Way)}
		p.of[one.Way], p.shards[had.shard].news = had, true
		return
	}
	had.Connections += one.Connections
	had.Bytes += one.Bytes
	if one.First.Before(had.First) {
		had.First = one.First
	}
	if one.Last.After(had.Last) {
		had.Last = one.Last
	}
	p.shards[had.shard].sums = true
}

// pairShardOf is the same in each process.
func pairShardOf(w *mesh.Way) int {
	return shardOf(fmt.Sprint(w.Source, w.Destination, w.Port, w.Crossing, w.Reporter)) % kube.PairShards
}

// boundLocked drops pairs if there are too many: of the workloads that are told of most, the
// oldest. So a node that tells of more than there is drops its own.
func (p *pairs) boundLocked() {
	defer func() { p.metrics.known.Set(float64(len(p.of))) }()
	if len(p.of) <= maxPairs {
		return
	}
	newest := slices.SortedFunc(maps.Values(p.of), func(x, y *keptPair) int {
		return cmp.Or(y.Last.Compare(x.Last), kube.ComparePairs(x.Pair, y.Pair))
	})
	rank, of := make(map[*keptPair]int, len(newest)), make(map[mesh.Party]int)
	for _, pair := range newest {
		rank[pair] = of[*pair.Own()]
		of[*pair.Own()]++
	}
	slices.SortStableFunc(newest, func(x, y *keptPair) int { return cmp.Compare(rank[x], rank[y]) })
	p.dropLocked(newest[fewPairs:])
}

func (p *pairs) dropLocked(list []*keptPair) {
	for _, pair := range list {
		delete(p.of, pair.Way)
		p.shards[pair.shard].news = true
	}
	p.dropped += uint64(len(list))
	p.metrics.dropped.Add(float64(len(list)))
	p.log.Warn("more pairs than are kept: the oldest are forgotten", "kept", len(p.of), "forgotten", len(list))
}

// keep saves what differs until ctx ends, as long as this process leads.
func (p *pairs) keep(ctx context.Context, leads func() bool) error {
	for err := p.load(); err != nil; err = p.load() {
		p.log.Warn("what nodes saw before is not known yet, will try again", "error", err, "after", savePairsEvery)
		if !pause.For(ctx, savePairsEvery) {
			return nil
		}
	}
	last := ""
	for pause.For(ctx, savePairsEvery) {
		text := ""
		if err := p.save(leads); err != nil {
			text = err.Error()
		}
		if text != last && text != "" {
			p.log.Warn("what nodes saw is not saved, will try again", "error", text, "after", savePairsEvery)
		}
		last = text
	}
	return nil
}

// save saves the shards that are due, and returns the first error.
func (p *pairs) save(leads func() bool) (first error) {
	for i := range p.shards {
		if !leads() {
			return first
		}
		b, err := p.pack(i)
		if b == nil && err == nil {
			continue
		}
		if err == nil {
			err = p.storage.SavePairs(i, b)
		}
		if err != nil {
			p.mu.Lock()
			p.shards[i].news = true
			p.mu.Unlock()
			first = cmp.Or(first, fmt.Errorf("shard %d: %w", i, err))
		}
	}
	return first
}

// pack is a shard as it is to be saved, nil if it needs not be.
func (p *pairs) pack(i int) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, now := &p.shards[i], p.now()
	if !s.news && !(s.sums && now.Sub(s.saved) >= countPairsEvery) {
		return nil, nil
	}
	var of []*keptPair
	for _, pair := range p.of {
		if pair.shard == i {
			of = append(of, pair)
		}
	}
	slices.SortFunc(of, func(x, y *keptPair) int {
		return cmp.Or(y.Last.Compare(x.Last), kube.ComparePairs(x.Pair, y.Pair))
	})
	for {
		b, err := p.packLocked(i, of)
		if !errors.Is(err, kube.ErrTooManyPairs) || len(of) == 0 {
			*s = pairShard{saved: now}
			return b, err
		}
		half := len(of) / 2
		p.dropLocked(of[half:])
		of = of[:half]
	}
}

func (p *pairs) packLocked(i int, of []*keptPair) ([]byte, error) {
	one := kube.PairShard{Pairs: make([]mesh.Pair, 0, len(of))}
	for _, pair := range of {
		one.Pairs = append(one.Pairs, pair.Pair)
	}
	slices.SortFunc(one.Pairs, kube.ComparePairs)
	if i == 0 {
		one.Other, one.Dropped = p.other, p.dropped
	}
	return one.Pack()
}

// hosts tells which workloads nodes have pods of, or had lately. It is safe for concurrent use.
type hosts struct {
	mu sync.Mutex // guards what follows
	on map[string]*host
}

// maxLeft is how many workloads a node is heard about after their last pod on it is gone: what
// it saw of them comes later than they go.
const maxLeft = 128

// host is one node.
type host struct {
	// called are the workloads by each name that a node may have for them.
	called map[mesh.Party]*hosted
	left   []mesh.Party // those without a pod, the oldest first
}

type hosted struct {
	party mesh.Party
	pods  int
}

func newHosts() *hosts { return &hosts{on: make(map[string]*host)} }

// find is the workload that a node calls so, if it has pods of it.
func (h *hosts) find(node string, called mesh.Party) (mesh.Party, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if on := h.on[node]; on != nil && on.called[called] != nil {
		return on.called[called].party, true
	}
	return called, false
}

// names are what a node may call a pod: by its owner, or by itself as long as it knows no more.
func namesOf(w *mesh.Workload) []mesh.Party {
	owner := w.Party()
	self := owner
	if self.Workload = w.Name; self == owner {
		return []mesh.Party{owner}
	}
	return []mesh.Party{owner, self}
}

// replace puts a pod, nil for none, where there was another one.
func (h *hosts) replace(had, now *mesh.Workload) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if had == now {
		return
	}
	if now != nil && !now.HostNetwork {
		on := h.on[now.Node]
		if on == nil {
			on = &host{called: make(map[mesh.Party]*hosted)}
			h.on[now.Node] = on
		}
		for _, name := range namesOf(now) {
			if on.called[name] == nil {
				on.called[name] = &hosted{party: now.Party()}
			}
			on.called[name].pods++
		}
	}
	if had != nil && !had.HostNetwork && h.on[had.Node] != nil {
		for _, name := range namesOf(had) {
			h.on[had.Node].leave(name)
		}
	}
}

func (on *host) leave(name mesh.Party) {
	if on.called[name] == nil {
		return
	}
	if on.called[name].pods--; on.called[name].pods > 0 {
		return
	}
	if on.left = append(on.left, name); len(on.left) <= maxLeft {
		return
	}
	if oldest := on.called[on.left[0]]; oldest != nil && oldest.pods == 0 {
		delete(on.called, on.left[0])
	}
	on.left = on.left[1:]
}

// forget is for a node that is gone, as soon as its pods are.
func (h *hosts) forget(node string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if on := h.on[node]; on != nil {
		maps.DeleteFunc(on.called, func(_ mesh.Party, is *hosted) bool { return is.pods == 0 })
		on.left = nil
		if len(on.called) == 0 {
			delete(h.on, node)
		}
	}
}
