package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Found is where a running pod is.
type Found struct {
	// Path leads to its namespace for as long as its sandbox lives.
	Path string
	// Container is the sandbox, as the runtime calls it; "" if the name of its
	// cgroup does not tell.
	Container string
}

// process is one that belongs to a pod.
type process struct {
	Found
	began uint64 // clock ticks since boot
	key   Key
}

// Find looks through the processes of the machine for those pods whose UIDs are
// wanted, and tells by UID where they are. It asks no container runtime: which
// pod a process belongs to is in the name of its cgroup, as the kubelet makes it.
// Of a pod's processes the oldest counts, which is its sandbox: it leaves its
// namespace never, and last. Pods in the namespace of the caller are left out.
//
// proc is where a proc file system is mounted that shows all processes. One that
// cannot be read hides no other: what was found is returned beside the error.
func Find(ctx context.Context, proc string, wanted func(uid string) bool) (map[string]Found, error) {
	own, err := Open(self)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("find pods: %w", err)
	}
	var bad error
	oldest := make(map[string]process)
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		uid, p, err := look(filepath.Join(proc, e.Name()), wanted)
		if err != nil && !errors.Is(err, ErrGone) {
			bad = fmt.Errorf("find pods: %w", err) // the last one will do
		}
		if old, ok := oldest[uid]; uid != "" && err == nil && p.key != own.key && (!ok || p.began < old.began) {
			oldest[uid] = p
		}
	}
	found := make(map[string]Found, len(oldest))
	for uid, p := range oldest {
		found[uid] = p.Found
	}
	return found, bad
}

// look reads what is needed of one process. One that ends meanwhile is ErrGone.
func look(dir string, wanted func(string) bool) (uid string, p process, err error) {
	cgroups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return "", p, gone(err)
	}
	uid, p.Container = podOf(cgroups, wanted)
	if uid == "" {
		return "", p, nil
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return "", p, gone(err)
	}
	if p.began, err = startOf(stat); err != nil {
		return "", p, fmt.Errorf("%s: %w", dir, err)
	}
	p.Path = filepath.Join(dir, "ns/net")
	ns, err := Open(p.Path)
	if err != nil {
		return "", p, gone(err)
	}
	p.key = ns.Key()
	return uid, p, ns.Close()
}

// gone is ErrGone if err is how a process that has ended is read.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	return err
}

var (
	// podName is how the kubelet names a pod's cgroup: podUID with its cgroupfs
	// driver, kubepods[-QOS]-podUID.slice with systemd's, where the dashes of the
	// UID have become underlines.
	podName = regexp.MustCompile(`^(?:kubepods-(?:burstable-|besteffort-)?)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})(?:\.slice)?$`)
	// containerName is how runtimes name a container's: its 64 digits, with a
	// prefix and .scope below systemd.
	containerName = regexp.MustCompile(`^(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?$`)
)

// podOf reads /proc/PID/cgroup (cgroups(7)), with one line per hierarchy. Of several
// UIDs in one path the outermost wanted one counts: a process can make cgroups
// only below that of its own pod, so it cannot pass for one of another's.
func podOf(text []byte, wanted func(string) bool) (uid, container string) {
	for line := range bytes.Lines(text) {
		_, path, ok := strings.Cut(string(bytes.TrimSpace(line)), ":/")
		if !ok {
			continue
		}
		names := strings.Split(path, "/")
		for i, name := range names {
			m := podName.FindStringSubmatch(name)
			if m == nil {
				continue
			}
			uid := strings.ReplaceAll(m[1], "_", "-")
			if !wanted(uid) {
				continue
			}
			if i+1 < len(names) {
				if c := containerName.FindStringSubmatch(names[i+1]); c != nil {
					container = c[1]
				}
			}
			return uid, container
		}
	}
	return "", ""
}

// startOf is field 22 of /proc/PID/stat (proc_pid_stat(5)). Field 2, in brackets,
// may hold anything.
func startOf(stat []byte) (uint64, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("read stat: %d fields", len(fields))
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
