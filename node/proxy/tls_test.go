package proxy

import (
	"crypto/tls"
	"net"
	"os"
	"sync"
	"testing"

	"tacit.dev/wire/direct"
)

// foreignTLS begins a handshake that has nothing to do with the mesh.
func foreignTLS(c net.Conn) {
	tls.Client(c, &tls.Config{ServerName: "example.org", NextProtos: []string{"h2"}}).Handshake()
}

// recordedHello is a ClientHello of ours, behind which nothing follows.
func recordedHello(t *testing.T) []byte {
	t.Helper()
	a, z := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		tls.Client(a, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{direct.ALPN}}).Handshake()
	})
	b := make([]byte, 16<<10)
	n, err := z.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	z.Close()
	wg.Wait()
	a.Close()
	return b[:n]
}

// connOf makes a connection of a connected socket, which it takes over.
func connOf(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}
