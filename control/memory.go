package control

import (
	"bytes"
	"encoding/json"
	"fmt"
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

// store keeps memories. They are saved before what they say is published: a process
// that dies in between announces a captured pod again, or waits once more for a
// withdrawal, and does no harm by either.
type store struct {
	storage Storage
	last    []byte // what is saved
}

// load reads what an earlier process remembered. What cannot be read is an error: to
// go on without it would withdraw every pod.
func (s *store) load() ([]memory, error) {
	b, err := s.storage.Load()
	if err != nil || b == nil {
		return nil, err
	}
	var list []memory
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("read captured pods of %v: %w: remove them, and every announced pod is withdrawn until its agent reports it", s.storage, err)
	}
	for _, m := range list {
		if m.State != Announced && m.State != Withdrawing && m.State != Releasing {
			return nil, fmt.Errorf("read captured pods of %v: pod %s/%s: state %q is none to remember", s.storage, m.Namespace, m.Name, m.State)
		}
	}
	s.last = b
	return list, nil
}

// save keeps the memories if they changed.
func (s *store) save(list []memory) error {
	b, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return fmt.Errorf("remember captured pods: %w", err)
	}
	if bytes.Equal(b, s.last) {
		return nil
	}
	if err := s.storage.Save(b); err != nil {
		return fmt.Errorf("remember captured pods: %w", err)
	}
	s.last = b
	return nil
}
