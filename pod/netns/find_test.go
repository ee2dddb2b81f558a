package netns

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	uidA      = "11111111-2222-3333-4444-55555555555a"
	uidB      = "11111111-2222-3333-4444-55555555555b"
	sandboxID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

func TestPodOf(t *testing.T) {
	under := func(uid string) string { return strings.ReplaceAll(uid, "-", "_") }
	for name, c := range map[string]struct{ text, uid, container string }{
		"v2, cgroupfs": {"0::/kubepods/burstable/pod" + uidA + "/" + sandboxID + "\n", uidA, sandboxID},
		"v2, systemd": {"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under(uidA) + ".slice/cri-containerd-" + sandboxID + ".scope\n",
			uidA, sandboxID},
		"v2, guaranteed, CRI-O":             {"0::/kubepods.slice/kubepods-pod" + under(uidA) + ".slice/crio-" + sandboxID + ".scope/container\n", uidA, sandboxID},
		"v2, from another cgroup namespace": {"0::/../../besteffort/pod" + uidA + "/" + sandboxID + "\n", uidA, sandboxID},
		"v1": {"12:pids:/kubepods/besteffort/pod" + uidA + "/" + sandboxID + "\n1:name=systemd:/kubepods/besteffort/pod" + uidA + "/" + sandboxID + "\n",
			uidA, sandboxID},
		"v1, and no container in the first hierarchy": {"12:cpuset:/\n11:memory:/kubepods/pod" + uidA + "\n", uidA, ""},
		"a node in a pod of another cluster":          {"0::/kubepods/pod" + strings.Replace(uidA, "1", "9", 1) + "/x/kubelet/kubepods/pod" + uidA + "/" + sandboxID + "\n", uidA, sandboxID},
		"who pretends to be another pod":              {"0::/kubepods/pod" + uidA + "/" + sandboxID + "/pod" + uidB + "/" + sandboxID + "\n", uidA, sandboxID},
		"not a pod":                                   {"0::/system.slice/pod" + uidA + "x.service\n", "", ""},
		"nothing":                                     {"", "", ""},
		"no path":                                     {"0::\n", "", ""},
	} {
		uid, container := podOf([]byte(c.text), func(uid string) bool { return uid == uidA || uid == uidB })
		if uid != c.uid || container != c.container {
			t.Errorf("%s: pod %q, container %q: want %q, %q", name, uid, container, c.uid, c.container)
		}
	}
}

func FuzzPodOf(f *testing.F) {
	f.Add([]byte("0::/kubepods/burstable/pod" + uidA + "/" + sandboxID + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if uid, _ := podOf(text, func(string) bool { return true }); uid != "" && len(uid) != len(uidA) {
			t.Errorf("%q", uid)
		}
	})
}

// The oldest process of a pod tells where it is; one that has left for another
// namespace does not.
func TestFind(t *testing.T) {
	path := func(ns *NS) string { return fmt.Sprintf("/proc/self/fd/%d", ns.file.Fd()) }
	sandbox, elsewhere := path(unnamed(t)), path(unnamed(t))
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	proc := t.TempDir()
	put := func(pid int, cgroup string, began int, ns string) {
		t.Helper()
		dir := filepath.Join(proc, fmt.Sprint(pid))
		must(t, os.MkdirAll(filepath.Join(dir, "ns"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "cgroup"), []byte("0::"+cgroup+"\n"), 0o644))
		stat := fmt.Sprintf("%d (a ) b) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0\n", pid, began)
		must(t, os.WriteFile(filepath.Join(dir, "stat"), []byte(stat), 0o644))
		must(t, os.Symlink(ns, filepath.Join(dir, "ns/net")))
	}
	pod := "/kubepods/pod" + uidA + "/"
	put(10, pod+strings.Repeat("b", 64), 300, sandbox)
	put(11, pod+sandboxID, 200, sandbox)
	put(12, pod+strings.Repeat("c", 64), 400, elsewhere)
	put(13, "/kubepods/pod"+uidB+"/"+sandboxID, 100, self) // in the node's own namespace
	put(14, "/system.slice", 1, self)
	must(t, os.MkdirAll(filepath.Join(proc, "15"), 0o755)) // has just ended
	found, err := Find(t.Context(), proc, func(string) bool { return true })
	must(t, err)
	want := map[string]Found{uidA: {Path: filepath.Join(proc, "11/ns/net"), Container: sandboxID}}
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("(-want +found)\n%s", diff)
	}
}

func TestFindReadsTheRealProc(t *testing.T) {
	if _, err := Find(t.Context(), "/proc", func(string) bool { return true }); err != nil {
		t.Error(err)
	}
}

// The kernel's own cgroups of either layout, and a process in that of a pod. TestMain
// leaves it out in a user namespace, which may make none.
func TestFindInRealCgroups(t *testing.T) {
	uid := fmt.Sprintf("11111111-2222-3333-4444-%012x", os.Getpid()) // other runs have others
	for name, c := range map[string]struct{ mount, cgroup string }{
		"v2, systemd": {"-t cgroup2", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" +
			strings.ReplaceAll(uid, "-", "_") + ".slice/cri-containerd-" + sandboxID + ".scope"},
		"v1, cgroupfs": {"-t cgroup -o none,name=tacit-test", "kubepods/burstable/pod" + uid + "/" + sandboxID},
	} {
		t.Run(name, func(t *testing.T) {
			pid := inCgroup(t, c.mount, c.cgroup)
			found, err := Find(t.Context(), "/proc", func(is string) bool { return is == uid })
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]Found{uid: {Path: fmt.Sprintf("/proc/%d/ns/net", pid), Container: sandboxID}}
			if diff := cmp.Diff(want, found); diff != "" {
				t.Errorf("(-want +found)\n%s", diff)
			}
		})
	}
}

// inCgroup has a process in a network namespace of its own in a cgroup until the test
// ends. The hierarchy is mounted where nobody else sees it. The process ends, and
// removes its cgroup, at the end of its input, so also when this one is killed.
func inCgroup(t *testing.T, mount, cgroup string) (pid int) {
	t.Helper()
	const script = `mount $1 none "$3" && cd "$3" && mkdir -p "$2" && echo $$ >"$2/cgroup.procs" || exit 1
echo $$
read -r end
echo $$ >cgroup.procs
rmdir "$2" "$(dirname "$2")" && rmdir -p --ignore-fail-on-non-empty "$(dirname "$(dirname "$2")")"`
	cmd := exec.Command("unshare", "--mount", "--net", "sh", "-c", script, "sh", mount, cgroup, t.TempDir())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("process in cgroup %s: %v", cgroup, err)
		}
	})
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatalf("process in cgroup %s: %v", cgroup, err)
	}
	return pid
}
