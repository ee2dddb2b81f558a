package memory

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSocketsOfEitherVersion(t *testing.T) {
	for _, row := range []struct {
		file, text string
		want       float64
		told       bool
	}{
		{"memory.stat", "anon 1\nsock 123\nsocket 4\n", 123, true},
		{"memory/memory.kmem.tcp.usage_in_bytes", "456\n", 456, true},
		{"memory.stat", "anon 1\n", 0, false},
		{"other", "", 0, false},
	} {
		root := t.TempDir()
		path := filepath.Join(root, row.file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, told := sockets(root); got != row.want || told != row.told {
			t.Errorf("%s %q: %v, %v: want %v, %v", row.file, row.text, got, told, row.want, row.told)
		}
	}
}
