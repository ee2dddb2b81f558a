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
		if got, told := sockets(groupWith(t, row.file, row.text)); got != row.want || told != row.told {
			t.Errorf("%s %q: %v, %v: want %v, %v", row.file, row.text, got, told, row.want, row.told)
		}
	}
}

func TestLimitOfEitherVersion(t *testing.T) {
	for _, row := range []struct {
		file, text string
		want       int64
		told       bool
	}{
		{"memory.max", "1073741824\n", 1 << 30, true},
		{"memory.max", "max\n", 0, false},
		{"memory/memory.limit_in_bytes", "1073741824\n", 1 << 30, true},
		{"memory/memory.limit_in_bytes", "9223372036854771712\n", 9223372036854771712, false},
		{"other", "", 0, false},
	} {
		if got, told := limit(groupWith(t, row.file, row.text)); got != row.want || told != row.told {
			t.Errorf("%s %q: %v, %v: want %v, %v", row.file, row.text, got, told, row.want, row.told)
		}
	}
}

// groupWith is a folder with one file.
func groupWith(t *testing.T, file, text string) (root string) {
	t.Helper()
	root = t.TempDir()
	path := filepath.Join(root, file)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return root
}
