package socket

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func senderTo(t *testing.T) (*Sender, *net.TCPConn, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); peer.Close() })
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	s := new(Sender)
	s.Bind(raw)
	return s, c.(*net.TCPConn), peer
}

// What TrySend could not write now, Send writes when the other end reads.
func TestSendWaits(t *testing.T) {
	s, _, peer := senderTo(t)
	var want []byte
	for piece := byte(0); ; piece++ {
		p := bytes.Repeat([]byte{piece}, 50_000)
		n, err := s.TrySend(p)
		want = append(want, p[:n]...)
		if err == unix.EAGAIN {
			break
		}
		if err != nil || n != len(p) {
			t.Fatalf("wrote %d of %d bytes, %v", n, len(p), err)
		}
	}
	more := bytes.Repeat([]byte("more"), 300_000)
	want = append(want, more...)
	got := make(chan []byte, 1)
	go func() {
		b := make([]byte, len(want))
		_, _ = io.ReadFull(peer, b)
		got <- b
	}()
	if n, err := s.Send(more); n != len(more) || err != nil {
		t.Fatalf("wrote %d of %d bytes, %v", n, len(more), err)
	}
	if !bytes.Equal(<-got, want) {
		t.Error("other bytes came")
	}
	if n, err := s.TrySend(nil); n != 0 || err != nil {
		t.Errorf("nothing to write: %d, %v", n, err)
	}
}

func TestSendFails(t *testing.T) {
	s, c, peer := senderTo(t)
	most := make([]byte, 1<<20)
	for {
		if _, err := s.TrySend(most); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := s.Send(most); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("to who does not read: %v", err)
	}
	c.SetWriteDeadline(time.Time{})
	peer.(*net.TCPConn).SetLinger(0)
	peer.Close()
	if _, err := s.Send(most); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("to who has reset it: %v", err)
	}
	if _, err := s.TrySend(most); !errors.Is(err, unix.EPIPE) {
		t.Errorf("again: %v", err)
	}
	c.Close()
	if _, err := s.Send(most); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
