package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
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
func (t *term) sign(_ context.Context, node string, id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	chain, err := t.decide(node, id, csrPEM, ttl)
	result := signed
	switch {
	case errors.Is(err, csr.ErrDenied):
		result = denied
	case errors.Is(err, csr.ErrBadRequest):
		result = badRequest
	case err != nil:
		result = failed
	}
	t.reconciler.metrics.signed.WithLabelValues(result).Inc()
	if err == nil { // a refusal is logged by csr.Server
		t.log.Info("certificate signed", "node", node, "identity", id.String())
	}
	return chain, err
}

func (t *term) decide(node string, id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	if !t.leads() {
		return nil, errDeposed
	}
	if id.TrustDomain != t.cfg.TrustDomain {
		return nil, fmt.Errorf("%w: trust domain %q, want %q", csr.ErrDenied, id.TrustDomain, t.cfg.TrustDomain)
	}
	if t.reconciler.roster.allowed.isRevoked(id) {
		return nil, fmt.Errorf("%w: the Mesh has revoked %s", csr.ErrDenied, id)
	}
	if !t.reconciler.roster.allowed.has(allowance{node, id}) {
		return nil, fmt.Errorf("%w: node %s has no enrolled pod with identity %s", csr.ErrDenied, node, id)
	}
	chain, err := t.ca.Sign(id, csrPEM, ttl)
	if errors.Is(err, ca.ErrRequest) {
		return nil, fmt.Errorf("%w: %w", csr.ErrBadRequest, err)
	}
	return chain, err
}

// allowance lets a node have a leaf of an identity.
type allowance struct {
	node string
	id   mesh.ID
}

// allowances counts the pods because of which each is there. It is safe for concurrent use.
type allowances struct {
	mu      sync.RWMutex
	count   map[allowance]int // guarded by mu, never 0
	revoked []mesh.ID         // guarded by mu
}

func newAllowances() *allowances { return &allowances{count: make(map[allowance]int)} }

func (a *allowances) has(which allowance) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.count[which] > 0
}

func (a *allowances) isRevoked(id mesh.ID) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return slices.Contains(a.revoked, id)
}

// revoke has nobody signed for as one of these.
func (a *allowances) revoke(all []mesh.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.revoked = all
}

// replace puts next, nil for none, where one pod had another.
func (a *allowances) replace(had **allowance, next *allowance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if next != nil {
		a.count[*next]++
	}
	if old := *had; old != nil {
		if a.count[*old]--; a.count[*old] == 0 {
			delete(a.count, *old)
		}
	}
	*had = next
}
