package proxy

import (
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// sendUrgent sends parts, each of which ends with an urgent byte, but for the last.
func sendUrgent(t *testing.T, c *net.TCPConn, parts ...string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range parts {
		flags := unix.MSG_NOSIGNAL
		if i < len(parts)-1 {
			flags |= unix.MSG_OOB
		}
		var n int
		if err := raw.Control(func(fd uintptr) { n, err = unix.SendmsgN(int(fd), []byte(part), nil, nil, flags) }); err != nil || n != len(part) {
			t.Fatalf("send %q: %d bytes, %v", part, n, err)
		}
	}
}

// urgentServer waits for the end of input, and then says what it read and which urgent
// byte it got apart.
func urgentServer(inline bool) func(c *net.TCPConn) {
	return func(c *net.TCPConn) {
		raw, err := c.SyscallConn()
		if err != nil {
			return
		}
		var apart [1]byte
		n := 0
		raw.Control(func(fd uintptr) {
			if inline {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
			}
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, int(limit.Milliseconds()))
			n, _, _ = unix.Recvfrom(int(fd), apart[:], unix.MSG_OOB|unix.MSG_DONTWAIT)
		})
		b, err := io.ReadAll(c)
		fmt.Fprintf(c, "%q, apart %q, %v", b, apart[:max(n, 0)], err)
	}
}

// Over TLS an urgent byte is one of the stream, to whoever asks for it apart too; elsewhere
// it stays urgent. It is lost nowhere, and nothing behind it is.
func TestUrgentBytes(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	plainClient, plainServer := c.pod("plain-client"), c.pod("plain-server")
	n1, n2 := c.node(nil), c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
	for _, p := range []*testPod{server, plainServer} {
		p.serve(7130, urgentServer(false))
		p.serve(7131, urgentServer(true))
	}
	for _, way := range []struct {
		name     string
		from, to *testPod
		tls      bool
	}{
		{"TLS", client, server, true},
		{"plaintext outbound", client, plainServer, false},
		{"plaintext inbound", plainClient, server, false},
		{"no mesh", plainClient, plainServer, false},
	} {
		for _, row := range []struct {
			name           string
			parts          []string
			all, but, last string // all of it, and what is read without the urgent byte that is last
		}{
			{"first", []string{"!", "abc"}, "!abc", "abc", "!"},
			{"in the middle", []string{"abc!", "def"}, "abc!def", "abcdef", "!"},
			{"last", []string{"abc!", ""}, "abc!", "abc", "!"},
			{"two in a row", []string{"abc!", "?", "def"}, "abc!?def", "abc!def", "?"},
		} {
			t.Run(way.name+"/"+row.name, func(t *testing.T) {
				for port, want := range map[uint16]string{
					7130: fmt.Sprintf("%q, apart %q, <nil>", row.but, row.last),
					7131: fmt.Sprintf("%q, apart %q, <nil>", row.all, ""),
				} {
					if way.tls {
						want = fmt.Sprintf("%q, apart %q, <nil>", row.all, "")
					}
					conn := mustDial(t, way.from, way.to.at(false, port))
					sendUrgent(t, conn, row.parts...)
					conn.CloseWrite()
					if b, err := io.ReadAll(conn); err != nil || string(b) != want {
						t.Errorf("port %d: the server got %s (%v), want %s", port, b, err, want)
					}
				}
			})
		}
	}
}

// Two urgent bytes come before the proxy has looked at the connection.
func TestUrgentBytesAtOnce(t *testing.T) {
	_, client, server := pair(t)
	server.serve(7130, urgentServer(false))
	for range 20 {
		conn := mustDial(t, client, server.at(false, 7130))
		sendUrgent(t, conn, "!", "?", "abc")
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || string(b) != `"!?abc", apart "", <nil>` {
			t.Fatalf("the server got %s (%v)", b, err)
		}
	}
}
