package xds

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// names is a name server on loopback, for a single name.
type names struct {
	conn net.PacketConn

	mu sync.Mutex // guards is
	is netip.Addr // what it answers; it is silent if this is not valid
}

func startNames(t *testing.T) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &names{conn: conn}
	ended := make(chan struct{})
	go n.answerLoop(ended)
	t.Cleanup(func() { conn.Close(); <-ended })
	return n
}

func (n *names) set(is netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.is = is
}

func (n *names) answerLoop(ended chan<- struct{}) {
	defer close(ended)
	b := make([]byte, 1024)
	for {
		size, from, err := n.conn.ReadFrom(b)
		if err != nil {
			return
		}
		n.mu.Lock()
		is := n.is
		n.mu.Unlock()
		if is.IsValid() {
			n.conn.WriteTo(reply(b[:size], is), from)
		}
	}
}

// reply makes a response of RFC 1035 §4.1 to a query: of type A it has the address,
// of any other nothing.
func reply(query []byte, is netip.Addr) []byte {
	end := 12
	for query[end] != 0 {
		end += int(query[end]) + 1
	}
	isA := query[end+2] == 1
	end += 5 // the root label, type and class
	b := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, query[12:end]...)
	if isA {
		b[7] = 1
		b = append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
		b = append(b, is.AsSlice()...)
	}
	return b
}

// Control is found where it was last while its name leads nowhere, and where its name
// leads when it does.
func TestControlIsFoundWithoutNames(t *testing.T) {
	n := startNames(t)
	f := newFinder("")
	f.dialer.Resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", n.conn.LocalAddr().String())
	}}
	lis, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	_, port, _ := net.SplitHostPort(lis.Addr().String())
	first, second, nowhere := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.Addr{}
	for _, step := range []struct {
		what     string
		is       netip.Addr
		patience time.Duration
		want     netip.Addr
	}{
		{"named", first, time.Minute, first},
		{"silence", nowhere, 50 * time.Millisecond, first},
		{"named elsewhere", second, time.Minute, second},
		{"silence again", nowhere, 50 * time.Millisecond, second},
	} {
		n.set(step.is)
		f.patience = step.patience
		conn, err := f.dial(t.Context(), "control.test.:"+port)
		if err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		if got := conn.RemoteAddr().(*net.TCPAddr).IP.String(); got != step.want.String() {
			t.Errorf("%s: found at %s, want %s", step.what, got, step.want)
		}
		conn.Close()
	}
}

// While every node waits for its agent nothing answers names: control is found by the address of its
// Service, and by its name as soon as that leads anywhere.
func TestControlIsFoundBeforeThereAreNames(t *testing.T) {
	n := startNames(t)
	lis, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	_, port, _ := net.SplitHostPort(lis.Addr().String())
	f := newFinder("127.0.0.3:" + port)
	f.patience = 50 * time.Millisecond
	f.dialer.Resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", n.conn.LocalAddr().String())
	}}
	for _, want := range []string{"127.0.0.3", "127.0.0.1"} {
		conn, err := f.dial(t.Context(), "control.test.:"+port)
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.RemoteAddr().(*net.TCPAddr).IP.String(); got != want {
			t.Errorf("found at %s, want %s", got, want)
		}
		conn.Close()
		n.set(netip.MustParseAddr("127.0.0.1"))
		f.patience = time.Minute
	}
}
