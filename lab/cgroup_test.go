package lab_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// memoryGroups is where memory cgroups can be made, "" if they cannot.
func memoryGroups() string {
	if os.Getuid() != 0 {
		return ""
	}
	for _, dir := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		_, err := os.Stat(filepath.Join(dir, "memory.limit_in_bytes"))
		control, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
		if err == nil || slices.Contains(strings.Fields(string(control)), "memory") {
			return dir
		}
	}
	return ""
}

// group is a memory cgroup with one process of Tacit.
type group struct {
	dir string
	pid int
}

// cgroupVerb: "cgroup limit PROCESS BYTES" puts a process of Tacit, as a container's, into a cgroup with that limit of
// memory, sockets included. "cgroup peak PROCESS BYTES" checks that it still lives, and has never had more than that.
func cgroupVerb(ts *testscript.TestScript, not bool, args []string) {
	if not || len(args) != 3 {
		ts.Fatalf("usage: cgroup limit|peak PROCESS BYTES")
	}
	s := ts.Value(labKey{}).(*story)
	bytes, err := strconv.ParseInt(args[2], 10, 64)
	ts.Check(err)
	switch args[0] {
	case "limit":
		g := &group{dir: filepath.Join(memoryGroups(), filepath.Base(s.dir)+"-"+strings.ReplaceAll(args[1], "/", "-"))}
		if s.groups == nil {
			s.groups = map[string]*group{}
		}
		s.groups[args[1]] = g
		g.pid, err = s.pidOf(args[1])
		ts.Check(err)
		ts.Check(g.make(bytes))
	case "peak":
		g := s.groups[args[1]]
		if err := syscall.Kill(g.pid, 0); err != nil {
			ts.Fatalf("%s has ended: %v", args[1], err)
		}
		peak, err := g.peak()
		ts.Check(err)
		ts.Logf("%s: at most %d bytes", args[1], peak)
		if peak > bytes {
			ts.Fatalf("%s had %d bytes: want %d at most", args[1], peak, bytes)
		}
	default:
		ts.Fatalf("cgroup %s: want limit or peak", args[0])
	}
}

func (g *group) make(bytes int64) error {
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return err
	}
	// Version 2 has one limit; version 1 one for sockets, without which it does not count them.
	err := g.set("memory.max", bytes)
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.Join(g.set("memory.limit_in_bytes", bytes), g.set("memory.kmem.tcp.limit_in_bytes", bytes))
	}
	return errors.Join(err, g.set("cgroup.procs", int64(g.pid)))
}

func (g *group) set(file string, n int64) error {
	f, err := os.OpenFile(filepath.Join(g.dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(f, n)
	return errors.Join(err, f.Close())
}

// peak is the most memory that the group has had. With version 1 it is that of the process
// and that of its sockets, which need not have been at the same time.
func (g *group) peak() (sum int64, err error) {
	found := false
	for _, name := range []string{"memory.peak", "memory.max_usage_in_bytes", "memory.kmem.tcp.max_usage_in_bytes"} {
		text, rerr := os.ReadFile(filepath.Join(g.dir, name))
		if errors.Is(rerr, fs.ErrNotExist) {
			continue
		}
		n, perr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		sum, found, err = sum+n, true, errors.Join(err, rerr, perr)
	}
	if !found {
		err = fmt.Errorf("%s tells no peak", g.dir)
	}
	return sum, err
}

// remove takes it away once its processes have ended, which the kernel notes late.
func (g *group) remove() error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := os.Remove(g.dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) || time.Now().After(end) {
			return err
		}
	}
}

// pidOf finds a process of Tacit's, NODE/ROLE, among those of the lab.
func (s *story) pidOf(process string) (int, error) {
	node, role, _ := strings.Cut(process, "/")
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		text, _ := os.ReadFile(name) // it may be gone
		words := strings.Split(string(text), "\x00")
		at := slices.Index(words, "--node")
		if len(words) < 2 || filepath.Base(words[0]) != "tacit-node" || words[1] != role || at < 0 || words[at+1] != node {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil && s.has(pid) {
			return pid, nil
		}
	}
	return 0, errors.Join(fmt.Errorf("no process of the lab is %s", process), err)
}

// has reports whether a process descends from the lab's first one.
func (s *story) has(pid int) bool {
	for pid > 1 && pid != s.started.Process.Pid {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		rest := text[strings.LastIndexByte(string(text), ')')+1:]
		fields := strings.Fields(string(rest)) // state, parent, …
		if pid, err = strconv.Atoi(fields[1]); err != nil {
			return false
		}
	}
	return pid > 1
}
