package xds

import (
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
)

// busyHandshake computes, waits for a byte of its peer, and computes again.
type busyHandshake struct {
	credentials.TransportCredentials
	now, most *atomic.Int32
}

func (b busyHandshake) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	b.compute()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return nil, nil, err
	}
	b.compute()
	return c, nil, nil
}

func (b busyHandshake) compute() {
	n := b.now.Add(1)
	for most := b.most.Load(); n > most && !b.most.CompareAndSwap(most, n); most = b.most.Load() {
	}
	for range 100 {
		runtime.Gosched()
	}
	b.now.Add(-1)
}

// Few handshakes compute at once, and one whose peer says nothing holds up no other.
func TestHandshakesTakeTurns(t *testing.T) {
	var now, most atomic.Int32
	s := turns{busyHandshake{nil, &now, &most}, make(chan struct{}, 2)}
	var silent, all sync.WaitGroup
	var peers []net.Conn
	for range 10 {
		ours, theirs := net.Pipe()
		peers = append(peers, theirs)
		silent.Go(func() { s.ServerHandshake(ours) })
	}
	for range 100 {
		ours, theirs := net.Pipe()
		all.Go(func() {
			if _, _, err := s.ServerHandshake(ours); err != nil {
				t.Error(err)
			}
		})
		all.Go(func() { theirs.Write([]byte{1}) })
	}
	all.Wait()
	if n := most.Load(); n > 2 {
		t.Errorf("%d handshakes have computed at once", n)
	}
	for _, c := range peers {
		c.Close()
	}
	silent.Wait()
}

// After its handshake a connection waits for nobody.
func TestHandshakesEnd(t *testing.T) {
	p := newPKI(t)
	s := turns{credentials.NewTLS(p.conf), make(chan struct{}, 1)}
	ours, theirs := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	ours.SetDeadline(deadline)
	theirs.SetDeadline(deadline)
	client := tls.Client(theirs, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	var said sync.WaitGroup
	defer said.Wait()
	said.Go(func() {
		if _, err := client.Write([]byte("hello")); err != nil {
			t.Error(err)
		}
	})
	c, _, err := s.ServerHandshake(ours)
	if err != nil {
		t.Fatal(err)
	}
	s.computing <- struct{}{} // somebody else has the only turn
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}
