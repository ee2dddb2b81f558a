package xds

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// ServeConfig is what Serve needs.
type ServeConfig struct {
	// Listener is where nodes connect; Serve closes it. Required.
	Listener net.Listener
	// TLS holds control's certificate, or gives it by GetCertificate. Required.
	TLS *tls.Config
	// Services are the Register methods of Server and of csr.Server.
	Services []func(grpc.ServiceRegistrar)
	// Idle bounds how long a connection may have no stream. Whoever has no token gets none,
	// and would else keep the connection for ever. Default 10 s.
	Idle time.Duration
}

// Serve serves nodes until ctx is done, then ends every stream and returns nil.
// A peer that went silent is noticed after 10 s at most.
func Serve(ctx context.Context, cfg ServeConfig) error {
	if cfg.Listener == nil || cfg.TLS == nil {
		return errors.New("serve nodes: want a listener and a TLS configuration")
	}
	conf := cfg.TLS.Clone()
	conf.MinVersion = tls.VersionTLS13
	g := grpc.NewServer(append(serverOptions(cmp.Or(cfg.Idle, 10*time.Second)), grpc.Creds(newTurns(credentials.NewTLS(conf))))...)
	for _, register := range cfg.Services {
		register(g)
	}
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	if err := g.Serve(cfg.Listener); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve nodes at %s: %w", cfg.Listener.Addr(), err)
	}
	return nil
}

// serverOptions bound what one node can take.
func serverOptions(idle time.Duration) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 5 * time.Second, Timeout: 4 * time.Second, MaxConnectionIdle: idle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingEvery / 2, PermitWithoutStream: true}),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.MaxConcurrentStreams(64),
		grpc.MaxRecvMsgSize(16 << 20),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(16 << 10),
	}
}
