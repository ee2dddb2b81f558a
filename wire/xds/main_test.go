package xds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"tacit.dev/mesh"
)

// TestMain fails on goroutines that outlive the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	if left := leaked(5 * time.Second); left != "" && code == 0 {
		fmt.Fprintf(os.Stderr, "goroutines left behind:\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// leaked waits for our and gRPC's goroutines to end, and returns those that do not.
func leaked(limit time.Duration) string {
	var left []string
	for end := time.Now().Add(limit); time.Now().Before(end); runtime.Gosched() {
		buf := make([]byte, 1<<20)
		left = left[:0]
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")[1:] {
			if strings.Contains(g, "tacit.dev/") || strings.Contains(g, "google.golang.org/grpc") {
				left = append(left, g)
			}
		}
		if len(left) == 0 {
			return ""
		}
	}
	return strings.Join(left, "\n\n")
}

// pki is a root and a certificate for 127.0.0.1.
type pki struct {
	bundle string // a file
	conf   *tls.Config
}

func newPKI(t testing.TB) pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "control"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	p := pki{
		bundle: filepath.Join(t.TempDir(), "bundle.pem"),
		conf:   &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	write(t, p.bundle, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return p
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// control is a Server behind real TLS on loopback, which may be stopped and started
// again on the same port. The token of node n's proxy is "proxy-n", its agent's "agent-n".
type control struct {
	*Server
	pki  pki
	addr string
	stop func()
}

func authenticate(_ context.Context, token string) (mesh.Process, error) {
	if node, ok := strings.CutPrefix(token, "proxy-"); ok {
		return mesh.Process{Node: node}, nil
	}
	if node, ok := strings.CutPrefix(token, "agent-"); ok {
		return mesh.Process{Node: node, Agent: true}, nil
	}
	return mesh.Process{}, errors.New("unknown token")
}

func startControl(t testing.TB, cfg ServerConfig) *control {
	t.Helper()
	c := &control{pki: newPKI(t), addr: "127.0.0.1:0"}
	c.start(t, cfg)
	t.Cleanup(func() { c.stop() })
	return c
}

func (c *control) start(t testing.TB, cfg ServerConfig) {
	t.Helper()
	if cfg.Authenticate == nil {
		cfg.Authenticate = authenticate
	}
	c.Server = NewServer(cfg)
	lis, err := net.Listen("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	c.addr = lis.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go c.serve(ctx, lis, done)
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

func (c *control) serve(ctx context.Context, lis net.Listener, done chan<- error) {
	done <- Serve(ctx, ServeConfig{Listener: lis, TLS: c.pki.conf, Services: []func(grpc.ServiceRegistrar){c.Register}})
}

// dial makes a connection as a node's proxy.
func (c *control) dial(t testing.TB, node string) *Conn {
	t.Helper()
	return c.dialWith(t, "proxy-"+node)
}

// dialAgent makes a connection as a node's agent.
func (c *control) dialAgent(t testing.TB, node string) *Conn {
	t.Helper()
	return c.dialWith(t, "agent-"+node)
}

func (c *control) dialWith(t testing.TB, secret string) *Conn {
	t.Helper()
	token := filepath.Join(t.TempDir(), "token")
	write(t, token, secret+"\n")
	conn, err := Dial(DialConfig{Addr: c.addr, TokenFile: token, BundleFile: c.pki.bundle})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// run runs a client until the returned function is called.
func run(t testing.TB, client interface{ Run(context.Context) error }) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go runClient(ctx, client, done)
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func runClient(ctx context.Context, client interface{ Run(context.Context) error }, done chan<- error) {
	done <- client.Run(ctx)
}

// settle waits until every node has acked version.
func (c *control) settle(t testing.TB, version uint64) {
	t.Helper()
	c.until(t, fmt.Sprintf("every node has version %d", version), func() bool { return len(c.Acked(version)) == 0 })
}

// until waits until ok is true. It looks also when nothing has changed for control: not
// everything that a client does is told.
func (c *control) until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit, look := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer look.Stop()
	for !ok() {
		select {
		case <-c.Changed():
		case <-look.C:
		case <-limit:
			t.Fatalf("waiting until %s: %+v", what, c.Nodes())
		}
	}
}

// connected waits for the proxies of nodes.
func (c *control) connected(t testing.TB, nodes ...string) {
	t.Helper()
	c.until(t, fmt.Sprint(nodes, " are connected"), func() bool {
		proxies := map[string]bool{}
		for _, n := range c.Nodes() {
			proxies[n.Node] = n.Proxy
		}
		for _, n := range nodes {
			if !proxies[n] {
				return false
			}
		}
		return true
	})
}

func receiveWithin[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("waiting for %s", what)
		panic("unreachable")
	}
}

// testLog writes to t, until the test ends.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
}

func pemOf(t testing.TB, p pki) string {
	t.Helper()
	b, err := os.ReadFile(p.bundle)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
