package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Streams are a command's standard streams; nil ones are empty.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Run runs a command inside of a machine and returns what it printed.
func (v View) Run(ctx context.Context, machine string, command ...string) (string, error) {
	var out, complaint bytes.Buffer
	if err := v.Enter(ctx, machine, Streams{Out: &out, Err: &complaint}, command...); err != nil {
		return out.String(), fmt.Errorf("%s on %s: %w: %s", strings.Join(command, " "), machine, err, bytes.TrimSpace(complaint.Bytes()))
	}
	return out.String(), nil
}

// Enter runs a command in all namespaces of a machine, as ssh would.
func (v View) Enter(ctx context.Context, machine string, s Streams, command ...string) error {
	pid, err := v.initPid(machine)
	if err != nil {
		return err
	}
	return throwaway(func() error { return runInside(ctx, pid, s, command) })
}

// runInside leaves its thread in the machine.
func runInside(ctx context.Context, pid int, s Streams, command []string) error {
	if err := enterNamespaces(pid); err != nil {
		return fmt.Errorf("enter process %d: %w", pid, err)
	}
	program, err := lookInside(command[0])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.In, s.Out, s.Err
	cmd.Env = []string{"PATH=" + nodePath, "HOME=/root", "TERM=" + os.Getenv("TERM")}
	cmd.Dir = "/"
	return cmd.Run()
}

// enterNamespaces: the mount namespace comes last, since /proc changes with it. The
// thread must not share its root with the others.
func enterNamespaces(pid int) error {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, name := range []string{"ipc", "uts", "net", "cgroup", "pid", "mnt"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	for _, f := range files {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return nil
}

// lookInside finds a program where the machine has its programs; exec.LookPath
// would look where the owner has them.
func lookInside(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(nodePath) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", errors.New("no program " + name + " in " + nodePath)
}
