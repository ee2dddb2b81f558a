package proxy

import (
	"bytes"
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

// The largest connections go first, and those of the pod that holds most: one that holds
// little loses none.
func TestExcess(t *testing.T) {
	hog, other := &pod{uid: "hog"}, &pod{uid: "other"}
	of := func(d *pod, bytes ...int64) (all []*queued) {
		for _, n := range bytes {
			all = append(all, &queued{d: d, bytes: n})
		}
		return all
	}
	for _, row := range []struct {
		hog, other []int64
		excess     int64
		want       []int64
	}{
		{[]int64{1, 5, 3}, []int64{4}, 1, []int64{5}},
		{[]int64{1, 5, 3}, []int64{4}, 5, []int64{5}},
		{[]int64{5, 5, 5, 5}, []int64{9}, 7, []int64{5, 5}},
		{[]int64{5, 5, 5, 5}, []int64{9}, 14, []int64{5, 5, 5}},
		{[]int64{5, 5}, []int64{9}, 7, []int64{5, 9}}, // the other one holds most by then
		{[]int64{2}, nil, 2, []int64{2}},
	} {
		var got []int64
		for _, c := range excess(slices.Concat(of(hog, row.hog...), of(other, row.other...)), row.excess) {
			got = append(got, c.bytes)
		}
		if !slices.Equal(got, row.want) {
			t.Errorf("of %v and %v, %d too much: %v go, want %v", row.hog, row.other, row.excess, got, row.want)
		}
	}
}

// stall sends until nothing goes out any more, and returns how much did.
func stall(t *testing.T, c *net.TCPConn) (sent int) {
	t.Helper()
	b := make([]byte, 64<<10)
	for {
		c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := c.Write(b)
		sent += n
		if errors.Is(err, os.ErrDeadlineExceeded) && n == 0 {
			return sent
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %d bytes: %v", sent, err)
			return sent
		}
	}
}

// A server that does not read has its proxy hold little of what it is sent: the socket to it
// takes no more than it should, however much the kernel would let it.
func TestUnsentBytesAreBounded(t *testing.T) {
	_, client, server := pair(t)
	server.serve(1, func(*net.TCPConn) { <-t.Context().Done() })
	c := mustDial(t, client, server.at(false, 1))
	defer c.Close()
	stall(t, c)
	for _, q := range server.node.proxy.queues.list(nil) {
		// One write more may go in, and the kernel's own overhead.
		if n := socketMemory(q.far.Load()); n < unsentMost/2 || n > 2*unsentMost {
			t.Errorf("%d bytes wait in the socket to the server: want about %d", n, unsentMost)
		}
	}
}

// What waits for servers that do not read is bounded: the largest connections of the pod that
// holds most are reset, and no other pod notices.
func TestTooManyQueuedBytesAreReset(t *testing.T) {
	const most = 12 << 20
	c := newCluster(t)
	hog, client, server := c.pod("hog"), c.pod("client"), c.pod("server")
	n1, n2 := c.node(func(c *Config) { c.MaxQueued = most }), c.node(nil)
	n1.enroll(hog)
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, func(*net.TCPConn) { <-t.Context().Done() })
	server.serve(2, echo)
	lively, small := mustDial(t, client, server.at(false, 2)), mustDial(t, client, server.at(false, 1))
	say(t, lively, "before")
	small.Write(make([]byte, 64<<10))
	broken := make(chan error)
	for range 20 {
		conn := mustDial(t, hog, server.at(false, 1))
		go func() {
			var err error
			for b := make([]byte, 64<<10); err == nil; {
				_, err = conn.Write(b)
			}
			broken <- err
		}()
	}
	await(t, "connections are reset", func() bool { return n1.count("tacit_queued_resets_total") > 0 })
	if err := <-broken; !isRST(err) {
		t.Errorf("a connection that was too large ended with %v: want a reset", err)
	}
	await(t, "few bytes wait", func() bool {
		n := n1.count("tacit_queued_bytes")
		return n > 0 && n <= most
	})
	say(t, lively, "after")
	if _, err := small.Write(make([]byte, 1)); err != nil {
		t.Errorf("a pod that holds little: %v", err)
	}
	if !bytes.Contains([]byte(c.log.text()), []byte("--max-queued")) {
		t.Error("the access log does not say why")
	}
	hog.node.stop()
	for range 19 {
		<-broken
	}
}

// A reset reaches the other end though nobody reads there: the bytes that wait for it are let go.
func TestResetOfAStalledConnection(t *testing.T) {
	_, client, server := pair(t)
	over := make(chan error, 1)
	server.serve(1, func(c *net.TCPConn) {
		raw, err := c.SyscallConn()
		if err == nil {
			err = raw.Read(func(fd uintptr) bool { return hasFailed(c) })
		}
		over <- err
	})
	c := mustDial(t, client, server.at(false, 1))
	stall(t, c)
	c.SetLinger(0)
	c.Close()
	if err := <-over; err != nil {
		t.Errorf("the server was not told of the reset: %v", err)
	}
	for _, n := range []*node{client.node, server.node} {
		await(t, "nothing waits", func() bool { return n.count("tacit_queued_bytes") == 0 })
	}
}
