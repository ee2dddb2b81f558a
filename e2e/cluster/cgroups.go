package cluster

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/machine"
)

const (
	cgroupRoot   = "/sys/fs/cgroup"
	cgroupPrefix = "tacit-e2e-"
)

// cgroups are the cgroups of one cluster: one folder in each v1 hierarchy, or one
// in the unified one, with a folder for each machine.
type cgroups struct {
	name        string
	hierarchies []machine.Hierarchy // none: unified
}

// findCgroups names the cgroups of the cluster with that folder. Its path makes
// them unique: a cluster of the same name in another cache is another cluster, and
// cleaning up must not end it.
func findCgroups(dir string) (cgroups, error) {
	g := cgroups{name: fmt.Sprintf("%s%s-%x", cgroupPrefix, filepath.Base(dir), sha256.Sum256([]byte(dir)))}
	g.name = g.name[:len(g.name)-56]
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		return g, nil
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return g, err
	}
	g.hierarchies = parseHierarchies(string(mounts))
	if len(g.hierarchies) == 0 {
		return g, errors.New("no cgroups in " + cgroupRoot + ": mount cgroup2 there")
	}
	return g, nil
}

// parseHierarchies finds the mounts of type cgroup. A line ends in
// "- cgroup SOURCE OPTIONS", where the hierarchy is named by its options.
func parseHierarchies(mountinfo string) []machine.Hierarchy {
	var all []machine.Hierarchy
	for line := range strings.Lines(mountinfo) {
		front, back, _ := strings.Cut(line, " - ")
		place, kind := strings.Fields(front), strings.Fields(back)
		if len(kind) != 3 || kind[0] != "cgroup" || filepath.Dir(place[4]) != cgroupRoot {
			continue
		}
		options := slices.DeleteFunc(strings.Split(kind[2], ","), func(o string) bool {
			return o == "rw" || o == "ro" || o == "xattr" || strings.HasPrefix(o, "release_agent")
		})
		if strings.HasPrefix(options[0], "name=") {
			options = append([]string{"none"}, options...)
		}
		all = append(all, machine.Hierarchy{Name: filepath.Base(place[4]), Options: strings.Join(options, ",")})
	}
	return all
}

// folders are the cluster's folders, with these names below.
func (g cgroups) folders(below ...string) []string {
	var all []string
	tail := filepath.Join(append([]string{g.name}, below...)...)
	for _, h := range g.hierarchies {
		all = append(all, filepath.Join(cgroupRoot, h.Name, tail))
	}
	if all == nil {
		all = []string{filepath.Join(cgroupRoot, tail)}
	}
	return all
}

// place makes a machine's cgroups and puts its first process into them.
func (g cgroups) place(name string, pid int) error {
	for _, folder := range g.folders(name) {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return fmt.Errorf("make a cgroup: %w", err)
		}
		if err := g.prepare(folder); err != nil {
			return err
		}
		if err := writeFile(folder, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// prepare fills what a fresh cgroup lacks before it takes processes: the CPUs in
// v1, and in v2 the controllers, which a parent passes on.
func (g cgroups) prepare(folder string) error {
	parent := filepath.Dir(folder)
	if len(g.hierarchies) == 0 {
		return errors.Join(enableControllers(cgroupRoot), enableControllers(parent))
	}
	if _, err := os.Stat(filepath.Join(folder, "cpuset.cpus")); err != nil {
		return nil
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		text, err := os.ReadFile(filepath.Join(filepath.Dir(parent), f))
		if err != nil {
			return err
		}
		if err := errors.Join(writeFile(parent, f, string(text)), writeFile(folder, f, string(text))); err != nil {
			return err
		}
	}
	return nil
}

func enableControllers(folder string) error {
	text, err := os.ReadFile(filepath.Join(folder, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for c := range strings.FieldsSeq(string(text)) {
		if err := writeFile(folder, "cgroup.subtree_control", "+"+c); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(folder, name, text string) error {
	return os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644)
}

// freeze stops a machine's processes where they are, or lets them go on.
func (g cgroups) freeze(name string, frozen bool) error {
	file, words := "cgroup.freeze", map[bool]string{true: "1", false: "0"}
	if len(g.hierarchies) > 0 {
		file, words = "freezer.state", map[bool]string{true: "FROZEN", false: "THAWED"}
	}
	for _, folder := range g.folders(name) {
		if _, err := os.Stat(filepath.Join(folder, file)); err == nil {
			return writeFile(folder, file, words[frozen])
		}
	}
	return fmt.Errorf("no cgroup of %s has %s", name, file)
}

// remove kills what is left in these cgroups and removes them; none is no error.
func (g cgroups) remove(ctx context.Context, below ...string) error {
	var errs []error
	for _, folder := range g.folders(below...) {
		err := build.Poll(ctx, func() error { return removeTree(folder) })
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func removeTree(folder string) error {
	var all []string
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for _, path := range all {
		thaw(path) // before anything is killed: what is frozen does not die
	}
	slices.Reverse(all) // children first
	for _, path := range all {
		if text, err := os.ReadFile(filepath.Join(path, "cgroup.procs")); err == nil {
			for pid := range strings.FieldsSeq(string(text)) {
				n, _ := strconv.Atoi(pid)
				killOwn(n)
			}
		}
		if e := os.Remove(path); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = e
		}
	}
	return err
}

func thaw(folder string) {
	file := filepath.Join(folder, "freezer.state")
	if _, err := os.Stat(file); err == nil {
		_ = os.WriteFile(file, []byte("THAWED"), 0o644) // gone already
	}
}

// killOwn kills a process found in one of our cgroups. Pid 0 is a process of a
// namespace that is not ours to see, and to kill(2) our own group.
func killOwn(pid int) {
	if pid > 1 && pid != os.Getpid() {
		_ = unix.Kill(pid, unix.SIGKILL) // gone already, or at once
	}
}
