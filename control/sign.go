package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tacit.dev/control/ca"
	"tacit.dev/mesh"
	"tacit.dev/wire/csr"
)

// Results of signing requests, for metrics.
const (
	signed     = "signed"
	denied     = "denied"
	badRequest = "bad_request"
	failed     = "failed"
)

// sign answers the request of an authenticated node: only for an identity that
// has a pod there which is enrolled, or on its way out.
func (p *plane) sign(_ context.Context, node string, id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	chain, err := p.decide(node, id, csrPEM, ttl)
	result := signed
	switch {
	case errors.Is(err, csr.ErrDenied):
		result = denied
	case errors.Is(err, csr.ErrBadRequest):
		result = badRequest
	case err != nil:
		result = failed
	}
	p.reconciler.metrics.signed.WithLabelValues(result).Inc()
	if err == nil { // a refusal is logged by csr.Server
		p.log.Info("certificate signed", "node", node, "identity", id.String())
	}
	return chain, err
}

func (p *plane) decide(node string, id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	allowed := p.reconciler.allowed.Load()
	if id.TrustDomain != p.cfg.TrustDomain {
		return nil, fmt.Errorf("%w: trust domain %q, want %q", csr.ErrDenied, id.TrustDomain, p.cfg.TrustDomain)
	}
	if allowed == nil || !(*allowed)[allowance{node, id}] {
		return nil, fmt.Errorf("%w: node %s has no enrolled pod with identity %s", csr.ErrDenied, node, id)
	}
	chain, err := p.ca.Sign(id, csrPEM, ttl)
	if errors.Is(err, ca.ErrRequest) {
		return nil, fmt.Errorf("%w: %w", csr.ErrBadRequest, err)
	}
	return chain, err
}
