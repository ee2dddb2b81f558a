package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"testing"
	"time"

	"tacit.dev/control/ca"
	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/relay"
	"tacit.dev/wire/direct"
)

// What two proxies do with the bytes, without capture, namespaces and lab: for
// profiles. The numbers that count are those of the lab.

// chains are what stands between the two ends.
var chains = map[string]func(b *testing.B, a, c *net.TCPConn){
	"splice": chainSplice,
	"direct": chainDirect,
}

func BenchmarkChainBulk(b *testing.B) {
	for name, chain := range chains {
		b.Run(name, func(b *testing.B) {
			near, far := ends(b, chain)
			go io.Copy(io.Discard, far)
			chunk := make([]byte, 128<<10)
			b.SetBytes(int64(len(chunk)))
			for b.Loop() {
				if _, err := near.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkChainRoundTrip(b *testing.B) {
	for name, chain := range chains {
		b.Run(name, func(b *testing.B) {
			near, far := ends(b, chain)
			go io.Copy(far, far)
			message := make([]byte, 128)
			for b.Loop() {
				near.Write(message)
				if _, err := io.ReadFull(near, message); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// ends returns the outer ends of a chain.
func ends(b *testing.B, chain func(b *testing.B, a, c *net.TCPConn)) (near, far *net.TCPConn) {
	near, a := tcpPair(b)
	far, c := tcpPair(b)
	chain(b, a, c)
	return near, far
}

func tcpPair(b *testing.B) (near, far *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	d, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	return d.(*net.TCPConn), a.(*net.TCPConn)
}

func chainSplice(b *testing.B, a, c *net.TCPConn) {
	x, y := tcpPair(b)
	join(b, relay.TCP(a), relay.TCP(x))
	join(b, relay.TCP(y), relay.TCP(c))
}

func chainDirect(b *testing.B, a, c *net.TCPConn) {
	x, y := tcpPair(b)
	authority, err := ca.Open(ca.Config{Store: ca.Folder(b.TempDir()), TrustDomain: "lab"})
	if err != nil {
		b.Fatal(err)
	}
	client, server := leaf(b, authority, "client"), leaf(b, authority, "server")
	ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
	b.Cleanup(cancel)
	accepted := make(chan relay.Conn, 1)
	go func() {
		s, _, err := direct.Server(ctx, y, newTLS().Server(server))
		if err == nil {
			err = s.Reply(direct.Reply{Status: direct.StatusOK})
		}
		if err != nil {
			b.Error(err)
		}
		accepted <- s
	}()
	d, err := direct.Client(ctx, x, newTLS().Client(client, server.ID, "127.0.0.1"), direct.Hello{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := d.AwaitReply(ctx); err != nil {
		b.Fatal(err)
	}
	join(b, relay.TCP(a), d)
	join(b, <-accepted, relay.TCP(c))
}

func newTLS() *identity.TLS { return identity.NewTLS(identity.TLSConfig{}) }

func join(b *testing.B, near, far relay.Conn) {
	ctx, cancel := context.WithCancel(context.Background())
	pool := relay.NewPool()
	done := make(chan struct{})
	go func() {
		defer close(done)
		relay.Join(ctx, near, far, relay.Config{Pool: pool})
	}()
	b.Cleanup(func() { cancel(); <-done; pool.Close() })
}

func leaf(b *testing.B, authority *ca.CA, account string) *identity.Leaf {
	id := mesh.ID{TrustDomain: "lab", Namespace: "bench", ServiceAccount: account}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.Fatal(err)
	}
	chain, err := authority.Sign(id, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), 0)
	if err != nil {
		b.Fatal(err)
	}
	l, err := identity.NewLeaf(id, key, chain, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	return l
}
