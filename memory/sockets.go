package memory

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// unlimited is less than what version 1 says where there is no limit; version 2 says "max".
const unlimited = 1 << 60

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

// Limit is the most memory that the kernel lets this process's container have, and whether
// there is such a limit. Above it the kernel ends the process.
func Limit() (bytes int64, told bool) { return limit(cgroups) }

func limit(root string) (int64, bool) {
	for _, path := range []string{"memory.max", "memory/memory.limit_in_bytes"} {
		text, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return n, err == nil && n < unlimited
	}
	return 0, false
}

// TCP is at how many bytes in the buffers of all TCP sockets of the host the kernel begins to save
// memory, at the cost of all of them. It is what the kernel chooses by itself: net.ipv4.tcp_mem is shown
// in the host's own network namespace only.
func TCP() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		panic("memory: sysinfo: " + err.Error()) // only for a bad address
	}
	return int64(info.Totalram) * int64(info.Unit) / 16
}

func number(s string) (float64, bool) {
	n, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	return n, err == nil
}
