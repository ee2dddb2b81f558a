package control

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// stolenToken is what an attacker with a token of a node can get. With its proxy's:
// certificates of pods that run there, and nothing else of pods. With its agent's: which
// pods are there, and no certificate.
func stolenToken(s *shop) {
	agents := strings.Fields(s.Kubectl("get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-node",
		"--field-selector=spec.nodeName=n1", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(agents) != 1 {
		s.T.Fatalf("agents of n1: %q, want one", agents)
	}
	bound := []string{"--bound-object-kind=Pod", "--bound-object-name=" + agents[0]}
	token := func(account string, more ...string) string {
		return s.Kubectl(append([]string{"create", "token", "-n", "tacit-system", account}, more...)...)
	}
	proxy := token("tacit-node", append(bound, "--audience=tacit-proxy")...)
	agent := token("tacit-node", append(bound, "--audience=tacit-agent")...)
	control := s.dialControl("service/tacit-control")
	for name, c := range map[string]struct {
		token, account string
		want           codes.Code
	}{
		"a pod of the node":             {proxy, "one", codes.OK},
		"a pod of another node":         {proxy, "two", codes.PermissionDenied},
		"an account without a pod":      {proxy, "nobody", codes.PermissionDenied},
		"a pod that is not enrolled":    {proxy, "three", codes.PermissionDenied},
		"the agent of the node":         {agent, "one", codes.PermissionDenied},
		"a token for the API server":    {token("tacit-node", bound...), "one", codes.Unauthenticated},
		"a token bound to no pod":       {token("tacit-node", "--audience=tacit-proxy"), "one", codes.Unauthenticated},
		"another account of the system": {token("tacit-control", "--audience=tacit-proxy"), "one", codes.Unauthenticated},
		"no token of anybody":           {"nonsense", "one", codes.Unauthenticated},
	} {
		s.T.Run(name, func(t *testing.T) {
			if err := control.sign(s.Patiently(), c.token, "spiffe://cluster.local/ns/shop/sa/"+c.account); status.Code(err) != c.want {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	s.T.Run("the pods of another node", func(t *testing.T) {
		for who, want := range map[string]codes.Code{"n1": codes.OK, "n2": codes.PermissionDenied} {
			if err := control.subscribe(s.Patiently(), agent, who); status.Code(err) != want {
				t.Errorf("as %s: %v, want %v", who, err, want)
			}
		}
	})
	s.T.Run("the agent's word", func(t *testing.T) {
		if err := control.subscribe(s.Patiently(), proxy, "n1"); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the pods of the node, to its proxy: %v, want PermissionDenied", err)
		}
		if err := control.report(s.Patiently(), proxy); status.Code(err) != codes.PermissionDenied {
			t.Errorf("a report of the proxy: %v, want PermissionDenied", err)
		}
	})
	s.T.Run("from any replica", func(t *testing.T) {
		replicas := strings.Fields(s.Kubectl("get", "pods", "-n", "tacit-system", "-l", "app.kubernetes.io/name=tacit-control", "-o", "name"))
		if len(replicas) != 2 {
			t.Errorf("replicas of control: %q, want two", replicas)
		}
		for _, replica := range replicas {
			if err := s.dialControl(replica).sign(s.Patiently(), proxy, "spiffe://cluster.local/ns/shop/sa/one"); err != nil {
				t.Errorf("%s: %v", replica, err)
			}
		}
	})
}

// raw sends and receives messages as they are: the test needs none of the product's code.
type raw struct{}

func (raw) Name() string { return "raw" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

// controlConn is a way to control, as nodes have it.
type controlConn struct{ *grpc.ClientConn }

func (s *shop) dialControl(to string) controlConn {
	s.T.Helper()
	roots, certificates := x509.NewCertPool(), s.Kubectl(bundle...)
	if !roots.AppendCertsFromPEM([]byte(certificates)) {
		s.T.Fatalf("the bundle holds no certificate: %q", certificates)
	}
	conn, err := grpc.NewClient("passthrough:///"+s.forward(to), grpc.WithTransportCredentials(credentials.NewTLS(
		&tls.Config{RootCAs: roots, ServerName: "tacit-control.tacit-system.svc", MinVersion: tls.VersionTLS13})))
	if err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() { conn.Close() })
	return controlConn{conn}
}

var forwarding = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// forward makes a Service or a pod reachable from here until the test ends.
func (s *shop) forward(to string) string {
	s.T.Helper()
	cmd := exec.Command(s.Mesh.KubectlPath(), "port-forward", "-n", "tacit-system", to, ":15010")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	address := forwarding.FindString(line)
	if address == "" {
		s.T.Fatalf("kubectl port-forward said %q: %v", line, err)
	}
	return address
}

// sign asks for a certificate: istio.v1.auth.IstioCertificateService, with the
// request in field 1 and, in the Struct of field 4, the identity that is asked for.
func (c controlConn) sign(ctx context.Context, token, identity string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	request := text(nil, 1, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})))
	entry := text(text(nil, 1, "ImpersonatedIdentity"), 2, string(text(nil, 3, identity)))
	request = text(request, 4, string(text(nil, 1, string(entry))))
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	var answer []byte
	err = c.Invoke(ctx, "/istio.v1.auth.IstioCertificateService/CreateCertificate", request, &answer, grpc.ForceCodecV2(raw{}), grpc.WaitForReady(true))
	if err == nil && !strings.Contains(string(answer), "BEGIN CERTIFICATE") {
		return fmt.Errorf("no certificate in the answer %q", answer)
	}
	return err
}

// subscribe asks for the pods of a node, and waits for the first answer: the delta
// protocol of xDS, with the node in field 1 (its name in field 1 of that) and the type
// of resources in field 2.
func (c controlConn) subscribe(ctx context.Context, token, node string) error {
	return c.ask(ctx, token, "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
		text(text(nil, 1, string(text(nil, 1, node))), 2, "type.googleapis.com/tacit.node.v1.Pod"))
}

// report says that the node has no captured pod: a report that ends the opening list,
// field 2, before anything was in it.
func (c controlConn) report(ctx context.Context, token string) error {
	return c.ask(ctx, token, "/tacit.node.v1.Enrollment/Report", protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 1))
}

// ask opens a stream, sends one message and waits for the first answer.
func (c controlConn) ask(ctx context.Context, token, method string, message []byte) error {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token))
	defer cancel()
	stream, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.ForceCodecV2(raw{}), grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	// Who is refused may hear of it before this was sent; the reason comes next.
	if err := stream.SendMsg(message); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var answer []byte
	return stream.RecvMsg(&answer)
}

// text appends a field of bytes.
func text(b []byte, number protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}
