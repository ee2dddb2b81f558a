package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/build"
)

// WordJanitor has the program kube clean up after an owner.
const WordJanitor = "janitor"

// cleaningTime is how long a cluster's remains may resist.
const cleaningTime = 30 * time.Second

// janitor is a process that outlives the owner: it waits for the end of a pipe
// that only the owner holds, and cleans up then, whyever that was.
type janitor struct {
	cmd    *exec.Cmd
	owner  io.Closer // the end that the owner holds
	output *bytes.Buffer
}

func startJanitor(p build.Programs, cluster string) (*janitor, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	j := &janitor{owner: write, output: &bytes.Buffer{}}
	j.cmd = exec.Command(filepath.Join(p.Tools, "kube"), WordJanitor, cluster)
	j.cmd.Stdin, j.cmd.Stderr = read, j.output
	j.cmd.Dir = "/"
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // ^C is for the owner
	if err := j.cmd.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("start the janitor: %w", err)
	}
	return j, nil
}

// finish has it clean up, and returns when it has.
func (j *janitor) finish(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = j.cmd.Process.Kill() })()
	err := errors.Join(j.owner.Close(), j.cmd.Wait())
	if err != nil {
		return fmt.Errorf("clean up: %w: %s", err, bytes.TrimSpace(j.output.Bytes()))
	}
	return nil
}

// Janitor waits for the end of owner, and then cleans up.
func Janitor(ctx context.Context, owner io.Reader, cluster string) error {
	_, _ = io.Copy(io.Discard, owner) // nobody writes: it returns at the end
	return clean(ctx, cluster)
}

// clean removes what a kill leaves of a cluster: cgroups and files.
func clean(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, cleaningTime, fmt.Errorf("not clean after %s", cleaningTime))
	defer cancel()
	parent, err := clustersDir()
	if err != nil {
		return err
	}
	dir := filepath.Join(parent, name)
	g, err := findCgroups(dir)
	if err != nil {
		return err
	}
	// The cgroups first: what is in them may still write to the disk.
	return errors.Join(g.remove(ctx), build.Poll(ctx, func() error { return removeFolder(dir) }))
}

// removeFolder removes a cluster's folder. No mount of ours is in the host's mount
// namespace; if one is there after all, what is below it is not ours to remove.
func removeFolder(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if place := strings.Fields(line)[4]; strings.HasPrefix(place, dir+"/") {
			return fmt.Errorf("%s is mounted: umount it", place)
		}
	}
	return os.RemoveAll(dir)
}

// claim makes the folder of a cluster and locks it for as long as the file that it
// returns is open: until Close, or the end of the owner. It also cleans up after
// owners whose janitor was killed with them.
func claim(ctx context.Context, name string, p build.Programs) (*os.File, View, error) {
	parent, err := clustersDir()
	if err != nil {
		return nil, View{}, err
	}
	gate, err := lockFile(parent, unix.LOCK_EX)
	if err != nil {
		return nil, View{}, err
	}
	defer gate.Close()
	if err := sweep(ctx, parent); err != nil {
		return nil, View{}, err
	}
	v := View{Name: name, dir: filepath.Join(parent, name)}
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		return nil, v, fmt.Errorf("there is a cluster %s already (make kube-down, or another name): %w", name, err)
	}
	f, err := lockFile(v.dir, unix.LOCK_EX)
	if err != nil {
		return nil, v, err
	}
	return f, v, errors.Join(v.writeKubectl(p), os.WriteFile(filepath.Join(v.dir, "owner"), fmt.Append(nil, os.Getpid()), 0o644))
}

// lockFile locks the file "lock" in a folder.
func lockFile(dir string, how int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// sweep cleans up clusters that nobody owns.
func sweep(ctx context.Context, parent string) error {
	names, err := List()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if f, err := lockFile(filepath.Join(parent, name), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			errs = append(errs, clean(ctx, name), f.Close())
		}
	}
	return errors.Join(errs...)
}

// List names the clusters of this machine.
func List() ([]string, error) {
	dir, err := clustersDir()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// End has the owner of a cluster end it, and returns when nothing is left. Where
// the owner has ended without that, it cleans up itself; no cluster is no error.
func End(ctx context.Context, name string) error {
	parent, err := clustersDir()
	if err != nil {
		return err
	}
	dir := filepath.Join(parent, name)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockFile(dir, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil { // nobody owns it
		return errors.Join(clean(ctx, name), lock.Close())
	}
	text, err := os.ReadFile(filepath.Join(dir, "owner"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		return fmt.Errorf("%s/owner: %w", dir, err)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		return fmt.Errorf("end the owner of %s, process %d: %w", name, pid, err)
	}
	return awaitEnd(ctx, dir, pid)
}

func awaitEnd(ctx context.Context, dir string, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*cleaningTime)
	defer cancel()
	return build.Poll(ctx, func() error {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("process %d has not removed %s: %w", pid, dir, err)
		}
		return nil
	})
}
