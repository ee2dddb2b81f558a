package csr

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"tacit.dev/mesh"
	"tacit.dev/wire/csr/message"
)

// Client asks for certificates; it is an identity.Signer. It may be used
// concurrently.
type Client struct {
	// TTL is the wished lifetime, 0 for the CA's own. Set it before the first call.
	TTL time.Duration

	conn grpc.ClientConnInterface
}

// NewClient speaks over conn (of xds.Dial), which it does not close.
func NewClient(conn grpc.ClientConnInterface) *Client { return &Client{conn: conn} }

// Sign sends a PEM signing request for id and returns PEM: leaf, intermediates,
// then the roots; nothing of it is verified here. It blocks until the answer,
// ctx's end, or 10 s. The error wraps ErrDenied or ErrBadRequest where asking again
// helps only if something changes at control.
func (c *Client) Sign(ctx context.Context, id mesh.ID, csrPEM []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req := &message.IstioCertificateRequest{
		Csr:              string(csrPEM),
		ValidityDuration: int64(c.TTL / time.Second),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			impersonated: structpb.NewStringValue(id.String()),
		}},
	}
	resp, err := message.NewIstioCertificateServiceClient(c.conn).CreateCertificate(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("ask control for a certificate of %s: %w", id, fromStatus(err))
	}
	return joinChain(id, resp.GetCertChain())
}

// joinChain puts the parts into one text. A part may lack its last newline.
func joinChain(id mesh.ID, parts []string) ([]byte, error) {
	var b strings.Builder
	for _, part := range parts {
		if b.Len()+len(part) > maxChain {
			return nil, fmt.Errorf("ask control for a certificate of %s: the chain is longer than %d bytes", id, maxChain)
		}
		b.WriteString(part)
		if !strings.HasSuffix(part, "\n") {
			b.WriteByte('\n')
		}
	}
	if len(parts) < 2 {
		return nil, fmt.Errorf("ask control for a certificate of %s: %d parts: want a leaf and a bundle", id, len(parts))
	}
	return []byte(b.String()), nil
}

// fromStatus lets callers use errors.Is.
func fromStatus(err error) error {
	switch status.Code(err) {
	case codes.PermissionDenied:
		return fmt.Errorf("%w: %s", ErrDenied, status.Convert(err).Message())
	case codes.InvalidArgument:
		return fmt.Errorf("%w: %s", ErrBadRequest, status.Convert(err).Message())
	}
	return err
}
