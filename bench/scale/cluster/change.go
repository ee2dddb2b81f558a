package cluster

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"

	"tacit.dev/bench/scale/api"
	"tacit.dev/pause"
)

// Kind is a kind of change.
type Kind string

const (
	// Flip: a pod becomes ready or no longer is.
	Flip Kind = "flip"
	// End: a pod is deleted.
	End Kind = "end"
	// Begin: a pod is made, of another name and address.
	Begin Kind = "begin"
	// Enroll: the namespace of a pod has got the label.
	Enroll Kind = "enroll"
)

// Change is something that happened to a pod, of which every node has to learn.
type Change struct {
	Kind Kind
	// Pod is NAMESPACE/NAME.
	Pod string
	// At is when the object changed, in nanoseconds of the machine's clock.
	At int64
}

func changed(k Kind, p *pod) Change {
	return Change{Kind: k, Pod: p.set.space.name + "/" + p.name, At: time.Now().UnixNano()}
}

// Churn changes so many pods a second for some time, each pod once: of four changes two are
// flips, one is an end and one a begin.
func (c *Cluster) Churn(ctx context.Context, rate float64, d time.Duration) []Change {
	var all []Change
	began := time.Now()
	for i := range int(rate * d.Seconds()) {
		due := time.Duration(float64(i) / rate * float64(time.Second))
		if !pause.For(ctx, due-time.Since(began)) {
			break
		}
		if one, ok := c.one(i); ok {
			all = append(all, one)
		}
	}
	return all
}

func (c *Cluster) one(i int) (Change, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch i % 4 {
	case 1:
		s, slot := c.some(func(p *pod) bool { return p != nil && p.ready && !p.touched })
		return c.end(s, slot)
	case 3:
		s, slot := c.some(func(p *pod) bool { return p == nil })
		return c.begin(s, slot, len(c.nodes)), s != nil
	}
	s, slot := c.some(func(p *pod) bool { return p != nil && p.running && !p.ending && !p.touched })
	return c.flip(s, slot)
}

// some finds a slot of an enrolled set at random; no set if there is none for long. Called with mu.
func (c *Cluster) some(is func(*pod) bool) (*set, int) {
	for range 4 {
		first := c.rng.IntN(len(c.sets))
		for i := range c.sets {
			s := c.sets[(first+i)%len(c.sets)]
			if s.space.labels[MeshLabel] != "on" {
				continue
			}
			if slot := c.rng.IntN(len(s.slots)); is(s.slots[slot]) {
				return s, slot
			}
		}
	}
	return nil, 0
}

func (c *Cluster) flip(s *set, slot int) (Change, bool) {
	if s == nil {
		return Change{}, false
	}
	p := s.slots[slot]
	p.ready, p.touched = !p.ready, true
	is := changed(Flip, p)
	c.put(p)
	return is, true
}

// put writes the status of a pod, and the slices that list it.
func (c *Cluster) put(p *pod) {
	api.Update(c.cfg.Store, api.Pods, p.set.space.name, p.name, func(o *corev1.Pod) { setStatus(o, p) })
	c.putSlices(p.set, p.slot)
}

// end deletes a pod: it is ending, and then its slot is free.
func (c *Cluster) end(s *set, slot int) (Change, bool) {
	if s == nil {
		return Change{}, false
	}
	p := s.slots[slot]
	p.ending, p.touched = true, true
	is := changed(End, p)
	c.put(p)
	c.after(endTime, func() {
		if s.slots[slot] == p {
			s.slots[slot] = nil
		}
		if a := Addresses(p.uid)[0].As4(); true {
			p.node.used[a[3]] = false
		}
		c.putSlices(s, slot)
		c.cfg.Store.Delete(api.Pods, s.space.name, p.name)
	})
	return is, true
}

// begin makes a pod in a free slot, on one of the first nodes.
func (c *Cluster) begin(s *set, slot, nodes int) Change {
	if s == nil {
		return Change{}
	}
	p := c.makePod(s, slot, nodes)
	p.touched = true
	is := changed(Begin, p)
	c.cfg.Store.Put(api.Pods, podObject(p))
	c.after(startTime, func() {
		p.running, p.ready = true, true
		c.put(p)
	})
	return is
}

// Start begins n pods on the first nodes, one after the other; each takes the place of another.
func (c *Cluster) Start(ctx context.Context, n int, every time.Duration, nodes int) (all []Change) {
	for range n {
		c.mu.Lock()
		s, slot := c.some(func(p *pod) bool { return p != nil && p.ready && !p.ending && !p.touched })
		if _, ok := c.end(s, slot); ok {
			all = append(all, c.begin(s, slot, nodes))
		}
		c.mu.Unlock()
		if !pause.For(ctx, every) {
			break
		}
	}
	return all
}

// Enroll labels the namespace that is not enrolled, and returns its pods.
func (c *Cluster) Enroll() (all []Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.spaces[c.last()]
	s.labels[MeshLabel] = "on"
	for _, set := range c.sets {
		for _, p := range set.slots {
			if set.space == s && p != nil {
				all = append(all, changed(Enroll, p))
			}
		}
	}
	c.cfg.Store.Put(api.Namespaces, namespaceObject(s))
	return all
}

// Roll replaces the pods of the large set, a quarter at a time: as many begin as end, and the
// next quarter follows when the pods of the last have had the time to start.
func (c *Cluster) Roll(ctx context.Context) (all []Change) {
	s := c.sets[0]
	size := max(len(s.slots)/4, 1)
	for first := 0; first < len(s.slots); first += size {
		c.mu.Lock()
		for slot := first; slot < min(first+size, len(s.slots)); slot++ {
			if p := s.slots[slot]; p != nil && !p.ending {
				one, _ := c.end(s, slot)
				all = append(all, one)
			}
			all = append(all, c.begin(s, slot, len(c.nodes)))
		}
		c.mu.Unlock()
		if !pause.For(ctx, 2*startTime) {
			break
		}
	}
	return all
}

// Settle lets every pod be changed once more.
func (c *Cluster) Settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.sets {
		for _, p := range s.slots {
			if p != nil {
				p.touched = false
			}
		}
	}
}
