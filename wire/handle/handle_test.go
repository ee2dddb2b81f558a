package handle

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

// pair is an agent's and a proxy's end.
func pair(t *testing.T, held ...HeldPod) (agent, proxy *Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "handle.sock")
	l, err := Listen(path, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if proxy, err = Dial(t.Context(), path, held...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	if agent, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Close() })
	agent.SetReadDeadline(time.Now().Add(5 * time.Second))
	proxy.SetReadDeadline(time.Now().Add(5 * time.Second))
	return agent, proxy
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func receive(t *testing.T, c *Conn) (Message, []int) {
	t.Helper()
	m, files, err := c.Receive()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll(files) })
	return m, files
}

func messages() []Message {
	return []Message{
		{Kind: Ready, UID: "a"},
		{Kind: Failed, UID: "a", Reason: "no certificate"},
		{Kind: Need, UID: "a", Family: 6, Count: 100},
		{Kind: Sockets, UID: "a", Family: 4, Reason: "none"},
		{Kind: Ports, UID: "a", Ports: [2]uint16{1024, 65535}},
		{Kind: Bind, UID: "a", Source: netip.MustParseAddrPort("10.0.0.1:20")},
		{Kind: Bound, UID: "a", Source: netip.MustParseAddrPort("[fd00::1]:20"), Reason: "in use"},
		{Kind: Drain, UID: "a"}, {Kind: Drained, UID: "a"}, {Kind: Remove, UID: "a"},
		{Kind: Yield, UID: "a"}, {Kind: Take}, {Kind: Done},
		{Kind: Pod, UID: "a", Pod: &PodInfo{
			UID: "a", Namespace: "ns", Name: "pod", ID: "spiffe://lab/ns/ns/sa/sa",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		}},
	}
}

func TestMessagesArrive(t *testing.T) {
	agent, proxy := pair(t)
	if m, _ := receive(t, agent); m.Kind != Hello {
		t.Fatalf("first message %q, want hello", m.Kind)
	}
	for _, want := range messages() {
		for _, way := range [][2]*Conn{{agent, proxy}, {proxy, agent}} {
			if err := way[0].Send(want); err != nil {
				t.Fatal(err)
			}
			got, _ := receive(t, way[1])
			if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); d != "" {
				t.Errorf("%s (-want +got):\n%s", want.Kind, d)
			}
		}
	}
	agent.Close()
	if _, _, err := proxy.Receive(); err != io.EOF {
		t.Errorf("after the peer's end: %v, want EOF", err)
	}
	proxy.Close()
	if _, _, err := proxy.Receive(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v, want ErrClosed", err)
	}
}

func TestFilesArrive(t *testing.T) {
	r, w := pipe(t)
	agent, _ := pair(t, HeldPod{UID: "a", Roles: []Role{Inbound4, Outbound6}, Files: []int{int(r.Fd()), int(w.Fd())}})
	m, files := receive(t, agent)
	if m.Kind != Held || len(m.Roles) != 2 || len(files) != 2 {
		t.Fatalf("got %+v with %d files", m, len(files))
	}
	if flags, err := unix.FcntlInt(uintptr(files[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: want close-on-exec", flags, err)
	}
	if _, err := unix.Write(files[1], []byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := r.Read(b); err != nil || b[0] != 'x' {
		t.Errorf("through the file that arrived: %q, %v", b, err)
	}
}

// What does not fit the protocol is refused, and no descriptor of it stays.
func TestWrongMessagesAreRefused(t *testing.T) {
	r, _ := pipe(t)
	many := make([]int, MaxFiles+1)
	for i := range many {
		many[i] = int(r.Fd())
	}
	for name, c := range map[string]struct {
		body  string
		files []int
	}{
		"no JSON":           {body: "hello"},
		"unknown kind":      {body: `{"kind":"open","uid":"a"}`},
		"no uid":            {body: `{"kind":"ready"}`},
		"given nothing":     {body: `{"kind":"given"}`},
		"files with none":   {body: `{"kind":"ready","uid":"a"}`, files: many[:1]},
		"too many files":    {body: fmt.Sprintf(`{"kind":"sockets","uid":"a","family":4,"count":%d}`, len(many)), files: many},
		"fewer files":       {body: `{"kind":"sockets","uid":"a","family":4,"count":2}`, files: many[:1]},
		"bind with a file":  {body: `{"kind":"bind","uid":"a","source":"10.0.0.1:20"}`, files: many[:1]},
		"bound twice":       {body: `{"kind":"bound","uid":"a","source":"10.0.0.1:20"}`, files: many[:2]},
		"no ports":          {body: `{"kind":"ports","uid":"a"}`},
		"ports reversed":    {body: `{"kind":"ports","uid":"a","ports":[2,1]}`},
		"bind nothing":      {body: `{"kind":"bind","uid":"a"}`},
		"bind any port":     {body: `{"kind":"bind","uid":"a","source":"10.0.0.1:0"}`},
		"bind any address":  {body: `{"kind":"bind","uid":"a","source":"0.0.0.0:20"}`},
		"bind loopback":     {body: `{"kind":"bind","uid":"a","source":"[::1]:20"}`},
		"bind mapped":       {body: `{"kind":"bind","uid":"a","source":"[::ffff:10.0.0.1]:20"}`},
		"no family":         {body: `{"kind":"need","uid":"a","count":2}`},
		"greedy":            {body: `{"kind":"need","uid":"a","family":4,"count":100000}`},
		"unknown role":      {body: `{"kind":"held","uid":"a","roles":["sideways"]}`, files: many[:1]},
		"role twice":        {body: `{"kind":"held","uid":"a","roles":["inbound4","inbound4"]}`, files: many[:2]},
		"pod without facts": {body: `{"kind":"pod","uid":"a"}`},
		"pod without id":    {body: `{"kind":"pod","uid":"a","pod":{"uid":"a"}}`},
		"mapped address":    {body: `{"kind":"pod","uid":"a","pod":{"uid":"a","id":"spiffe://a/ns/b/sa/c","addresses":["::ffff:1.2.3.4"]}}`},
		"too long":          {body: `{"kind":"ready","uid":"` + strings.Repeat("a", 2000) + `"}`},
		"far too long":      {body: `{"kind":"ready","uid":"` + strings.Repeat("a", MaxMessage) + `"}`},
	} {
		t.Run(name, func(t *testing.T) {
			agent, proxy := pair(t)
			receive(t, agent) // hello
			before, _ := os.ReadDir("/proc/self/fd")
			if _, _, err := proxy.unix.WriteMsgUnix([]byte(c.body), unix.UnixRights(c.files...), nil); err != nil {
				t.Fatal(err)
			}
			if m, files, err := agent.Receive(); err == nil {
				t.Errorf("received %+v with %d files", m, len(files))
			}
			if after, _ := os.ReadDir("/proc/self/fd"); len(after) > len(before) {
				t.Errorf("%d descriptors before, %d after", len(before), len(after))
			}
		})
	}
}

func TestSendRefusesWrongMessages(t *testing.T) {
	agent, _ := pair(t)
	for _, m := range []Message{{}, {Kind: Pod, UID: "a"}, {Kind: Sockets, UID: "a", Family: 4, Count: 1}} {
		if err := agent.Send(m); err == nil {
			t.Errorf("sent %+v", m)
		}
	}
}

func TestOnlyItsUserConnects(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handle.sock")
	for range 2 { // the second takes the first one's place
		l, err := Listen(path, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Mode().Perm(); got != 0o600 {
		t.Errorf("mode %o, want 600", got)
	}
	if os.Geteuid() != 0 {
		return
	}
	l, err := Listen(path, 65532)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if st, err = os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if got := st.Sys().(*syscall.Stat_t).Uid; got != 65532 {
		t.Errorf("owner %d, want 65532", got)
	}
}

func FuzzMessage(f *testing.F) {
	for _, m := range messages() {
		b, err := encode(m, 0)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 0)
	}
	f.Add([]byte(`{"kind":"held","uid":"a","roles":["outbound4","inbound6"]}`), 2)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := decode(b, files)
		if err != nil {
			return
		}
		again, err := encode(m, files)
		if err != nil {
			t.Fatalf("%+v was received, but cannot be sent: %v", m, err)
		}
		m2, err := decode(again, files)
		if d := cmp.Diff(m, m2, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}), cmpopts.EquateEmpty()); err != nil || d != "" {
			t.Fatalf("%v (-first +second):\n%s", err, d)
		}
	})
}
