package proxy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/identity"
	"tacit.dev/memory"
	"tacit.dev/mesh"
	"tacit.dev/wire/handle"
)

// childConfig is what a proxy in a process of its own is told on its standard input.
type childConfig struct {
	Handle    string
	Key, Cert []byte
	Workloads []*mesh.Workload
}

const childEnv = "TACIT_PROXY_CHILD"

// runChild is a proxy alone in its process, until its standard input ends.
func runChild() error {
	var c childConfig
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return err
	}
	key, err := x509.ParseECPrivateKey(c.Key)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(c.Cert)
	if err != nil {
		return err
	}
	keeper := identity.NewKeeper(identity.KeeperConfig{Signer: &testCA{key: key, cert: cert, life: time.Hour}})
	p, err := New(Config{Handle: c.Handle, Leaves: keeper, TLS: identity.NewTLS(identity.TLSConfig{})})
	if err != nil {
		return err
	}
	p.Apply(mesh.Changes{Workloads: c.Workloads})
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); cancel() }()
	go keeper.Run(ctx)
	go memory.Run(ctx, memory.Config{Every: time.Second})
	return p.Run(ctx)
}

// child starts a proxy of its own for p, and returns its process.
func (c *cluster) child(p *testPod) int {
	c.t.Helper()
	path := filepath.Join(c.t.TempDir(), "child.sock")
	agent := c.startAgent(path)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { in.Close(); cmd.Wait() })
	key, _ := x509.MarshalECPrivateKey(c.ca.key)
	cfg := childConfig{Handle: path, Key: key, Cert: c.ca.cert.Raw}
	for _, p := range c.pods {
		cfg.Workloads = append(cfg.Workloads, p.wl)
	}
	if err := json.NewEncoder(in).Encode(cfg); err != nil {
		c.t.Fatal(err)
	}
	p.listen()
	agent.add(p)
	agent.expect(c.t, handle.Ready, p.name)
	p.capture("capture.nft")
	return cmd.Process.Pid
}

// rss is what a process has in memory, in kB.
func rss(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// needDescriptors raises the limit of open files, of this process and of its children.
func needDescriptors(t *testing.T, n uint64) {
	t.Helper()
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		t.Fatal(err)
	}
	if r.Cur >= n {
		return
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: max(n, r.Max)}); err != nil {
		t.Fatalf("%d open files (needs root beyond %d): %v", n, r.Max, err)
	}
}

// A connection that has become quiet costs a proxy at most 10 kB, an idle proxy 20 MB in all.
func TestQuietConnectionsAreSmall(t *testing.T) {
	if raceEnabled {
		return // the race detector's own memory is not of interest
	}
	many, _ := strconv.Atoi(os.Getenv("TACIT_QUIET"))
	many = max(many, 1500)
	needDescriptors(t, uint64(3*many+500))
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	client.wl.Direct, server.wl.Direct = true, true
	pids := []int{c.child(client), c.child(server)}
	server.serve(1, echo)
	var idle []int
	for _, pid := range pids {
		idle = append(idle, rss(t, pid))
	}
	var open []*net.TCPConn
	for range many {
		conn := mustDial(t, client, server.at(false, 1))
		say(t, conn, "hello")
		conn.SetDeadline(time.Time{})
		open = append(open, conn)
	}
	for i, name := range []string{"client", "server"} {
		full := 0
		await(t, fmt.Sprintf("%s's proxy has at most 20 MB and 10 kB for each of %d quiet connections", name, many), func() bool {
			full = rss(t, pids[i])
			return full <= 20_000+10*many
		})
		t.Logf("%s's proxy: %d kB idle, %.1f kB per connection", name, idle[i], float64(full-idle[i])/float64(many))
	}
	open[0].SetDeadline(time.Now().Add(limit))
	say(t, open[0], "still there")
}

// A peer that says the start of a ClientHello and no more is waited for, and costs no more
// than a connection that is quiet: what it has said stays in the kernel.
func TestSilentConnectionsAreSmall(t *testing.T) {
	if raceEnabled {
		return // the race detector's own memory is not of interest
	}
	many, _ := strconv.Atoi(os.Getenv("TACIT_QUIET"))
	many = max(many, 1500)
	needDescriptors(t, uint64(4*many+500))
	c := newCluster(t)
	stranger, server := c.pod("stranger"), c.pod("server")
	server.wl.Direct = true
	pid := c.child(server)
	app := server.serve(1, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	idle := rss(t, pid)
	hello := make([]byte, 15<<10)
	copy(hello, []byte{22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb})
	var open []*net.TCPConn
	for i := range many {
		conn, err := stranger.bare(uint16(mesh.DirectPortFirst+i), server.at(false, 1))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(hello); err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
	}
	await(t, "the application has them all", func() bool { return len(app.seen) == many })
	full := rss(t, pid)
	t.Logf("%d kB idle, %.1f kB per connection", idle, float64(full-idle)/float64(many))
	if full > 20_000+25*many {
		t.Errorf("%d kB with %d silent connections: want at most 20 MB and 25 kB each", full, many)
	}
	for _, conn := range open {
		conn.Close()
	}
}

// What a burst has taken is given back when it is over: of all that came at once, nothing stays
// but what the runtime needs to do it again.
func TestABurstIsGivenBack(t *testing.T) {
	const many, room = 2000, 25_000
	if raceEnabled {
		return // the race detector's own memory is not of interest
	}
	needDescriptors(t, 3*many)
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	client.wl.Direct, server.wl.Direct = true, true
	pids := []int{c.child(client), c.child(server)}
	app := server.serve(1, echo)
	if err := askOnce(client, server.at(false, 1)); err != nil {
		t.Fatal(err)
	}
	both := func() (all [2]int) { return [2]int{rss(t, pids[0]), rss(t, pids[1])} }
	before := both()
	var open []*net.TCPConn
	for range many {
		open = append(open, mustDial(t, client, server.at(false, 1)))
	}
	await(t, "all are open at once", func() bool { return len(app.seen) == many+1 })
	full := both()
	var wg sync.WaitGroup
	for _, conn := range open {
		wg.Go(func() {
			if err := ask(conn); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var after [2]int
	defer func() { t.Logf("kB of the two proxies: %v before, %v in a burst, %v after", before, full, after) }()
	await(t, "the memory is given back", func() bool {
		after = both()
		return after[0] < before[0]+room && after[1] < before[1]+room
	})
	if full[0] < before[0]+room || full[1] < before[1]+room {
		t.Errorf("%v kB in the burst: it took too little to show anything", full)
	}
}
