package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/cluster"
)

// remains is what must not be there when a cluster has ended.
type remains struct {
	name       string
	dir        string
	namespaces map[string]string // as "net:[4026532000]", of which machine
}

func record(t *testing.T, v cluster.View) remains {
	t.Helper()
	r := remains{name: v.Name, dir: filepath.Dir(v.KubectlPath()), namespaces: map[string]string{}}
	machines, err := v.Machines()
	if err != nil || len(machines) < 2 {
		t.Fatalf("machines %v: %v", machines, err)
	}
	for _, m := range machines {
		netns, err := v.Netns(m)
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"mnt", "pid", "uts", "ipc", "net", "cgroup"} {
			path := filepath.Join(filepath.Dir(netns), kind)
			link, err := os.Readlink(path)
			if err != nil {
				t.Fatal(err)
			}
			r.namespaces[link] = m
			open, err := os.Open(path) // or its number might soon be that of another one
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { open.Close() })
		}
	}
	r.present(t)
	return r
}

// present proves that find finds something while the cluster runs.
func (r remains) present(t *testing.T) {
	t.Helper()
	for what, found := range r.find() {
		if len(found) == 0 && what != "mount" { // none is in the host's mount namespace
			t.Fatalf("no %s of a running cluster was found: the check is blind", what)
		}
	}
}

func (r remains) nothingLeft(t *testing.T) {
	t.Helper()
	for what, found := range r.find() {
		if len(found) > 0 {
			t.Errorf("%s left: %s", what, strings.Join(found, ", "))
		}
	}
}

// find looks on the whole machine.
func (r remains) find() map[string][]string {
	found := map[string][]string{"file": nil, "cgroup": nil, "mount": nil, "process": nil, "namespace": nil}
	if _, err := os.Stat(r.dir); !errors.Is(err, fs.ErrNotExist) {
		found["file"] = []string{r.dir}
	}
	one, _ := filepath.Glob("/sys/fs/cgroup/tacit-e2e-" + r.name + "-*")
	many, _ := filepath.Glob("/sys/fs/cgroup/*/tacit-e2e-" + r.name + "-*")
	found["cgroup"] = append(one, many...)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, r.dir) {
			found["mount"] = append(found["mount"], line)
		}
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		if in := r.namespaceOf(p); in != "" {
			found["namespace"] = append(found["namespace"], in+" by "+p)
		}
		cgroup, _ := os.ReadFile(p + "/cgroup")
		command, _ := os.ReadFile(p + "/cmdline") // the keeper and the janitor are in no cgroup of ours
		if strings.Contains(string(cgroup), "tacit-e2e-"+r.name) || strings.Contains(string(command), r.name) {
			found["process"] = append(found["process"], p)
		}
	}
	return found
}

func (r remains) namespaceOf(process string) string {
	links, _ := filepath.Glob(process + "/ns/*")
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && r.namespaces[target] != "" {
			return target + " of " + r.namespaces[target]
		}
	}
	return ""
}

// TestOwnerKilled: nothing survives the owner, whatever ended it, and the keeper
// ends as politely as it is asked.
func TestOwnerKilled(t *testing.T) {
	programs, err := build.All(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
		t.Run(unix.SignalName(signal), func(t *testing.T) {
			v := upByCommand(t, filepath.Join(programs.Tools, "kube"), "killed-by-"+strings.ToLower(unix.SignalName(signal)))
			r := record(t, v)
			owner, err := os.ReadFile(filepath.Join(r.dir, "owner"))
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(string(owner))
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(pid, signal); err != nil {
				t.Fatal(err)
			}
			r.awaitEnd(t)
		})
	}
}

// upByCommand starts a cluster as make kube does.
func upByCommand(t *testing.T, kube, name string) cluster.View {
	t.Helper()
	if out, err := exec.CommandContext(patiently(t), kube, "up", "--name", name, "--nodes", "1").CombinedOutput(); err != nil {
		t.Fatalf("kube up: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := cluster.End(context.Background(), name); err != nil {
			t.Error(err)
		}
	})
	v, err := cluster.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// awaitEnd: nobody is left who could be waited for, so it looks until all is gone.
func (r remains) awaitEnd(t *testing.T) {
	t.Helper()
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := build.Poll(ctx, func() error {
		for what, found := range r.find() {
			if len(found) > 0 {
				return fmt.Errorf("%s left: %s", what, strings.Join(found, ", "))
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("all gone after %.1fs", time.Since(begin).Seconds())
}
