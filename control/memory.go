package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"tacit.dev/control/ca"
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

// store keeps memories in StateDir/captured.json. It is written before what it
// says is published: a process that dies in between announces a captured pod
// again, or waits once more for a withdrawal, and does no harm by either.
type store struct {
	path string
	last []byte // what the file holds
}

// load reads what an earlier process remembered. A file that cannot be read is an
// error: to go on without it would withdraw every pod.
func (s *store) load() ([]memory, error) {
	b, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []memory
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("read %s: %w: remove it, and every announced pod is withdrawn until its agent reports it", s.path, err)
	}
	for _, m := range list {
		if m.State != Announced && m.State != Withdrawing && m.State != Releasing {
			return nil, fmt.Errorf("read %s: pod %s/%s: state %q is none to remember", s.path, m.Namespace, m.Name, m.State)
		}
	}
	s.last = b
	return list, nil
}

// save writes the memories if they changed.
func (s *store) save(list []memory) error {
	b, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return fmt.Errorf("remember captured pods: %w", err)
	}
	if bytes.Equal(b, s.last) {
		return nil
	}
	if err := ca.WriteFile(s.path, b, 0o600); err != nil {
		return fmt.Errorf("remember captured pods: %w", err)
	}
	s.last = b
	return nil
}

// lockDir makes dir and keeps other processes out of it until the file is
// closed, which the kernel does at the latest.
func lockDir(dir string) (*os.File, error) {
	// Nodes read bundle.pem here; what is secret has modes of its own.
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w: is another tacit-control using it?", f.Name(), err), f.Close())
	}
	return f, nil
}
