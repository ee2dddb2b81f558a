package memory

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// cgroups is where a container sees its own control group, as that of its namespace's root.
const cgroups = "/sys/fs/cgroup"

// sockets is how many bytes of the process's memory limit are in buffers of sockets, and
// whether the kernel tells: by memory.stat with cgroup v2; with v1 they have a limit of their
// own.
func sockets(root string) (float64, bool) {
	if stat, err := os.ReadFile(filepath.Join(root, "memory.stat")); err == nil {
		for line := range strings.Lines(string(stat)) {
			if n, ok := strings.CutPrefix(line, "sock "); ok {
				return number(n)
			}
		}
	}
	if n, err := os.ReadFile(filepath.Join(root, "memory", "memory.kmem.tcp.usage_in_bytes")); err == nil {
		return number(string(n))
	}
	return 0, false
}

func number(s string) (float64, bool) {
	n, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	return n, err == nil
}
