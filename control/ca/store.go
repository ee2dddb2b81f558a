package ca

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Store keeps the CA's pairs of certificate and key, in PEM, by name. It need not be
// safe for concurrent use: a CA uses it from one goroutine at a time. String tells
// where it is, for errors.
type Store interface {
	// Load returns nil for what is not there. A key may be missing beside its
	// certificate: it is kept elsewhere.
	Load(name string) (certPEM, keyPEM []byte, err error)
	// Save keeps both or nothing: a certificate never stands there without its
	// key. The error wraps fs.ErrExist if another process has saved that name
	// since Load: what it has saved counts.
	Save(name string, certPEM, keyPEM []byte) error
	String() string
}

// Folder is a Store of files NAME.pem and NAME.key. It is made with mode 0700 if
// missing; only one process may use it at a time.
type Folder string

func (f Folder) String() string { return string(f) }

func (f Folder) path(file string) string { return filepath.Join(string(f), file) }

// Load leaves a key without certificate out: it is what is left when the process died
// between the two, and nothing was ever signed with it.
func (f Folder) Load(name string) (certPEM, keyPEM []byte, err error) {
	certPEM, err = readIfThere(f.path(name + ".pem"))
	if certPEM == nil {
		return nil, nil, err
	}
	keyPEM, err = readIfThere(f.path(name + ".key"))
	return certPEM, keyPEM, err
}

// Save writes the key first, and removes the old certificate before that: with the
// new key it would not load.
func (f Folder) Save(name string, certPEM, keyPEM []byte) error {
	if err := os.MkdirAll(string(f), 0o700); err != nil {
		return err
	}
	if err := os.Remove(f.path(name + ".pem")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := WriteFile(f.path(name+".key"), keyPEM, 0o600); err != nil {
		return err
	}
	return WriteFile(f.path(name+".pem"), certPEM, 0o600)
}

func readIfThere(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}
