package csr

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tacit.dev/mesh"
	"tacit.dev/wire/bearer"
	"tacit.dev/wire/csr/message"
)

// Server answers signing requests. All fields are set before Register.
type Server struct {
	// Authenticate tells which process the bearer token proves; only a proxy has
	// use for certificates. Required.
	Authenticate func(ctx context.Context, token string) (mesh.Process, error)
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
func (s *Server) Register(r grpc.ServiceRegistrar) {
	message.RegisterIstioCertificateServiceServer(r, service{server: s})
}

type service struct {
	message.UnimplementedIstioCertificateServiceServer
	server *Server
}

func (v service) CreateCertificate(ctx context.Context, req *message.IstioCertificateRequest) (*message.IstioCertificateResponse, error) {
	s := v.server
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	from, err := s.Authenticate(ctx, bearer.Token(ctx))
	if err != nil || from.Node == "" {
		log.Warn("signing request refused", "error", err)
		return nil, status.Error(codes.Unauthenticated, "the token proves no node")
	}
	id, chain, err := s.sign(ctx, from, req)
	if err != nil {
		log.Warn("certificate not signed", "node", from.Node, "identity", id, "error", err)
		return nil, toStatus(err)
	}
	parts, err := splitChain(chain)
	if err != nil {
		log.Error("certificate not signed", "node", from.Node, "identity", id, "error", err)
		return nil, toStatus(err)
	}
	return &message.IstioCertificateResponse{CertChain: parts}, nil
}

func (s *Server) sign(ctx context.Context, from mesh.Process, req *message.IstioCertificateRequest) (id mesh.ID, chain []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if from.Agent {
		return id, nil, fmt.Errorf("%w: the token is that of the %s: certificates are the proxy's", ErrDenied, from)
	}
	id, err = mesh.ParseID(req.GetMetadata().GetFields()[impersonated].GetStringValue())
	if err != nil {
		return id, nil, fmt.Errorf("%w: metadata %s: %w", ErrBadRequest, impersonated, err)
	}
	if n := len(req.GetCsr()); n == 0 || n > maxRequest {
		return id, nil, fmt.Errorf("%w: signing request of %d bytes: want 1 to %d", ErrBadRequest, n, maxRequest)
	}
	if v := req.GetValidityDuration(); v < 0 || v > math.MaxInt64/int64(time.Second) {
		return id, nil, fmt.Errorf("%w: validity of %d s", ErrBadRequest, v)
	}
	ttl := time.Duration(req.GetValidityDuration()) * time.Second
	chain, err = s.Sign(ctx, from.Node, id, []byte(req.GetCsr()), ttl)
	return id, chain, err
}

// toStatus tells a node only what it can act on.
func toStatus(err error) error {
	switch {
	case errors.Is(err, ErrDenied):
		return status.Error(codes.PermissionDenied, text(err, ErrDenied))
	case errors.Is(err, ErrBadRequest):
		return status.Error(codes.InvalidArgument, text(err, ErrBadRequest))
	}
	return status.Error(codes.Unavailable, "control cannot sign now; its log says why")
}

// text leaves out the kind, which the status code says already.
func text(err, kind error) string {
	return strings.TrimPrefix(err.Error(), kind.Error()+": ")
}

// splitChain gives Istio's form: each certificate a part, all roots the last one.
func splitChain(chain []byte) ([]string, error) {
	var parts []string
	var bundle strings.Builder
	for rest := chain; len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("split the signed chain: it is not PEM throughout")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("split the signed chain: %w", err)
		}
		text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}))
		if bytes.Equal(cert.RawSubject, cert.RawIssuer) && cert.IsCA {
			bundle.WriteString(text)
		} else {
			parts = append(parts, text)
		}
	}
	if len(parts) == 0 || bundle.Len() == 0 {
		return nil, fmt.Errorf("split the signed chain: %d certificates and %d bytes of roots: want both", len(parts), bundle.Len())
	}
	return append(parts, bundle.String()), nil
}
