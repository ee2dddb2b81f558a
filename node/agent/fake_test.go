package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/cni"
	"tacit.dev/pod/netns"
	"tacit.dev/wire/handle"
	"tacit.dev/wire/xds"
)

const limit = 20 * time.Second

// A fakeProxy serves pods as the proxy does, but no connection.
type fakeProxy struct {
	conn *handle.Conn
	done chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed and made anew at each change
	pods    map[string]*fakePod
	sockets map[string]int
	ports   [2]uint16 // told last
	bound   []handle.Message
	at      []netip.AddrPort // to which the files of bound are bound
	refuse  bool             // say failed instead of ready
	linger  bool             // do not say drained
	yielded int
}

type fakePod struct {
	roles []handle.Role
	files []int
}

// dialProxy connects a proxy, which holds what an earlier one held.
func dialProxy(t testing.TB, dir string, before *fakeProxy) *fakeProxy {
	t.Helper()
	return dialProxyAt(t, filepath.Join(dir, "handle.sock"), before)
}

func dialProxyAt(t testing.TB, path string, before *fakeProxy) *fakeProxy {
	t.Helper()
	return newProxy().dial(t, path, before)
}

func newProxy() *fakeProxy {
	return &fakeProxy{done: make(chan struct{}), changed: make(chan struct{}), pods: map[string]*fakePod{}, sockets: map[string]int{}}
}

func (f *fakeProxy) dial(t testing.TB, path string, before *fakeProxy) *fakeProxy {
	t.Helper()
	var held []handle.HeldPod
	if before != nil {
		f.pods = before.pods
		for uid, p := range f.pods {
			held = append(held, handle.HeldPod{UID: uid, Roles: p.roles, Files: p.files})
		}
	}
	var err error
	if f.conn, err = handle.Dial(t.Context(), path, held...); err != nil {
		t.Fatal(err)
	}
	go f.serve()
	t.Cleanup(f.kill)
	return f
}

func (f *fakeProxy) serve() {
	defer close(f.done)
	for {
		m, files, err := f.conn.Receive()
		if err != nil {
			return
		}
		f.mu.Lock()
		answer := f.take(m, files)
		f.mu.Unlock()
		if answer.Kind != "" && f.conn.Send(answer) != nil {
			return
		}
	}
}

// take is called with the lock held.
func (f *fakeProxy) take(m handle.Message, files []int) (answer handle.Message) {
	defer func() { close(f.changed); f.changed = make(chan struct{}) }()
	answer.UID = m.UID
	switch m.Kind {
	case handle.Pod:
		if p := f.pods[m.UID]; p == nil || len(p.files) == 0 {
			f.pods[m.UID] = &fakePod{m.Roles, files}
		} else {
			closeFDs(files)
		}
		answer.Kind = handle.Ready
		if f.refuse {
			answer.Kind, answer.Reason = handle.Failed, "no certificate for you"
		}
	case handle.Drain:
		if !f.linger {
			f.drop(m.UID)
			answer.Kind = handle.Drained
		}
	case handle.Yield:
		closeFDs(f.pods[m.UID].files)
		f.pods[m.UID] = &fakePod{}
		f.yielded++
	case handle.Remove:
		f.drop(m.UID)
	case handle.Sockets:
		f.sockets[m.UID] += len(files)
		closeFDs(files)
	case handle.Ports:
		f.ports = m.Ports
	case handle.Bound:
		f.bound = append(f.bound, m)
		for _, fd := range files {
			if at, err := unix.Getsockname(fd); err == nil {
				in4 := at.(*unix.SockaddrInet4)
				f.at = append(f.at, netip.AddrPortFrom(netip.AddrFrom4(in4.Addr), uint16(in4.Port)))
			}
		}
		closeFDs(files)
	}
	return answer
}

func (f *fakeProxy) drop(uid string) {
	if p := f.pods[uid]; p != nil {
		closeFDs(p.files)
		delete(f.pods, uid)
	}
}

// disconnect ends the conversation and keeps the listeners.
func (f *fakeProxy) disconnect() {
	f.conn.Close()
	<-f.done
}

// kill ends the proxy and all that it had.
func (f *fakeProxy) kill() {
	f.disconnect()
	f.mu.Lock()
	defer f.mu.Unlock()
	for uid := range f.pods {
		f.drop(uid)
	}
}

// is tells whether something is so now.
func (f *fakeProxy) is(so func() bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return so()
}

// until waits for something to be so, with a bound.
func (f *fakeProxy) until(t testing.TB, what string, so func() bool) {
	t.Helper()
	timeout := time.After(limit)
	for {
		f.mu.Lock()
		ok, changed := so(), f.changed
		f.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// reports keeps what control is told.
type reports struct {
	mu      sync.Mutex
	changed chan struct{}
	last    map[string]xds.Report
	count   int
}

func newReports() *reports {
	return &reports{changed: make(chan struct{}), last: map[string]xds.Report{}}
}

func (r *reports) Report(x xds.Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[x.UID] = x
	r.count++
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *reports) until(t testing.TB, uid string, want xds.PodState) xds.Report {
	t.Helper()
	timeout := time.After(limit)
	for {
		r.mu.Lock()
		x, changed := r.last[uid], r.changed
		r.mu.Unlock()
		if x.State == want {
			return x
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("pod %s is reported %q (%s), want %q within %v", uid, x.State, x.Reason, want, limit)
		}
	}
}

// untilIs waits for something to be so, with a bound; so is called with the lock held.
func (r *reports) untilIs(t testing.TB, what string, so func() bool) {
	t.Helper()
	timeout := time.After(limit)
	for {
		r.mu.Lock()
		ok, changed := so(), r.changed
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// A node is an agent that runs, in a folder that outlives it.
type node struct {
	t       testing.TB
	dir     string
	agent   *Agent
	reports *reports
	reg     *prometheus.Registry
	stop    func()
}

// startNode starts an agent in dir, and waits until it acts; configure may be nil.
func startNode(t testing.TB, dir string, configure func(*Config)) *node {
	t.Helper()
	n := startWaiting(t, dir, configure)
	<-n.agent.Recovered()
	return n
}

// startWaiting starts an agent that may have to wait.
func startWaiting(t testing.TB, dir string, configure func(*Config)) *node {
	t.Helper()
	n := &node{t: t, dir: dir, reports: newReports(), reg: prometheus.NewRegistry()}
	cfg := Config{RunDir: dir, Reporter: n.reports, Registry: n.reg, CheckInterval: time.Hour, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if configure != nil {
		configure(&cfg)
	}
	var err error
	if n.agent, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.agent.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

// metric is the value of a metric without labels.
func (n *node) metric(name string) float64 {
	n.t.Helper()
	all, err := n.reg.Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	n.t.Fatalf("no metric %s", name)
	return 0
}

func (n *node) ask(r cni.Request) error {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	a, err := cni.Ask(ctx, filepath.Join(n.dir, "cni.sock"), r)
	if err != nil {
		n.t.Fatal(err)
	}
	if a.Error != nil {
		return a.Error
	}
	return nil
}

// namespace makes the network namespace of a pod, at a path as runtimes do.
func namespace(t testing.TB, name string) (*netns.NS, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tacit-agent-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	ns, err := netns.New(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		netns.Delete(path)
		os.Remove(dir)
	})
	return ns, path
}

func word(uid string, enroll bool) mesh.Pod {
	return mesh.Pod{
		UID: uid, Namespace: "default", Name: "pod-" + uid, Enroll: enroll,
		ID: mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "app"},
	}
}

func addOf(uid, path string) cni.Request {
	return cni.Request{
		Command: cni.Add, ContainerID: "box-" + uid, Netns: path, IfName: "eth0",
		Namespace: "default", Name: "pod-" + uid, UID: uid, Timeout: limit,
	}
}

func delOf(uid string) cni.Request {
	return cni.Request{Command: cni.Del, ContainerID: "box-" + uid}
}

// listening counts the sockets that listen in a namespace.
func listening(t testing.TB, ns *netns.NS) (n int) {
	t.Helper()
	for role, at := range addresses() {
		f, err := ns.Listen(at)
		if err == nil {
			f.Close()
			continue
		}
		if !isInUse(err) {
			t.Fatalf("%s: %v", role, err)
		}
		n++
	}
	return n
}

func openFiles(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// cookieOf names a socket, whoever has a descriptor of it.
func cookieOf(t testing.TB, f *os.File) string {
	t.Helper()
	fd, err := duplicate(f)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFDs([]int{fd})
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(c)
}
