package agent

import (
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/wire/handle"
)

// stubborn is a socket whose last close waits for a minute: what was written has not been read,
// and SO_LINGER says to wait for that.
func stubborn(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a := l.Addr().(*net.TCPAddr)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())}); err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(fd, true)
	for err = nil; err == nil; {
		_, err = unix.Write(fd, make([]byte, 1<<20))
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 60}); err != nil {
		t.Fatal(err)
	}
	return fd
}

// within fails if f takes longer than it may.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(d):
		t.Fatalf("%s takes more than %v", what, d)
	}
}

// say sends a message as it is, and closes its files.
func say(t *testing.T, c *net.UnixConn, text string, files ...int) {
	t.Helper()
	if _, _, err := c.WriteMsgUnix([]byte(text), unix.UnixRights(files...), nil); err != nil {
		t.Fatal(err)
	}
	closeFDs(files)
}

func dialRaw(t *testing.T, n *node) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(n.dir, "handle.sock"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A proxy is worth what reads the network is worth: whatever descriptors it gives back, the
// agent goes on for everybody, and keeps none.
func TestHostileDescriptorsStopNothing(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	_, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	uids := []string{"nobody", "a"}
	var files []int
	for range 2 * len(uids) {
		files = append(files, stubborn(t))
	}
	before := openFiles(t) - len(files)
	c := dialRaw(t, n)
	for i, uid := range uids {
		pipe := make([]int, 2)
		if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		say(t, c, `{"kind":"held","uid":"`+uid+`","roles":["outbound4","outbound6","inbound4","inbound6"]}`,
			files[2*i], files[2*i+1], pipe[0], pipe[1])
	}
	say(t, c, `{"kind":"hello"}`)
	within(t, 5*time.Second, "to be heard", func() {
		for n.metric("tacit_agent_proxy_connected") == 0 {
			runtime.Gosched()
		}
		n.agent.Dump()
	})
	c.Close()
	within(t, 5*time.Second, "to be forgotten", func() {
		for n.metric("tacit_agent_proxy_connected") == 1 || openFiles(t) > before {
			runtime.Gosched()
		}
	})
	dialProxy(t, n.dir, nil)
	if err := n.ask(addOf("a", path)); err != nil {
		t.Error(err)
	}
}

// A listener of another port, or of another namespace, is none: the agent opens its own.
func TestForeignListenersAreNotTaken(t *testing.T) {
	n := startNode(t, t.TempDir(), nil)
	ns, path := namespace(t, "a")
	other, _ := namespace(t, "b")
	at := addresses()
	var files []int
	for _, l := range []struct {
		ns   *netns.NS
		role handle.Role
	}{{other, handle.Outbound4}, {ns, handle.Inbound6}} {
		f, err := l.ns.Listen(at[l.role])
		if err != nil {
			t.Fatal(err)
		}
		fd, err := duplicate(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		files = append(files, fd)
	}
	c := dialRaw(t, n)
	say(t, c, `{"kind":"held","uid":"a","roles":["outbound4","inbound4"]}`, files...)
	say(t, c, `{"kind":"hello"}`)
	n.agent.Apply([]mesh.Pod{word("a", true)})
	asked := make(chan error, 1)
	go func() { asked <- n.ask(addOf("a", path)) }()
	for { // what the proxy is given
		b, oob := make([]byte, handle.MaxMessage), make([]byte, unix.CmsgSpace(1024))
		c.SetReadDeadline(time.Now().Add(limit))
		k, oobn, _, _, err := c.ReadMsgUnix(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b[:k]), `"kind":"pod"`) {
			continue
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			t.Fatalf("no files: %v", err)
		}
		given, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(given) != 4 {
			t.Fatalf("%d files, %v: want 4", len(given), err)
		}
		defer closeFDs(given)
		break
	}
	if got := listening(t, ns); got != 4 {
		t.Errorf("%d listeners in the pod: want 4", got)
	}
	say(t, c, `{"kind":"ready","uid":"a"}`)
	if err := <-asked; err != nil {
		t.Error(err)
	}
}

// A proxy that asks and does not read costs the agent a bounded number of descriptors.
func TestDeafProxyCostsLittle(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.Log = nil })
	p := dialProxy(t, n.dir, nil)
	_, path := namespace(t, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		t.Fatal(err)
	}
	p.kill()
	before := openFiles(t)
	c := dialRaw(t, n)
	say(t, c, `{"kind":"hello"}`)
	most := 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		c.SetWriteDeadline(end)
		if _, err := c.Write([]byte(`{"kind":"need","uid":"a","family":4,"count":1024}`)); err != nil {
			break
		}
		most = max(most, openFiles(t)-before)
	}
	if most > maxWaiting+handle.MaxFiles+50 {
		t.Errorf("%d descriptors: want at most %d or so", most, maxWaiting)
	}
}

// Before its hello a proxy says what it holds, and no more than a node may have.
func TestEndlessHeldIsTurnedAway(t *testing.T) {
	n := startNode(t, t.TempDir(), func(c *Config) { c.Log = nil })
	held := make([]handle.HeldPod, 2*maxHeld)
	for i := range held {
		held[i].UID = strings.Repeat("u", 1+i%1000)
	}
	within(t, limit, "to be turned away", func() {
		c, err := handle.Dial(t.Context(), filepath.Join(n.dir, "handle.sock"), held...)
		if err != nil {
			return
		}
		defer c.Close()
		if _, _, err := c.Receive(); err == nil {
			t.Error("it was let in")
		}
	})
}
