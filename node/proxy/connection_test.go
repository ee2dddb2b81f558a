package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// pair is a client and a server on two nodes, both in the mesh.
func pair(t testing.TB) (c *cluster, client, server *testPod) {
	c = newCluster(t)
	client, server = c.pod("client"), c.pod("server")
	n1, n2 := c.node(nil), c.node(nil)
	n1.enroll(client)
	n2.enroll(server)
	return c, client, server
}

func both(t *testing.T, f func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6], func(t *testing.T) { f(t, v6) })
	}
}

func echo(c *net.TCPConn) { io.Copy(c, c); c.CloseWrite() }

// firstRead is the error of dialling, or else of the first read. A reset may
// come so soon that the dial has it already.
func firstRead(c *net.TCPConn, err error) error {
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Read(make([]byte, 1))
	return err
}

// say sends and expects the same back.
func say(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatalf("write: %v", err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q, %v: want %q", b, err, text)
	}
}

func mustDial(t testing.TB, p *testPod, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := p.dial(to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTwoPodsSpeakMutualTLS(t *testing.T) {
	c, client, server := pair(t)
	app := server.serve(8080, echo)
	both(t, func(t *testing.T, v6 bool) {
		conn := mustDial(t, client, server.at(v6, 8080))
		say(t, conn, "hello")
		if from := <-app.seen; from.Addr() != client.addr(v6) {
			t.Errorf("the application saw %s: want the client's own %s", from, client.addr(v6))
		}
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
			t.Errorf("after FIN: %q, %v", b, err)
		}
	})
	for i, d := range []string{"outbound", "inbound"} {
		await(t, d+" connections ended", func() bool {
			return c.nodes[i].count("tacit_connections_open", "direction="+d) == 0
		})
		if n := c.nodes[i].count("tacit_connections_total", "direction="+d, "kind=mutual_tls"); n != 2 {
			t.Errorf("%v %s connections with mutual TLS: want 2", n, d)
		}
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	_, client, server := pair(t)
	server.serve(25, func(c *net.TCPConn) { c.Write([]byte("220 hello")) })
	both(t, func(t *testing.T, v6 bool) {
		b, err := io.ReadAll(mustDial(t, client, server.at(v6, 25)))
		if err != nil || string(b) != "220 hello" {
			t.Errorf("read %q, %v", b, err)
		}
	})
}

func TestHalfCloseThenDataTheOtherWay(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, func(c *net.TCPConn) { // the client ends first
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "got %d", len(b))
	})
	got := make(chan string, 2)
	server.serve(2, func(c *net.TCPConn) { // the server ends first
		c.CloseWrite()
		b, err := io.ReadAll(c)
		got <- fmt.Sprintf("%s %v", b, err)
	})
	both(t, func(t *testing.T, v6 bool) {
		c := mustDial(t, client, server.at(v6, 1))
		c.Write(make([]byte, 100_000))
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "got 100000" {
			t.Errorf("client half-closed: %q, %v", b, err)
		}
		c = mustDial(t, client, server.at(v6, 2))
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Errorf("server half-closed: %q, %v", b, err)
		}
		c.Write([]byte("still here"))
		c.Close()
		if s := <-got; s != "still here <nil>" {
			t.Errorf("server got %q", s)
		}
	})
}

func TestResetIsReset(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, func(c *net.TCPConn) { io.ReadFull(c, make([]byte, 1)); c.SetLinger(0) })
	arrived, got := make(chan struct{}, 2), make(chan error, 2)
	server.serve(2, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		arrived <- struct{}{}
		_, err := c.Read(make([]byte, 1))
		got <- err
	})
	both(t, func(t *testing.T, v6 bool) {
		conn := mustDial(t, client, server.at(v6, 1))
		conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 1)); !isRST(err) {
			t.Errorf("server reset, client read %v", err)
		}
		conn = mustDial(t, client, server.at(v6, 2))
		conn.Write([]byte("x"))
		conn.SetLinger(0)
		<-arrived
		conn.Close()
		if err := <-got; !isRST(err) {
			t.Errorf("client reset, server read %v", err)
		}
	})
}

func TestClosedPortIsReset(t *testing.T) {
	c, client, server := pair(t)
	both(t, func(t *testing.T, v6 bool) {
		quickest := time.Hour // a busy machine can delay one, but not each time
		for range 3 {
			start := time.Now()
			if err := firstRead(client.dial(server.at(v6, 9))); !isRST(err) {
				t.Error(err)
			}
			quickest = min(quickest, time.Since(start))
		}
		if quickest > time.Second {
			t.Errorf("after %v at best", quickest)
		}
	})
	for i, d := range []string{"outbound", "inbound"} {
		await(t, "all six are counted as refused "+d, func() bool {
			return c.nodes[i].count("tacit_refused_connections_total", "direction="+d, "reason=connection_refused") == 6
		})
	}
}

func TestBulkBothWaysAtOnce(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, echo)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	both(t, func(t *testing.T, v6 bool) {
		c := mustDial(t, client, server.at(v6, 1))
		var wg sync.WaitGroup
		wg.Go(func() { c.Write(data); c.CloseWrite() })
		b, err := io.ReadAll(c)
		wg.Wait()
		if err != nil || !bytes.Equal(b, data) {
			t.Errorf("%d bytes, %v: want %d", len(b), err, len(data))
		}
	})
}

func TestWrongIdentityIsRefused(t *testing.T) {
	c, client, server := pair(t)
	server.serve(8080, echo)
	for _, row := range []struct {
		name string
		pod  *testPod
		node int
		side string
		want string
	}{
		{"the server is not who the World says", server, 0, "outbound", "wrong_identity"},
		{"the client is not who the World says", client, 1, "inbound", "wrong_identity"},
	} {
		t.Run(row.name, func(t *testing.T) {
			right := row.pod.wl.ID
			row.pod.wl.ID = idOf("somebody")
			c.publish()
			conn, err := client.dial(server.at(false, 8080))
			if err == nil {
				_, err = conn.Write([]byte("secret")) // a reset is told once: here, if it is there already
			}
			if err := firstRead(conn, err); !isRST(err) {
				t.Errorf("%v: want a reset", err)
			}
			await(t, "it is counted", func() bool {
				return c.nodes[row.node].count("tacit_refused_connections_total", "direction="+row.side, "reason="+row.want) == 1
			})
			row.pod.wl.ID = right
			c.publish()
			say(t, mustDial(t, client, server.at(false, 8080)), "right again")
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	c := newCluster(t)
	client, server := c.pod("client"), c.pod("server")
	patient := func(cfg *Config) { cfg.DialTimeout, cfg.HandshakeTimeout = 4*limit, 4*limit }
	n1, n2 := c.node(patient), c.node(patient)
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	const many = 300
	var wg sync.WaitGroup
	errs := make(chan error, many)
	for i := range many {
		wg.Go(func() { errs <- askOnce(client, server.at(i%2 == 0, 1)) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

// askOnce is a whole connection: a question, its echo, the end.
func askOnce(p *testPod, to netip.AddrPort) error {
	c, err := p.dial(to)
	if err != nil {
		return err
	}
	return ask(c)
}

// ask says something to an echo, reads the answer to its end, and closes c.
func ask(c *net.TCPConn) error {
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("read %q", b)
	}
	return err
}
