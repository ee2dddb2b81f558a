package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// action is one thing to do, named for the error.
type action struct {
	what string
	do   func() error
}

func perform(actions []action) error {
	for _, a := range actions {
		if err := a.do(); err != nil {
			return fmt.Errorf("%s: %w", a.what, err)
		}
	}
	return nil
}

// sharedRoot gives a machine with the host's files a /proc of its own processes
// and an empty /run.
func sharedRoot() error {
	return perform([]action{
		mount("proc", "/proc", "proc", 0, ""),
		mount("machine", "/run", "tmpfs", 0, "mode=755"),
	})
}

// make builds the root and moves into it.
func (r Root) make() error {
	actions := []action{
		{"make " + r.At, func() error { return errors.Join(os.MkdirAll(r.At, 0o755), os.MkdirAll(r.Var, 0o755)) }},
		mount("node", r.At, "tmpfs", 0, "mode=755"),
		{"folders", r.folders},
		bindReadOnly("/usr", r.in("usr")),
		mount(r.Var, r.in("var"), "", unix.MS_BIND, ""),
		mount("run", r.in("run"), "tmpfs", 0, "mode=755"),
		mount("tmp", r.in("tmp"), "tmpfs", 0, "mode=1777"),
		{"folders in /var", r.varFolders},
	}
	for _, place := range slices.Sorted(maps.Keys(r.Binds)) {
		actions = append(actions, bindReadOnly(r.Binds[place], r.in(place)))
	}
	for _, place := range r.Kept {
		disk := r.in(filepath.Join("var/kept", place))
		actions = append(actions, action{"make " + disk, func() error { return os.MkdirAll(disk, 0o755) }}, mount(disk, r.in(place), "", unix.MS_BIND, ""))
	}
	for _, place := range slices.Sorted(maps.Keys(r.Copies)) {
		actions = append(actions, action{"copy " + place, func() error { return r.copy(place) }})
	}
	actions = append(actions, action{"files", r.files})
	actions = append(actions, r.devices()...)
	actions = append(actions, r.kernel()...)
	actions = append(actions, r.cgroups()...)
	actions = append(actions, action{"change root", r.pivot})
	return perform(actions)
}

// in is where a place of the machine is before it has moved in.
func (r Root) in(place string) string { return filepath.Join(r.At, place) }

// copy leaves what a machine that ran before has kept.
func (r Root) copy(place string) error {
	err := os.CopyFS(r.in(place), os.DirFS(r.Copies[place]))
	if errors.Is(err, fs.ErrExist) && slices.Contains(r.Kept, place) {
		return nil
	}
	return err
}

func mount(source, target, fstype string, flags uintptr, data string) action {
	return action{"mount " + target, func() error {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		return unix.Mount(source, target, fstype, flags, data)
	}}
}

func bindReadOnly(source, target string) action {
	return action{"bind " + target, func() error {
		return perform([]action{
			mount(source, target, "", unix.MS_BIND, ""),
			mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
		})
	}}
}

func (r Root) folders() error {
	for _, d := range []string{"usr", "etc", "var", "run", "tmp", "proc", "sys", "dev", "opt", "root", "mnt", "old"} {
		if err := os.Mkdir(r.in(d), 0o755); err != nil {
			return err
		}
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+l, r.in(l)); err != nil {
			return err
		}
	}
	for _, f := range []string{"passwd", "group", "nsswitch.conf", "ld.so.cache"} {
		if err := copyFile("/etc/"+f, r.in("etc/"+f)); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o644)
}

func (r Root) varFolders() error {
	for _, d := range []string{"lib/kubelet", "lib/containerd", "lib/cni", "log/pods", "log/containers"} {
		if err := os.MkdirAll(filepath.Join(r.in("var"), d), 0o755); err != nil {
			return err
		}
	}
	err := os.Symlink("/run", r.in("var/run"))
	if errors.Is(err, os.ErrExist) {
		return nil // the disk of a machine that ran before
	}
	return err
}

func (r Root) files() error {
	for place, text := range r.Files {
		if err := os.MkdirAll(filepath.Dir(r.in(place)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(r.in(place), []byte(text), 0o600); err != nil {
			return err
		}
	}
	// Everybody's, as programs that are not root's expect.
	for _, place := range []string{"etc/hosts", "etc/resolv.conf", "etc/machine-id"} {
		if err := os.Chmod(r.in(place), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (r Root) devices() []action {
	actions := []action{mount("dev", r.in("dev"), "tmpfs", 0, "mode=755")}
	for _, d := range []string{"null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse"} {
		if _, err := os.Stat("/dev/" + d); err == nil {
			actions = append(actions, bindFile("/dev/"+d, r.in("dev/"+d)))
		}
	}
	return append(actions,
		mount("devpts", r.in("dev/pts"), "devpts", 0, "newinstance,ptmxmode=0666,mode=0620"),
		mount("shm", r.in("dev/shm"), "tmpfs", 0, "mode=1777"),
		mount("mqueue", r.in("dev/mqueue"), "mqueue", 0, ""),
		action{"links in /dev", func() error {
			return errors.Join(os.Symlink("pts/ptmx", r.in("dev/ptmx")), os.Symlink("/proc/self/fd", r.in("dev/fd")))
		}})
}

func bindFile(source, target string) action {
	return action{"bind " + target, func() error {
		if err := os.WriteFile(target, nil, 0o644); err != nil {
			return err
		}
		return unix.Mount(source, target, "", unix.MS_BIND, "")
	}}
}

// kernel mounts /proc and /sys. The kernel's settings are the host's: only the
// network's may be written, and the kubelet, which sets or demands some of the
// others, reads what it wants to read.
func (r Root) kernel() []action {
	sys := r.in("proc/sys")
	actions := []action{
		mount("proc", r.in("proc"), "proc", 0, ""),
		mount("sysfs", r.in("sys"), "sysfs", 0, ""),
		bindReadOnly(sys, sys),
		mount(sys+"/net", sys+"/net", "", unix.MS_BIND, ""),
		mount("", sys+"/net", "", unix.MS_BIND|unix.MS_REMOUNT, ""),
	}
	for _, key := range slices.Sorted(maps.Keys(r.Kernel)) {
		own := r.in("run/machine/" + strings.ReplaceAll(key, "/", "."))
		actions = append(actions, action{"show " + key, func() error {
			if err := os.MkdirAll(filepath.Dir(own), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(own, []byte(r.Kernel[key]+"\n"), 0o444); err != nil {
				return err
			}
			return unix.Mount(own, filepath.Join(sys, key), "", unix.MS_BIND, "")
		}})
	}
	return actions
}

func (r Root) pivot() error {
	if err := unix.Chdir(r.At); err != nil {
		return err
	}
	return perform([]action{
		{"pivot_root", func() error { return unix.PivotRoot(".", "old") }},
		{"go to /", func() error { return unix.Chdir("/") }},
		{"leave the old root", func() error { return unix.Unmount("/old", unix.MNT_DETACH) }},
		{"remove /old", func() error { return os.Remove("/old") }},
		// Mounts of pods reach the agents that watch them, as on a real node.
		{"share mounts", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") }},
	})
}
