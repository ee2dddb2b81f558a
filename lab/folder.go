package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

// folder is the cluster's objects as files: what tacit-control reads. A file is
// one object and is replaced as a whole, so that a reader never sees half of it.
type folder string

func (f folder) path(kind, namespace, name string) string {
	parts := []string{strings.ToLower(kind)}
	if namespace != "" {
		parts = append(parts, namespace)
	}
	return filepath.Join(string(f), strings.Join(append(parts, name), ".")+".yaml")
}

// put writes an object. It may be called by several goroutines for different objects.
func (f folder) put(kind, namespace, name string, object any) error {
	text, err := yaml.Marshal(object)
	if err != nil {
		return fmt.Errorf("encode %s %s/%s: %w", kind, namespace, name, err)
	}
	path := f.path(kind, namespace, name)
	if had, err := os.ReadFile(path); err == nil && string(had) == string(text) {
		return nil
	}
	tmp, err := os.CreateTemp(string(f), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // is not there any more if all went well
	_, err = tmp.Write(text)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}

// remove deletes an object; none is no error.
func (f folder) remove(kind, namespace, name string) error {
	err := os.Remove(f.path(kind, namespace, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
