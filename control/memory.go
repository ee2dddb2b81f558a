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

	"golang.org/x/sync/errgroup"

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

// savers is how many shards are written at once.
const savers = 8

// store keeps memories, in shards of which only those are written that differ. They are saved
// before what they say is published: a process that dies in between announces a captured pod
// again, or waits once more for a withdrawal, and does no harm by either. One goroutine uses it.
type store struct {
	storage Storage
	shards  [kube.Shards]shard
}

// shard is a part of the memories.
type shard struct {
	pods map[string]memory // by UID
	// dirty: it differs from what is saved.
	dirty bool
	// unsaved are those of pods that are not saved as they are.
	unsaved map[string]bool
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
// for one that wraps fs.ErrExist: another process saves, too.
func (s *store) save() error {
	var g errgroup.Group
	g.SetLimit(savers)
	var mu sync.Mutex // guards what follows
	failed, worst := 0, error(nil)
	for i := range s.shards {
		if !s.shards[i].dirty {
			continue
		}
		g.Go(func() error {
			if err := s.saveShard(i); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if failed++; worst == nil || errors.Is(err, fs.ErrExist) {
					worst = fmt.Errorf("shard %d: %w", i, err)
				}
			}
			return nil
		})
	}
	g.Wait()
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("remember captured pods in %v: %d of %d shards are not saved: %w", s.storage, failed, kube.Shards, worst)
}

func (s *store) saveShard(i int) error {
	part := &s.shards[i]
	list := make([]memory, 0, len(part.pods))
	for _, uid := range slices.Sorted(maps.Keys(part.pods)) {
		list = append(list, part.pods[uid])
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if err := s.storage.Save(i, b); err != nil {
		return err
	}
	part.dirty = false
	clear(part.unsaved)
	return nil
}

// keeps tells whether what is remembered of the pod is saved.
func (s *store) keeps(uid string) bool { return !s.shards[shardOf(uid)].unsaved[uid] }
