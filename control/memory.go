package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"tacit.dev/control/kube"
)

// memory is one pod that outlives this process: it was announced, and others may
// still dial it by direct, or its release is under way.
type memory struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Node      string `json:"node"`
	State     State  `json:"state"`
}

// savePatience is how long a shard that is written holds up everybody.
const savePatience = 2 * time.Second

// store keeps memories, in shards of which only those are written that differ. They are saved
// before what they say is published: a process that dies in between announces a captured pod
// again, or waits once more for a withdrawal, and does no harm by either. One goroutine uses it.
type store struct {
	storage Storage
	shards  [kube.Shards]shard
	// ended has writes that have ended, as many as there are shards. wait waits for them.
	ended   chan written
	running sync.WaitGroup
}

// shard is a part of the memories.
type shard struct {
	pods map[string]memory // by UID
	// dirty: it differs from what is saved, or is written.
	dirty bool
	// unsaved are those of pods that are not saved as they are, and are not written; writing
	// are those that are, nil if nothing is.
	unsaved, writing map[string]bool
	// began is when the last write did, err why it failed, slow that it took so long that nobody
	// waits for the next.
	began time.Time
	err   error
	slow  bool
}

// written is a write that has ended.
type written struct {
	shard int
	err   error
}

func shardOf(uid string) int {
	h := fnv.New32a()
	h.Write([]byte(uid))
	return int(h.Sum32() % kube.Shards)
}

// load reads what an earlier process remembered. What cannot be read is an error: to
// go on without it would withdraw every pod.
func (s *store) load() ([]memory, error) {
	var all []memory
	s.ended = make(chan written, kube.Shards)
	saved, err := s.storage.Load()
	if err != nil {
		return nil, err
	}
	for i, b := range saved {
		s.shards[i] = shard{pods: make(map[string]memory), unsaved: make(map[string]bool)}
		if b == nil {
			continue
		}
		var list []memory
		if err := json.Unmarshal(b, &list); err != nil {
			return nil, fmt.Errorf("read captured pods of %v, shard %d: %w: remove it, and its announced pods are withdrawn until their agents report them", s.storage, i, err)
		}
		for _, m := range list {
			if m.State != Announced && m.State != Withdrawing && m.State != Releasing {
				return nil, fmt.Errorf("read captured pods of %v, shard %d: pod %s/%s: state %q is none to remember", s.storage, i, m.Namespace, m.Name, m.State)
			}
			s.shards[i].pods[m.UID] = m
		}
		all = append(all, list...)
	}
	return all, nil
}

// put remembers m when its shard is saved next.
func (s *store) put(m memory) {
	part := &s.shards[shardOf(m.UID)]
	if part.pods[m.UID] != m {
		part.pods[m.UID], part.dirty, part.unsaved[m.UID] = m, true, true
	}
}

// drop forgets a pod when its shard is saved next.
func (s *store) drop(uid string) {
	part := &s.shards[shardOf(uid)]
	if _, is := part.pods[uid]; is {
		delete(part.pods, uid)
		delete(part.unsaved, uid)
		part.dirty = true
	}
}

// save saves the shards that differ. An error of one holds up the pods of that one only, but
// for one that wraps fs.ErrExist: another process saves, too. A write that takes long goes on, and is
// looked at by the next save.
func (s *store) save() error {
	s.collect()
	waited := make(map[int]bool)
	for i := range s.shards {
		if part := &s.shards[i]; part.dirty && part.writing == nil {
			if s.write(i); !part.slow {
				waited[i] = true
			}
		}
	}
	patience := time.NewTimer(savePatience)
	defer patience.Stop()
	for len(waited) > 0 {
		select {
		case w := <-s.ended:
			s.end(w)
			delete(waited, w.shard)
		case <-patience.C:
			clear(waited)
		}
	}
	return s.failure()
}

// collect takes note of writes that have ended.
func (s *store) collect() {
	for {
		select {
		case w := <-s.ended:
			s.end(w)
		default:
			return
		}
	}
}

// write begins to save a shard as it is.
func (s *store) write(i int) {
	part := &s.shards[i]
	list := make([]memory, 0, len(part.pods))
	for _, uid := range slices.Sorted(maps.Keys(part.pods)) {
		list = append(list, part.pods[uid])
	}
	part.writing, part.unsaved, part.dirty, part.began = part.unsaved, make(map[string]bool), false, time.Now()
	s.running.Go(func() {
		b, err := json.Marshal(list)
		if err == nil {
			err = s.storage.Save(i, b)
		}
		s.ended <- written{i, err}
	})
}

func (s *store) end(w written) {
	part := &s.shards[w.shard]
	part.err, part.slow = w.err, time.Since(part.began) >= savePatience
	if w.err != nil {
		maps.Copy(part.unsaved, part.writing)
		part.dirty = true
	}
	part.writing = nil
}

// failure is why not everything is saved, nil if it is.
func (s *store) failure() error {
	failed, worst := 0, error(nil)
	for i := range s.shards {
		part := &s.shards[i]
		err := part.err
		if err == nil && (part.dirty || part.writing != nil) {
			err = errors.New("its write has not ended yet")
		}
		if err == nil {
			continue
		}
		if failed++; worst == nil || errors.Is(err, fs.ErrExist) {
			worst = fmt.Errorf("shard %d: %w", i, err)
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("remember captured pods in %v: %d of %d shards are not saved: %w", s.storage, failed, kube.Shards, worst)
}

// keeps tells whether what is remembered of the pod is saved.
func (s *store) keeps(uid string) bool {
	part := &s.shards[shardOf(uid)]
	return !part.unsaved[uid] && !part.writing[uid]
}

// wait waits until nothing is written any more.
func (s *store) wait() { s.running.Wait() }
