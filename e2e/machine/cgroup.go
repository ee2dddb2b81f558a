package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups mounts what the cgroup namespace shows: the machine's own part.
func (r Root) cgroups() []action {
	at := r.in("sys/fs/cgroup")
	if len(r.Cgroups) == 0 {
		return []action{
			{"mount " + at, func() error { return unix.Mount("cgroup2", at, "cgroup2", 0, "") }},
			{"delegate cgroup controllers", func() error { return delegate(at) }},
		}
	}
	actions := []action{{"mount " + at, func() error { return unix.Mount("cgroup", at, "tmpfs", 0, "mode=755") }}}
	for _, h := range r.Cgroups {
		actions = append(actions, mount("cgroup", filepath.Join(at, h.Name), "cgroup", 0, h.Options))
		for name := range strings.SplitSeq(h.Name, ",") {
			if name != h.Name { // cpu,cpuacct is one; programs look for cpu, and for cpuacct
				actions = append(actions, action{"link " + name, func() error { return os.Symlink(h.Name, filepath.Join(at, name)) }})
			}
		}
	}
	return actions
}

// delegate lets the machine's cgroups have every controller: processes must not
// stand beside the cgroups that have them, so they go into a leaf first.
func delegate(at string) error {
	leaf := filepath.Join(at, "init")
	if err := os.Mkdir(leaf, 0o755); err != nil {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(at, "cgroup.controllers"))
	if err != nil {
		return err
	}
	enable := "+" + strings.Join(strings.Fields(string(controllers)), " +")
	// The kernel tells nobody when the last process has left; one that forks while
	// it is moved leaves a child behind, so this is done until none is there.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		processes, err := os.ReadFile(filepath.Join(at, "cgroup.procs"))
		if err != nil {
			return err
		}
		for pid := range strings.FieldsSeq(string(processes)) {
			_ = os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(pid), 0o644) // it may have ended
		}
		err = os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte(enable), 0o644)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("enable %s: %w", enable, err)
		}
	}
}
