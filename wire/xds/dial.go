package xds

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Times after which a peer that says nothing is dead. The kernel's probes find a
// cut link on a quiet connection (idle + count × interval), TCP_USER_TIMEOUT, which
// gRPC sets to pingTimeout, on a busy one; both after 9 s, so that one lost packet
// breaks nothing. gRPC's pings find a peer that hangs, after 19 s.
const (
	probeIdle     = 3 * time.Second
	probeInterval = 2 * time.Second
	probeCount    = 3
	pingEvery     = 10 * time.Second // gRPC allows a client no less
	pingTimeout   = 9 * time.Second
	dialTimeout   = 3 * time.Second
	// lookupTimeout is for an answer that can be done without.
	lookupTimeout = time.Second

	// A response of our own control is far smaller (see chunkBytes); a foreign
	// one tells the whole World in one message.
	maxReceive = 64 << 20
)

// DialConfig says how to reach control.
type DialConfig struct {
	// Addr is HOST:PORT. Required.
	Addr string
	// Fallback is HOST:PORT where control is dialed while nothing answers the name of Addr, and it was not
	// found by that before: what answers names may wait for this node. "" means nowhere.
	Fallback string
	// ServerName is the name that control's certificate must hold; by default
	// the host of Addr.
	ServerName string
	// TokenFile holds what proves this process of the node, BundleFile the PEM roots that
	// control's certificate must lead to. Each is read again whenever it is
	// needed, so that it may be replaced. Required.
	TokenFile  string
	BundleFile string
}

// Conn is a way to control, over which several clients may speak at once, also
// those of wire/csr. Whoever dialled closes it.
type Conn struct{ *grpc.ClientConn }

// Dial prepares a connection; it is made when it is first used, and made again
// whenever it is lost. Missing files are an error of each attempt, not of Dial.
func Dial(cfg DialConfig) (*Conn, error) {
	host, _, err := net.SplitHostPort(cfg.Addr)
	if err != nil || cfg.TokenFile == "" || cfg.BundleFile == "" {
		return nil, fmt.Errorf("dial control at %q with token %q and bundle %q: want HOST:PORT and two files (%w)",
			cfg.Addr, cfg.TokenFile, cfg.BundleFile, errors.Join(err))
	}
	if cfg.ServerName != "" {
		host = cfg.ServerName
	}
	conn, err := grpc.NewClient("passthrough:///"+cfg.Addr, append(dialOptions(cfg.Fallback),
		grpc.WithTransportCredentials(trust{bundleFile: cfg.BundleFile, serverName: host}),
		grpc.WithPerRPCCredentials(token{file: cfg.TokenFile}))...)
	if err != nil {
		return nil, fmt.Errorf("dial control at %s: %w", cfg.Addr, err)
	}
	return &Conn{conn}, nil
}

// dialOptions keep the client small (buffers of 4 KiB, and none while idle) and
// quick to come back.
func dialOptions(fallback string) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithContextDialer(newFinder(fallback).dial),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableHealthCheck(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithReadBufferSize(4 << 10),
		grpc.WithWriteBufferSize(4 << 10),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: time.Second},
			MinConnectTimeout: lookupTimeout + dialTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceive)),
	}
}

// finder connects to control by its name, and where it found control last while the name
// leads nowhere: what answers names may be on a node that hangs. Whoever is there proves
// by a certificate to be control. It is safe for concurrent use.
type finder struct {
	dialer   net.Dialer
	patience time.Duration          // with the name, if there is a last
	last     atomic.Pointer[string] // HOST:PORT
}

func newFinder(fallback string) *finder {
	f := &finder{patience: lookupTimeout, dialer: net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeIdle, Interval: probeInterval, Count: probeCount},
	}}
	if fallback != "" {
		f.last.Store(&fallback)
	}
	return f
}

// dial resolves the name anew each time.
func (f *finder) dial(ctx context.Context, addr string) (net.Conn, error) {
	if last := f.last.Load(); last != nil && !f.leads(ctx, addr) {
		addr = *last
	}
	conn, err := f.dialer.DialContext(ctx, "tcp", addr)
	if err == nil {
		where := conn.RemoteAddr().String()
		f.last.Store(&where)
	}
	return conn, err
}

// leads tells whether the name leads anywhere now.
func (f *finder) leads(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, f.patience)
	defer cancel()
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	resolver := cmp.Or(f.dialer.Resolver, net.DefaultResolver)
	addrs, err := resolver.LookupHost(ctx, host)
	return err == nil && len(addrs) > 0
}

// trust verifies control against the bundle as it is at each handshake.
type trust struct{ bundleFile, serverName string }

func (t trust) ClientHandshake(ctx context.Context, authority string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	pem, err := os.ReadFile(t.bundleFile)
	if err != nil {
		return nil, nil, fmt.Errorf("verify control: read bundle: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, nil, fmt.Errorf("verify control: bundle %s holds no PEM certificate", t.bundleFile)
	}
	return credentials.NewTLS(&tls.Config{
		RootCAs:    roots,
		ServerName: t.serverName,
		MinVersion: tls.VersionTLS13,
	}).ClientHandshake(ctx, authority, c)
}

func (t trust) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("xds: a client's credentials cannot serve")
}

func (t trust) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (t trust) Clone() credentials.TransportCredentials { return t }

func (t trust) OverrideServerName(string) error {
	return errors.New("xds: the server name is given by DialConfig")
}

// token is the bearer token as the file has it at each call.
type token struct{ file string }

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	b, err := os.ReadFile(t.file)
	if err != nil {
		return nil, fmt.Errorf("prove the node: read token: %w", err)
	}
	s := strings.TrimSpace(string(b))
	if s == "" {
		return nil, fmt.Errorf("prove the node: token %s is empty", t.file)
	}
	return map[string]string{"authorization": "Bearer " + s}, nil
}

func (t token) RequireTransportSecurity() bool { return true }
