package xds

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

const (
	sequences = 1000
	simNodes  = 3
)

// Whatever happens in whatever order, changes, cuts, messages that are lost, readers that
// are slow, resources that are refused, leaders that begin and leaders that come back, every
// node is led to the same World. TACIT_SEED repeats one sequence.
func TestSequences(t *testing.T) {
	first, n := rand.Uint64(), uint64(sequences)
	if text := os.Getenv("TACIT_SEED"); text != "" {
		var err error
		if first, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
		n = 1
	}
	t.Logf("TACIT_SEED=%d and the %d that follow", first, n-1)
	for seed := first; seed != first+n; seed++ {
		if err := runSequence(seed); err != nil {
			t.Fatalf("TACIT_SEED=%d: %v", seed, err)
		}
	}
}

// sim is a mesh whose leaders and nodes do one thing after the other.
type sim struct {
	*rand.Rand
	workloads map[string]*mesh.Workload
	pods      map[string]map[string]mesh.Pod // by node and UID
	named     int                            // names that were used
	// told is what each leader was told last; the last leader is the one that leads.
	leaders []*leader
	worlds  []*simClient[any]
	agents  []*simClient[mesh.Pod]
}

type leader struct {
	*Server
	told Snapshot
}

func runSequence(seed uint64) error {
	m := &sim{Rand: rand.New(rand.NewPCG(seed, 1)), workloads: map[string]*mesh.Workload{}, pods: map[string]map[string]mesh.Pod{}}
	for i := range simNodes {
		node := fmt.Sprint("n", i)
		m.pods[node] = map[string]mesh.Pod{}
		m.worlds = append(m.worlds, newSimClient[any](m.Rand, mesh.Process{Node: node}, addressType))
		m.worlds[i].decode, m.worlds[i].key = unpackAddress, func(v any) string { return v.(*mesh.Workload).UID }
		m.agents = append(m.agents, newSimClient[mesh.Pod](m.Rand, mesh.Process{Node: node, Agent: true}, podType))
		m.agents[i].decode, m.agents[i].key = unpackPod, func(p mesh.Pod) string { return p.UID }
	}
	m.worlds[0].foreign = map[string]string{}
	m.lead()
	for range 50 + m.IntN(120) {
		if err := m.step(); err != nil {
			return err
		}
	}
	return m.settle()
}

// step does one thing.
func (m *sim) step() error {
	last := m.leaders[len(m.leaders)-1]
	switch n := m.IntN(100); {
	case n < 15:
		last.update(m.change(1+m.IntN(4), m.IntN(3)))
	case n < 17: // so much goes that not all of it is remembered
		last.update(m.change(m.IntN(50), 100))
	case n < 18:
		m.change(m.IntN(5), m.IntN(5)) // only who is told everything hears of it
		last.update(Update{})
	case n < 20:
		last.told = m.snapshot()
		last.Publish(last.told)
	case n < 22:
		m.lead()
	case n < 25:
		m.spoil(last.Server)
	default:
		i := m.IntN(simNodes)
		if n%4 == 0 {
			return m.agents[i].step(m.leaders)
		}
		return m.worlds[i].step(m.leaders)
	}
	return nil
}

// lead begins a term: what its leader knows may be older than what was told before.
func (m *sim) lead() {
	cfg := ServerConfig{}
	if m.IntN(4) == 0 {
		cfg.Secret = []byte("another")
	}
	l := &leader{Server: NewServer(cfg)}
	l.world.least = m.IntN(minGone) / 8
	l.world.packs.least = m.IntN(3) * 100
	if m.IntN(2) == 0 {
		l.portion = portion{bytes: 1 << (8 + m.IntN(6)), slots: 1 + m.IntN(30)}
	}
	if len(m.leaders) > 0 && m.IntN(2) == 0 {
		l.told = m.leaders[m.IntN(len(m.leaders))].told
		l.Publish(l.told)
	} else if m.IntN(2) == 0 {
		l.told = m.snapshot()
		l.Publish(l.told)
	}
	m.leaders = append(m.leaders, l)
}

// change makes some workloads new or other, and takes some away.
func (m *sim) change(most, gone int) Update {
	u := Update{Pods: map[string]PodChanges{}}
	all := slices.Sorted(maps.Keys(m.workloads))
	m.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, uid := range all[:min(gone, len(all))] {
		node := m.workloads[uid].Node
		delete(m.workloads, uid)
		delete(m.pods[node], uid)
		u.Gone = append(u.Gone, uid)
		c := u.Pods[node]
		c.Gone = append(c.Gone, uid)
		u.Pods[node] = c
	}
	for _, uid := range all[min(gone, len(all)):min(gone+most/2, len(all))] {
		u.set(m, *m.workloads[uid])
	}
	for range most - most/2 {
		if m.named++; m.IntN(5) == 0 {
			m.named = m.IntN(m.named) // one that is gone comes back, or is there
		}
		u.set(m, *workload(m.named, nil))
	}
	return u
}

func (u *Update) set(m *sim, w mesh.Workload) {
	for _, x := range u.Workloads {
		if x.UID == w.UID {
			return
		}
	}
	if had := m.workloads[w.UID]; had != nil {
		w.Node = had.Node
	} else {
		w.Node = fmt.Sprint("n", m.IntN(simNodes))
	}
	w.Ready, w.CanonicalRevision = m.IntN(2) == 0, fmt.Sprint(m.IntN(3))
	m.workloads[w.UID] = &w
	u.Workloads = append(u.Workloads, &w)
	u.Gone = slices.DeleteFunc(u.Gone, func(uid string) bool { return uid == w.UID })
	p := mesh.Pod{UID: w.UID, Namespace: w.Namespace, Name: w.Name, ID: w.ID, Enroll: w.Ready}
	m.pods[w.Node][p.UID] = p
	c := u.Pods[w.Node]
	c.Pods = append(c.Pods, p)
	u.Pods[w.Node] = c
}

func (l *leader) update(u Update) { l.Update(u) }

func (m *sim) snapshot() Snapshot {
	snap := Snapshot{Workloads: slices.Collect(maps.Values(m.workloads)), Pods: map[string][]mesh.Pod{}}
	for node, pods := range m.pods {
		snap.Pods[node] = slices.Collect(maps.Values(pods))
	}
	return snap
}

// spoil publishes a resource that nodes refuse.
func (m *sim) spoil(s *Server) {
	all := slices.Sorted(maps.Keys(m.workloads))
	if len(all) == 0 || s.version == 0 {
		return
	}
	bad := &message.Address{Type: &message.Address_Workload{Workload: &message.Workload{Name: fmt.Sprint(m.IntN(9))}}}
	e, err := newEntry(nil, addressType, all[m.IntN(len(all))], bad)
	if err != nil {
		panic(err)
	}
	s.install(map[mesh.Process]edit{everyProxy: {table: s.world, set: []*entry{e}}})
}

// settle lets the last leader tell everything, and everybody listen.
func (m *sim) settle() error {
	last := m.leaders[len(m.leaders)-1]
	snap := m.snapshot()
	version := last.Publish(snap)
	pods := map[string]map[string]mesh.Pod{}
	for i := range simNodes {
		if err := m.worlds[i].finish(last, func(v any) any { return *v.(*mesh.Workload) }, func(uid string) (any, bool) {
			w, is := m.workloads[uid]
			if !is {
				return nil, false
			}
			return *w, true
		}, len(m.workloads)); err != nil {
			return err
		}
		node := m.agents[i].from.Node
		pods[node] = m.pods[node]
		if err := m.agents[i].finish(last, func(p mesh.Pod) any { return p }, func(uid string) (any, bool) {
			p, is := pods[node][uid]
			return p, is
		}, len(pods[node])); err != nil {
			return err
		}
	}
	if waiting := last.Acked(version); len(waiting) > 0 {
		return fmt.Errorf("everybody has version %d, and %v are waited for: %+v", version, waiting, last.Nodes())
	}
	if applied := last.Applied(everybody); applied != version {
		return fmt.Errorf("everybody has version %d, and decides by %d", version, applied)
	}
	return nil
}

// simClient is a client of one type, and the stream that it has, if any.
type simClient[T any] struct {
	*delta[T]
	*rand.Rand
	from    mesh.Process
	key     func(T) string
	applied map[string]T

	server  *Server
	stream  *stream
	coming  []*message.DeltaDiscoveryResponse // on their way, and so are
	answers []*message.DeltaDiscoveryRequest
	// foreign has the versions of one that speaks no more than Envoy's protocol, nil if it is ours.
	foreign map[string]string
}

func newSimClient[T any](r *rand.Rand, from mesh.Process, typeURL string) *simClient[T] {
	c := &simClient[T]{delta: newDelta[T](ClientConfig{Node: from.Node}, typeURL), Rand: r, from: from, applied: map[string]T{}}
	c.delta.apply = func(changed []T, gone []string) <-chan struct{} {
		for _, name := range gone {
			delete(c.applied, name)
		}
		for _, v := range changed {
			c.applied[c.key(v)] = v
		}
		return nil
	}
	return c
}

// step does one thing of a client or its link.
func (c *simClient[T]) step(leaders []*leader) error {
	switch n := c.IntN(20); {
	case c.stream == nil && n < 12:
		return c.connect(leaders[len(leaders)-1].Server)
	case c.stream == nil && n < 16:
		return c.connect(leaders[c.IntN(len(leaders))].Server) // one that does not know yet that it leads no more
	case c.stream == nil:
		return nil
	case n < 2:
		c.cut()
		return nil
	case n < 9:
		return c.send()
	case n < 15:
		return c.receive(c.IntN(2) == 0)
	}
	return c.answer()
}

func (c *simClient[T]) connect(s *Server) error {
	s.mu.Lock()
	s.node(c.from.Node).opened[c.from]++
	s.mu.Unlock()
	c.server = s
	c.stream = &stream{from: c.from, poke: make(chan struct{}, 1), subs: map[string]*subscription{}, refusals: map[string]string{}}
	s.join(c.stream)
	hello := c.hello()
	hello.Held.Packed = c.IntN(4) != 0
	if c.foreign != nil {
		hello.Held, hello.InitialResourceVersions = nil, maps.Clone(c.foreign)
	}
	return s.take(c.stream, hello)
}

// cut loses what is on its way.
func (c *simClient[T]) cut() {
	c.flush()
	c.server.leave(c.stream)
	c.server.dismiss(c.from)
	c.stream, c.coming, c.answers = nil, nil, nil
}

// send lets the server send, if there is room on the way.
func (c *simClient[T]) send() error {
	if len(c.coming) > 2 {
		return nil
	}
	resp, err := c.server.next(c.stream)
	if err != nil { // too far behind
		c.cut()
		return nil
	}
	if resp != nil {
		c.coming = append(c.coming, resp.whole())
	}
	return nil
}

func (c *simClient[T]) receive(atOnce bool) error {
	if len(c.coming) == 0 {
		return nil
	}
	resp := c.coming[0]
	c.coming = c.coming[1:]
	if c.foreign != nil {
		c.receiveForeign(resp)
		return nil
	}
	isPart := strings.HasSuffix(resp.GetSystemVersionInfo(), more)
	if isPart || len(c.waiting) == maxUnapplied {
		c.flush()
	}
	if err := c.take(resp, !isPart); err != nil {
		return fmt.Errorf("%v: %w", c.from, err)
	}
	if len(c.rejected) == 0 && !isPart && c.held.version == 0 {
		return fmt.Errorf("%v: differs from what it has just compared", c.from)
	}
	if isPart || atOnce {
		c.flush()
	}
	return nil
}

// receiveForeign keeps what it understands, at once, and answers.
func (c *simClient[T]) receiveForeign(resp *message.DeltaDiscoveryResponse) {
	req := &message.DeltaDiscoveryRequest{TypeUrl: c.typeURL, ResponseNonce: resp.GetNonce()}
	for _, r := range resp.GetResources() {
		_, v, err := c.decode(r.GetResource())
		if err != nil {
			req.ErrorDetail = &message.Status{Message: err.Error()}
			continue
		}
		c.applied[r.GetName()], c.foreign[r.GetName()] = v, r.GetVersion()
	}
	for _, name := range resp.GetRemovedResources() {
		delete(c.applied, name)
		delete(c.foreign, name)
	}
	c.answers = append(c.answers, req)
}

func (c *simClient[T]) flush() {
	for _, a := range c.applyChanges() {
		if c.IntN(2) == 0 {
			c.answers = append(c.answers, &message.DeltaDiscoveryRequest{TypeUrl: c.typeURL, AppliedNonce: a.nonce})
		}
		req := &message.DeltaDiscoveryRequest{TypeUrl: c.typeURL, ResponseNonce: a.nonce}
		if a.refusal != "" {
			req.ErrorDetail = &message.Status{Message: a.refusal}
		}
		c.answers = append(c.answers, req)
	}
}

func (c *simClient[T]) answer() error {
	if len(c.answers) == 0 {
		return nil
	}
	req := c.answers[0]
	c.answers = c.answers[1:]
	return c.server.take(c.stream, req)
}

// finish takes from the last leader all that there is, and compares.
func (c *simClient[T]) finish(last *leader, plain func(T) any, want func(string) (any, bool), n int) error {
	if c.stream != nil && c.server != last.Server {
		c.cut()
	}
	for range 1000 {
		if c.stream == nil {
			if err := c.connect(last.Server); err != nil {
				return err
			}
		}
		if err := c.send(); err != nil {
			return err
		}
		c.flush()
		if c.stream == nil {
			continue
		}
		if len(c.coming)+len(c.answers) == 0 {
			break
		}
		if err := c.receive(true); err != nil {
			return err
		}
		c.flush()
		for len(c.answers) > 0 {
			if err := c.answer(); err != nil {
				return err
			}
		}
	}
	if resp, err := c.server.next(c.stream); resp != nil || err != nil {
		return fmt.Errorf("%v has everything, and is told %v, %v", c.from, resp, err)
	}
	if len(c.rejected) > 0 {
		return fmt.Errorf("%v still refuses %v", c.from, c.rejected)
	}
	for name, v := range c.applied {
		if w, is := want(name); !is || !reflect.DeepEqual(plain(v), w) {
			return fmt.Errorf("%v knows %+v: want %+v", c.from, v, w)
		}
	}
	if len(c.applied) != n || max(c.held.count, len(c.foreign)) != n {
		return fmt.Errorf("%v has applied %d and holds %d resources: want %d", c.from, len(c.applied), c.held.count, n)
	}
	return nil
}
