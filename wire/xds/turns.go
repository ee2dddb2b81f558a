package xds

import (
	"net"
	"runtime"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
)

// turns has few TLS handshakes compute at once. When a thousand nodes come back, all of their
// handshakes would else be nearly done when all of them give up, and whatever has to be done in
// time would wait for a round of all: the renewal of the Lease above all. Nobody else waits for
// a peer that is slow: it has a turn only while we compute.
type turns struct {
	credentials.TransportCredentials
	// computing has one for each.
	computing chan struct{}
}

func newTurns(c credentials.TransportCredentials) turns {
	return turns{c, make(chan struct{}, 2*runtime.GOMAXPROCS(0))}
}

// Clone is not used by a server.
func (t turns) Clone() credentials.TransportCredentials {
	return turns{t.TransportCredentials.Clone(), t.computing}
}

func (t turns) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshake{Conn: raw, computing: t.computing}
	h.computing <- struct{}{}
	defer func() {
		h.over.Store(true)
		<-h.computing
	}()
	return t.TransportCredentials.ServerHandshake(h)
}

// handshake is a connection whose handshake gives its turn back while it waits for the peer.
type handshake struct {
	net.Conn
	computing chan struct{}
	over      atomic.Bool
}

func (h *handshake) Read(b []byte) (int, error) {
	defer h.wait()()
	return h.Conn.Read(b)
}

func (h *handshake) Write(b []byte) (int, error) {
	defer h.wait()()
	return h.Conn.Write(b)
}

// wait returns what ends it.
func (h *handshake) wait() func() {
	if h.over.Load() {
		return func() {}
	}
	<-h.computing
	return func() { h.computing <- struct{}{} }
}
