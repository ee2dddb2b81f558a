package csr

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"tacit.dev/mesh"
)

// Server answers signing requests. All fields are set before Register.
type Server struct {
	// Authenticate tells which node the bearer token proves. Required.
	Authenticate func(ctx context.Context, token string) (node string, err error)
	// Sign decides and signs; csrPEM comes from the network and is not looked
	// at here. The ttl is a wish, 0 for none. It answers PEM: leaf,
	// intermediates, then the roots. An error that wraps ErrDenied or
	// ErrBadRequest is told to the node with its text, any other is told as
	// "unavailable" and logged. It may be called concurrently. Required.
	Sign func(ctx context.Context, node string, id mesh.ID, csrPEM []byte, ttl time.Duration) (chainPEM []byte, err error)
	// Log may be nil: silence.
	Log *slog.Logger
}

// Register puts the service on a gRPC server; for xds.ServeConfig.Services.
func (s *Server) Register(r grpc.ServiceRegistrar) {}
