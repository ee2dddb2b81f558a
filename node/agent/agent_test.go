package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

func isInUse(err error) bool { return errors.Is(err, unix.EADDRINUSE) }

// isClean reports what of ours is left in a namespace.
func isClean(t *testing.T, ns *netns.NS) {
	t.Helper()
	for _, c := range []string{"nft list tables", "ip -4 rule list priority 100", "ip -6 rule list priority 100", "ip -6 route show table 31425"} {
		arg := strings.Fields(c)
		err := ns.Do(func() error {
			out, err := exec.Command(arg[0], arg[1:]...).Output()
			if len(out) > 0 {
				t.Errorf("%s: %s", c, out)
			}
			return err
		})
		if err != nil && c[:2] != "ip" { // ip fails where there is no such table
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(limit); listening(t, ns) != 0; runtime.Gosched() {
		if time.Now().After(end) { // the proxy closes its copies in its own time
			t.Fatalf("listeners are left after %v", limit)
		}
	}
}

func isCaptured(t *testing.T, ns *netns.NS, own ...netip.Addr) {
	t.Helper()
	k, err := redirect.NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Check(t.Context(), ns, redirect.Config{Own: own}); err != nil {
		t.Error(err)
	}
	if n := listening(t, ns); n != 4 {
		t.Errorf("%d listeners, want 4", n)
	}
}

func TestAddWaitsUntilCaptured(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	p := dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	isCaptured(t, ns)
	if !p.is(func() bool { return len(p.pods["a"].files) == 4 }) {
		t.Error("the proxy did not get 4 listeners")
	}
	n.reports.until(t, "a", xds.Captured)
	check := addOf("a", path)
	check.Command = cni.Check
	if err := n.ask(check); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for range 2 {
		if err := n.ask(delOf("a")); err != nil {
			t.Errorf("DEL: %v", err)
		}
		isClean(t, ns)
	}
	n.reports.until(t, "a", xds.Released)
	p.until(t, "the proxy drops the pod", func() bool { return len(p.pods) == 0 })
}

// A pod begins when every node knows where it is, or has been waited for.
func TestAddWaitsUntilKnown(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.KnownPatience = limit })
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	add, at := addOf("a", path), netip.MustParseAddr("10.1.2.3")
	add.Addresses = []netip.Addr{at}
	told := word("a", true)
	n.agent.Apply([]mesh.Pod{told})
	answer := make(chan error, 1)
	go func() { answer <- n.ask(add) }()
	if said := n.reports.until(t, "a", xds.Captured); !slices.Equal(said.Addresses, add.Addresses) {
		t.Errorf("control was told of the addresses %v, want %v", said.Addresses, add.Addresses)
	}
	isCaptured(t, ns, add.Addresses...)
	told.Known = []netip.Addr{netip.MustParseAddr("10.1.2.2")} // of an earlier sandbox
	n.agent.Apply([]mesh.Pod{told})
	n.ask(cni.Request{Command: cni.Del, ContainerID: "nobody"}) // what came before it has been heard
	select {
	case err := <-answer:
		t.Fatalf("ADD, while not every node knows the pod: %v", err)
	default:
	}
	told.Known = []netip.Addr{at}
	n.agent.Apply([]mesh.Pod{told})
	if err := <-answer; err != nil {
		t.Errorf("ADD: %v", err)
	}
}

func TestAddWaitsNotForEver(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.KnownPatience = 10 * time.Millisecond })
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	add := addOf("a", path)
	add.Addresses = []netip.Addr{netip.MustParseAddr("10.1.2.3")}
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(add); err != nil {
		t.Errorf("ADD: %v", err)
	}
	isCaptured(t, ns, add.Addresses...)
}

func TestAddOfAPodOutsideTheMesh(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", false)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	isClean(t, ns)
}

// Whatever is missing, the pod does not start, and the reason is told.
func TestAddFailsClosed(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	_, path := namespace(t, "a")
	add := addOf("a", path)
	add.Timeout = 1500 * time.Millisecond
	wants := func(reason string) {
		t.Helper()
		if err := n.ask(add); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("ADD: %v, want %q", err, reason)
		}
	}
	wants("control has not told")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	wants("no proxy is connected")
	p := newProxy()
	p.refuse = true
	p.dial(t, filepath.Join(n.dir, "handle.sock"), nil)
	wants("no certificate")
	add.Netns = path + "-nowhere"
	wants("gone")
}

// Control, the metric and the log are told.
func TestUnprotectedIsReported(t *testing.T) {
	var log bytes.Buffer
	n := startNode(t, t.TempDir(), func(c *Config) {
		c.ProtectWithin, c.UnknownGrace = 50*time.Millisecond, 50*time.Millisecond
		c.CheckInterval = 20 * time.Millisecond
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), nil))
	})
	_, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", false), word("b", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	n.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	if r := n.reports.until(t, "a", xds.Unprotected); !strings.Contains(r.Reason, "no proxy") {
		t.Errorf("reason %q", r.Reason)
	}
	if r := n.reports.until(t, "b", xds.Unprotected); !strings.Contains(r.Reason, "restart the pod") {
		t.Errorf("reason %q", r.Reason)
	}
	n.eventually("both are counted", func() bool { return n.metric("tacit_pods_unprotected") == 2 })
	dialProxy(t, n.dir, nil)
	n.reports.until(t, "a", xds.Captured)
	n.agent.Apply([]mesh.Pod{word("a", true)})
	n.reports.until(t, "b", xds.Released)
	n.eventually("none is counted", func() bool { return n.metric("tacit_pods_unprotected") == 0 })
	n.stop() // from now on nobody writes to the log
	for _, uid := range []string{"a", "b"} {
		if want := `level=WARN msg="pod unprotected" uid=` + uid; !strings.Contains(log.String(), want) {
			t.Errorf("no %s in the log", want)
		}
	}
}

// Why a pod cannot be captured is told when it is known, not when patience ends.
func TestReasonIsToldAtOnce(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.ProtectWithin = time.Hour })
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", false)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	var taken net.Listener
	err := ns.Do(func() (err error) {
		taken, err = net.Listen("tcp", fmt.Sprintf(":%d", mesh.OutboundPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if r := n.reports.until(t, "a", xds.Unprotected); !strings.Contains(r.Reason, "address already in use") {
		t.Errorf("reason %q: want that the port is taken", r.Reason)
	}
	taken.Close()
	n.reports.until(t, "a", xds.Captured)
}

func TestEnrollAndUnenrollARunningPod(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	p := dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", false)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		n.agent.Apply([]mesh.Pod{word("a", true)})
		n.reports.until(t, "a", xds.Captured)
		isCaptured(t, ns)
		n.agent.Apply([]mesh.Pod{word("a", false)})
		n.reports.until(t, "a", xds.Released)
		isClean(t, ns)
	}
	// In again before the last connection has ended.
	p.mu.Lock()
	p.linger = true
	p.mu.Unlock()
	for range 3 {
		n.agent.Apply([]mesh.Pod{word("a", true)})
		n.untilState("a", "captured")
		n.agent.Apply([]mesh.Pod{word("a", false)})
		n.untilState("a", "draining")
	}
}

// untilState polls the dump: the states on the way are not reported.
func (n *node) untilState(uid, want string) {
	n.t.Helper()
	var got string
	for end := time.Now().Add(limit); time.Now().Before(end); runtime.Gosched() {
		for _, s := range n.agent.Dump() {
			if s.UID == uid {
				got = s.State
			}
		}
		if got == want {
			return
		}
	}
	n.t.Fatalf("pod %s is %q, want %q within %v", uid, got, want, limit)
}

// untilListening waits until the agent has the listeners. (To try whether the
// ports are taken would take them.)
func (n *node) untilListening(uid string) {
	n.t.Helper()
	n.eventually("the agent has the listeners", func() bool {
		var have int
		n.agent.ask(func() string { have = len(n.agent.pods[uid].listeners); return "" })
		return have == 4
	})
}

func TestExclusionsChange(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	w := word("a", true)
	n.agent.Apply([]mesh.Pod{w})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	w.ExcludeInbound = []uint16{22}
	n.agent.Apply([]mesh.Pod{w})
	k, err := redirect.NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n.eventually("the rules exclude port 22", func() bool {
		return k.Check(t.Context(), ns, redirect.Config{ExcludeInbound: []uint16{22}}) == nil
	})
}

func (n *node) eventually(what string, so func() bool) {
	n.t.Helper()
	for end := time.Now().Add(limit); !so(); runtime.Gosched() {
		if time.Now().After(end) {
			n.t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func TestVanishedNamespaceIsForgotten(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.CheckInterval = 20 * time.Millisecond })
	p := dialProxy(t, n.dir, nil)
	n.agent.Apply([]mesh.Pod{word("a", true)})
	vanish := func() {
		ns, path := namespace(t, "a")
		if err := n.ask(addOf("a", path)); err != nil {
			t.Fatal(err)
		}
		ns.Close()
		if err := netns.Delete(path); err != nil {
			t.Fatal(err)
		}
		n.reports.until(t, "a", xds.Released)
		p.until(t, "the proxy drops the pod", func() bool { return len(p.pods) == 0 })
	}
	vanish()
	before := openFiles(t)
	vanish()
	n.eventually("no descriptor is left", func() bool { return openFiles(t) <= before })
	if files, err := os.ReadDir(n.dir + "/pods"); err != nil || len(files) > 0 {
		t.Errorf("%d records left, %v", len(files), err)
	}
}

// A new agent finds its pods captured, gets the listeners back from the proxy,
// and hands them to the next one.
func TestAgentRestarts(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, dir, nil)
	p := dialProxy(t, dir, nil)
	ns, path := namespace(t, "a")
	_, path2 := namespace(t, "b")
	n.agent.Apply([]mesh.Pod{word("a", true), word("b", true)})
	for uid, at := range map[string]string{"a": path, "b": path2} {
		if err := n.ask(addOf(uid, at)); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
	isCaptured(t, ns)
	p.disconnect()
	netns.Delete(path2) // ends without anybody being told

	n = startNode(t, dir, nil) // control is silent
	n.reports.until(t, "a", xds.Captured)
	p = dialProxy(t, dir, p)
	p.until(t, "the proxy drops the pod that ended", func() bool { return p.pods["b"] == nil })
	n.untilState("a", "captured")
	n.untilListening("a")
	p.kill()
	isCaptured(t, ns) // the agent's listeners
	p = dialProxy(t, dir, nil)
	p.until(t, "the next proxy serves", func() bool { return p.pods["a"] != nil && len(p.pods["a"].files) == 4 })

	n.stop()
	p.kill()
	n = startNode(t, dir, nil)
	n.untilListening("a")
	isCaptured(t, ns)
	dialProxy(t, dir, nil)
	n.agent.Apply([]mesh.Pod{word("a", false)})
	n.reports.until(t, "a", xds.Released)
	isClean(t, ns)
}

// What an agent that was killed has left half done, the next one puts right,
// without a word of control's.
func TestRulesAreMissingAtRestart(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, dir, nil)
	p := dialProxy(t, dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	n.stop()
	k, err := redirect.NewKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Remove(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	n = startNode(t, dir, nil)
	isCaptured(t, ns)
	p.disconnect()
	dialProxy(t, dir, p)
	n.untilState("a", "captured")
}

// The next sandbox of a pod may be there before the last one is deleted.
func TestSecondSandbox(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	dialProxy(t, n.dir, nil)
	old, oldPath := namespace(t, "old")
	ns, path := namespace(t, "new")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", oldPath)); err != nil {
		t.Fatal(err)
	}
	second := addOf("a", path)
	second.ContainerID = "box-second"
	if err := n.ask(second); err != nil {
		t.Fatal(err)
	}
	isClean(t, old)
	if err := n.ask(delOf("a")); err != nil {
		t.Fatal(err)
	}
	isCaptured(t, ns)
}

func TestSocketsAreHandedOut(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	p := dialProxy(t, n.dir, nil)
	_, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	for family, count := range map[int]int{4: 200, 6: 10} {
		if err := p.conn.Send(handle.Message{Kind: handle.Need, UID: "a", Family: family, Count: count}); err != nil {
			t.Fatal(err)
		}
	}
	p.until(t, "210 sockets", func() bool { return p.sockets["a"] == 210 })
}

// Ports of others' addresses are bound, and no more of them than are bounded: the proxy is a
// process that we do not trust.
func TestPrivilegedPortsAreBound(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	p := dialProxy(t, n.dir, nil)
	_, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	answers := 0
	ask := func(source string, times int) {
		t.Helper()
		for range times {
			if err := p.conn.Send(handle.Message{Kind: handle.Bind, UID: "a", Source: netip.MustParseAddrPort(source)}); err != nil {
				t.Fatal(err)
			}
		}
		answers += times
		p.until(t, "the answers", func() bool { return len(p.bound) == answers })
	}
	ask("10.9.9.9:20", 1)
	if !p.is(func() bool { return slices.Equal(p.at, []netip.AddrPort{netip.MustParseAddrPort("10.9.9.9:20")}) }) {
		t.Errorf("bound to %+v: want 10.9.9.9 port 20", p.at)
	}
	ask("10.9.9.9:1024", 1) // takes no privilege
	if m := p.bound[1]; m.Reason == "" || len(p.at) != 1 {
		t.Errorf("%+v, bound to %v: want a reason why not", m, p.at)
	}
	began := time.Now()
	ask("10.9.9.9:20", 4*bindRate)
	if got, most := len(p.at), bindRate*(2+int(time.Since(began)/time.Second)); got > most || got < 2 {
		t.Errorf("%d sockets bound in %v: want at most %d", got, time.Since(began), most)
	}
}

// A runtime sets the ports that a pod's programs get after the pod was captured. Control and the proxy are told.
func TestPortsOfThePodAreReported(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.CheckInterval = 10 * time.Millisecond })
	proxy := dialProxy(t, n.dir, nil)
	ns, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		ports  string
		marked bool
		told   [2]uint16
	}{{"1024 65535", true, [2]uint16{1024, 65535}}, {"32768 60999", false, [2]uint16{32768, 60999}}, {"61000 65535", true, [2]uint16{61000, 65535}}} {
		if err := ns.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(r.ports), 0) }); err != nil {
			t.Fatal(err)
		}
		n.reports.untilIs(t, "marked ports are reported for "+r.ports, func() bool {
			said := n.reports.last["a"]
			return said.State == xds.Captured && said.MarkedPorts == r.marked
		})
		proxy.until(t, "the proxy is told "+r.ports, func() bool { return proxy.ports == r.told })
	}
}

// Enrolling and leaving leaves nothing, here, in the proxy or in the kernel.
func TestManyCyclesLeaveNothing(t *testing.T) {
	const pods = 10
	n := startNode(t, t.TempDir(), func(c *Config) { c.Log = nil })
	p := dialProxy(t, n.dir, nil)
	var words []mesh.Pod
	spaces := map[string]*netns.NS{}
	for i := range pods {
		uid := fmt.Sprint("p", i)
		ns, path := namespace(t, uid)
		spaces[uid] = ns
		words = append(words, word(uid, false))
		n.agent.Apply(words)
		if err := n.ask(addOf(uid, path)); err != nil {
			t.Fatal(err)
		}
	}
	cycle := func() {
		for _, enroll := range []bool{true, false} {
			next := append([]mesh.Pod(nil), words...)
			for i := range next {
				next[i].Enroll = enroll
			}
			n.agent.Apply(next)
			var wg sync.WaitGroup
			for _, w := range next {
				want := map[bool]xds.PodState{true: xds.Captured, false: xds.Released}[enroll]
				wg.Go(func() { n.reports.until(t, w.UID, want) })
			}
			wg.Wait()
		}
	}
	cycle()
	files, routines := openFiles(t), runtime.NumGoroutine()
	for range cycles {
		cycle()
	}
	n.eventually("as many descriptors as before", func() bool { return openFiles(t) <= files })
	n.eventually("as many goroutines as before", func() bool { return runtime.NumGoroutine() <= routines })
	for _, ns := range spaces {
		isClean(t, ns)
	}
	p.until(t, "the proxy has nothing", func() bool { return len(p.pods) == 0 })
}

// A pod that was there before the agent, of which no runtime tells, is found by its
// processes, and forgotten like any other.
func TestRunningPodIsFound(t *testing.T) {
	const uid = "11111111-2222-3333-4444-555555555555"
	sandbox := strings.Repeat("a", 64)
	proc := t.TempDir()
	n := startNode(t, t.TempDir(), func(c *Config) { c.Proc = proc })
	p := dialProxy(t, n.dir, nil)
	n.agent.Apply([]mesh.Pod{word(uid, true)})
	ns, path := namespace(t, "a")
	putProcess(t, proc, 7, "/kubepods/besteffort/pod"+uid+"/"+sandbox, path)
	n.reports.until(t, uid, xds.Captured)
	if l := listening(t, ns); l != len(addresses()) {
		t.Errorf("%d sockets listen: want %d", l, len(addresses()))
	}
	if err := n.ask(cni.Request{Command: cni.Del, ContainerID: sandbox}); err != nil {
		t.Fatal(err)
	}
	p.until(t, "the proxy has let go", func() bool { return p.pods[uid] == nil })
}

// putProcess makes what is read of a process in proc.
func putProcess(t *testing.T, proc string, pid int, cgroup, netns string) {
	t.Helper()
	dir := filepath.Join(proc, fmt.Sprint(pid))
	stat := fmt.Sprintf("%d (pause) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0\n", pid, pid)
	err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "ns"), 0o755),
		os.WriteFile(filepath.Join(dir, "stat"), []byte(stat), 0o644),
		os.Symlink(netns, filepath.Join(dir, "ns/net")),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte("0::"+cgroup+"\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
}
