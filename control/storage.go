package control

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
)

// Storage keeps what control must not forget, and what nodes have to find. One process
// writes it at a time. Save and PublishBundle may be called at once, but not for one
// shard.
type Storage interface {
	// Load returns what was saved last, by shard; nil is what was never saved.
	Load() ([kube.Shards][]byte, error)
	// Save keeps b as a shard, whole or not at all. The error wraps fs.ErrExist if another
	// process has saved it since Load or the last Save.
	Save(shard int, b []byte) error
	pairStorage
	// PublishBundle puts the roots where nodes find them (PEM), and touches
	// nothing if they are there.
	PublishBundle(bundle []byte) error
	// Close lets others write. What was saved stays.
	Close() error
	String() string
}

// StorageFolder is a Storage in files: captured/SHARD.json, pairs/SHARD.json.gz and bundle.pem,
// and a folder for the keys of the CA.
type StorageFolder struct {
	dir  string
	lock *os.File
}

// OpenStorageFolder makes dir if it is missing, and keeps other processes out of it
// until it is closed, which the kernel does at the latest.
func OpenStorageFolder(dir string) (*StorageFolder, error) {
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
	return &StorageFolder{dir: dir, lock: f}, nil
}

func (s *StorageFolder) String() string { return s.dir }

func (s *StorageFolder) path(name string) string { return filepath.Join(s.dir, name) }

// Keys is where the CA may keep its keys, in files with mode 0600.
func (s *StorageFolder) Keys() ca.Store { return ca.Folder(s.path("ca")) }

func (s *StorageFolder) captured(shard int) string {
	return s.path(filepath.Join("captured", strconv.Itoa(shard)+".json"))
}

// Load reads the files in captured.
func (s *StorageFolder) Load() (shards [kube.Shards][]byte, err error) {
	for i := range shards {
		if shards[i], err = os.ReadFile(s.captured(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return shards, err
		}
	}
	return shards, nil
}

// Save writes one of them.
func (s *StorageFolder) Save(shard int, b []byte) error {
	if err := os.MkdirAll(s.path("captured"), 0o700); err != nil {
		return err
	}
	return ca.WriteFile(s.captured(shard), b, 0o600)
}

func (s *StorageFolder) pairs(shard int) string {
	return s.path(filepath.Join("pairs", strconv.Itoa(shard)+".json.gz"))
}

// LoadPairs reads the files in pairs.
func (s *StorageFolder) LoadPairs() (shards [kube.PairShards][]byte, err error) {
	for i := range shards {
		if shards[i], err = os.ReadFile(s.pairs(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return shards, err
		}
	}
	return shards, nil
}

// SavePairs writes one of them.
func (s *StorageFolder) SavePairs(shard int, b []byte) error {
	if err := os.MkdirAll(s.path("pairs"), 0o700); err != nil {
		return err
	}
	return ca.WriteFile(s.pairs(shard), b, 0o600)
}

// PublishBundle writes bundle.pem.
func (s *StorageFolder) PublishBundle(b []byte) error {
	if is, err := os.ReadFile(s.path("bundle.pem")); err == nil && bytes.Equal(is, b) {
		return nil
	}
	return ca.WriteFile(s.path("bundle.pem"), b, 0o644)
}

// Close unlocks the folder.
func (s *StorageFolder) Close() error { return s.lock.Close() }
