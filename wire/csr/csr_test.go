package csr

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"tacit.dev/mesh"
	"tacit.dev/wire/csr/message"
)

var id = mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "web"}

// serve connects a client, which proves itself by token, to a server.
func serve(t *testing.T, s *Server, token string) *Client {
	t.Helper()
	lis := bufconn.Listen(64 << 10)
	g := grpc.NewServer()
	s.Register(g)
	done := make(chan error, 1)
	go serveLoop(g, lis, done)
	conn, err := grpc.NewClient("passthrough:///control",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token), method, req, reply, cc, opts...)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return NewClient(conn)
}

func serveLoop(g *grpc.Server, lis net.Listener, done chan<- error) { done <- g.Serve(lis) }

func authenticate(_ context.Context, token string) (mesh.Process, error) {
	if node, ok := strings.CutPrefix(token, "agent-"); ok {
		return mesh.Process{Node: node, Agent: true}, nil
	}
	node, ok := strings.CutPrefix(token, "token-")
	if !ok {
		return mesh.Process{}, errors.New("unknown token")
	}
	return mesh.Process{Node: node}, nil
}

// chain is a leaf, an intermediate and two roots.
func chain(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string, ca bool, parent *x509.Certificate) *x509.Certificate {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: ca, BasicConstraintsValid: true}
		if parent == nil {
			parent = tmpl
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	root, next := issue("root 1", true, nil), issue("root 2", true, nil)
	intermediate := issue("intermediate", true, root)
	var out []byte
	for _, c := range []*x509.Certificate{issue("leaf", false, intermediate), intermediate, root, next} {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// The request arrives as it was meant, and the chain as it was signed.
func TestSign(t *testing.T) {
	want := chain(t)
	c := serve(t, &Server{Authenticate: authenticate,
		Sign: func(_ context.Context, node string, got mesh.ID, csr []byte, ttl time.Duration) ([]byte, error) {
			if node != "n1" || got != id || string(csr) != "request" || ttl != 90*time.Second {
				t.Errorf("asked to sign %q as %s on %q for %s", csr, got, node, ttl)
			}
			return want, nil
		}}, "token-n1")
	c.TTL = 90 * time.Second
	got, err := c.Sign(context.Background(), id, []byte("request"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Istio's clients take the last part for the bundle.
func TestBundleIsLastPart(t *testing.T) {
	parts, err := splitChain(chain(t))
	if err != nil || len(parts) != 3 {
		t.Fatalf("%d parts, %v: want leaf, intermediate, bundle", len(parts), err)
	}
	if n := strings.Count(parts[2], "BEGIN CERTIFICATE"); n != 2 {
		t.Errorf("the bundle holds %d roots: want 2", n)
	}
}

func TestErrors(t *testing.T) {
	answer := func(chain []byte, err error) *Server {
		return &Server{Authenticate: authenticate, Sign: func(context.Context, string, mesh.ID, []byte, time.Duration) ([]byte, error) { return chain, err }}
	}
	for _, row := range []struct {
		name   string
		server *Server
		token  string
		id     mesh.ID
		csr    string
		is     error
		text   string
		not    string
	}{
		{"denied", answer(nil, fmt.Errorf("%w: no pod of it on node n1", ErrDenied)), "token-n1", id, "r", ErrDenied, "denied: no pod of it on node n1", ""},
		{"bad request", answer(nil, fmt.Errorf("%w: RSA key", ErrBadRequest)), "token-n1", id, "r", ErrBadRequest, "bad request: RSA key", ""},
		{"internal", answer(nil, errors.New("key file: permission denied")), "token-n1", id, "r", nil, "cannot sign now", "key file"},
		{"unknown token", answer(chain(t), nil), "stolen", id, "r", nil, "proves no node", "unknown token"},
		{"an agent", answer(chain(t), nil), "agent-n1", id, "r", ErrDenied, "agent of n1", ""},
		{"nobody", answer(chain(t), nil), "token-n1", mesh.ID{}, "r", ErrBadRequest, "ImpersonatedIdentity", ""},
		{"no request", answer(chain(t), nil), "token-n1", id, "", ErrBadRequest, "0 bytes", ""},
		{"huge request", answer(chain(t), nil), "token-n1", id, strings.Repeat("x", maxRequest+1), ErrBadRequest, "bytes", ""},
		{"chain that is none", answer([]byte("junk"), nil), "token-n1", id, "r", nil, "cannot sign now", "PEM"},
		{"chain without roots", answer(chain(t)[:100], nil), "token-n1", id, "r", nil, "cannot sign now", ""},
	} {
		_, err := serve(t, row.server, row.token).Sign(context.Background(), row.id, []byte(row.csr))
		if err == nil || !strings.Contains(err.Error(), row.text) || row.not != "" && strings.Contains(err.Error(), row.not) {
			t.Errorf("%s: %v: want %q in it, and not %q", row.name, err, row.text, row.not)
		}
		if got := errors.Is(err, ErrDenied) || errors.Is(err, ErrBadRequest); row.is != nil && !errors.Is(err, row.is) || row.is == nil && got {
			t.Errorf("%s: %v: want to be %v", row.name, err, row.is)
		}
	}
}

// A call ends with its context, and a short answer is no answer.
func TestSignEnds(t *testing.T) {
	c := serve(t, &Server{Authenticate: authenticate,
		Sign: func(ctx context.Context, _ string, _ mesh.ID, _ []byte, _ time.Duration) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}, "token-n1")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Sign(ctx, id, []byte("r")); err == nil {
		t.Error("signed by nobody")
	}
	if _, err := joinChain(id, []string{"leaf alone"}); err == nil {
		t.Error("a chain without a bundle was taken")
	}
	if _, err := joinChain(id, []string{"leaf", strings.Repeat("x", maxChain)}); err == nil {
		t.Error("a chain without end was taken")
	}
}

func TestNames(t *testing.T) {
	if got, want := message.IstioCertificateService_CreateCertificate_FullMethodName, "/istio.v1.auth.IstioCertificateService/CreateCertificate"; got != want {
		t.Errorf("method %s: want %s", got, want)
	}
	fields := (&message.IstioCertificateRequest{}).ProtoReflect().Descriptor().Fields()
	for name, number := range map[string]int{"csr": 1, "validity_duration": 3, "metadata": 4} {
		if f := fields.ByTextName(name); f == nil || int(f.Number()) != number {
			t.Errorf("field %s: want number %d", name, number)
		}
	}
}
