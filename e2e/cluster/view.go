package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"tacit.dev/e2e/build"
)

// View is a running cluster as anybody on the machine sees it, its owner or not.
type View struct {
	Name string
	dir  string
}

// Find returns a cluster by its name.
func Find(name string) (View, error) {
	dir, err := clustersDir()
	if err != nil {
		return View{}, err
	}
	v := View{Name: name, dir: filepath.Join(dir, name)}
	if _, err := os.Stat(v.Kubeconfig()); err != nil {
		return v, fmt.Errorf("no cluster %s (make kube starts one): %w", name, err)
	}
	return v, nil
}

// clustersDir is the folder of all clusters of this user.
func clustersDir() (string, error) {
	cache, err := build.Cache()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "clusters")
	return dir, os.MkdirAll(dir, 0o700)
}

func (v View) machineDir(name string) string { return filepath.Join(v.dir, "machines", name) }

// Kubeconfig is a file for the administrator, usable from the host.
func (v View) Kubeconfig() string { return filepath.Join(v.dir, "pki", "admin.kubeconfig") }

// KubectlPath is a kubectl that talks to this cluster.
func (v View) KubectlPath() string { return filepath.Join(v.dir, "kubectl") }

func (v View) writeKubectl(p build.Programs) error {
	text := fmt.Sprintf("#!/bin/sh\nexec '%s' kubectl --kubeconfig '%s' \"$@\"\n", filepath.Join(p.Kubernetes, "kubenode"), v.Kubeconfig())
	return os.WriteFile(v.KubectlPath(), []byte(text), 0o755)
}

// KubectlCommand is a kubectl that the caller runs.
func (v View) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, v.KubectlPath(), args...)
}

// Kubectl runs kubectl and returns what it printed; what it complained about is in
// the error.
func (v View) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(v.KubectlCommand(ctx, args...))
}

// Apply creates or changes the objects of a YAML text.
func (v View) Apply(ctx context.Context, yaml string) (string, error) {
	cmd := v.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(yaml)
	return output(cmd)
}

func output(cmd *exec.Cmd) (string, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(complaint.Bytes()))
	}
	return out.String(), nil
}

// Machines are the names of the cluster's machines.
func (v View) Machines() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(v.dir, "machines"))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// initPid is the first process of a machine.
func (v View) initPid(machine string) (int, error) {
	text, err := os.ReadFile(filepath.Join(v.machineDir(machine), "pid"))
	if err != nil {
		return 0, fmt.Errorf("cluster %s has no machine %s: %w", v.Name, machine, err)
	}
	return strconv.Atoi(string(text))
}

// Netns is the path of a machine's network namespace, for those who capture on
// its links. A reboot makes another.
func (v View) Netns(machine string) (string, error) {
	pid, err := v.initPid(machine)
	return netnsPath(pid), err
}

// Pid is a process of a machine, as the host counts it, by its name: kubelet,
// kube-proxy, containerd, etcd, kube-apiserver, ….
func (v View) Pid(machine, process string) (int, error) {
	first, err := v.initPid(machine)
	if err != nil {
		return 0, err
	}
	for _, second := range children(first) {
		for _, pid := range children(second) {
			if processName(pid) == process {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("no %s runs on %s", process, machine)
}

func children(pid int) []int {
	var all []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		text, _ := os.ReadFile(f) // a thread may just have ended
		for word := range strings.FieldsSeq(string(text)) {
			if n, err := strconv.Atoi(word); err == nil {
				all = append(all, n)
			}
		}
	}
	return all
}

// processName is the first word of a command line, or the second of kubenode's.
func processName(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	words := strings.Split(string(text), "\x00")
	if name := filepath.Base(words[0]); name != "kubenode" || len(words) < 2 {
		return name
	}
	return words[1]
}

// Logs are the last lines of every log of the cluster.
func (v View) logs(lines int) string {
	files, _ := filepath.Glob(filepath.Join(v.dir, "machines", "*", "*.log"))
	more, _ := filepath.Glob(filepath.Join(v.dir, "machines", "*", "var", "log", "*.log"))
	var text strings.Builder
	for _, f := range append(files, more...) {
		name, _ := filepath.Rel(filepath.Join(v.dir, "machines"), f)
		fmt.Fprintf(&text, "\n== %s\n%s", name, tail(f, lines))
	}
	return text.String()
}

func tail(file string, lines int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return errors.Unwrap(err).Error()
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
