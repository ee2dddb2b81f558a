package identity

import (
	"context"
	"crypto/tls"
	"time"

	"tacit.dev/mesh"
)

// Leaf is the certificate of one identity, its key, and the bundle that came
// with it. It is immutable; a renewal makes another one.
type Leaf struct {
	ID mesh.ID
	// Certificate is the leaf and its intermediates, with the private key.
	Certificate *tls.Certificate
	NotBefore   time.Time
	NotAfter    time.Time
	// Bundle is what peers are verified against as long as this leaf is used.
	Bundle *Bundle
}

// Signer asks a CA for a certificate. Sign may block until ctx is done and may
// be called by many at once. The answer is PEM: the leaf, intermediates, and
// last the roots, which are the bundle. The private key is never given to it.
type Signer interface {
	Sign(ctx context.Context, id mesh.ID, csrPEM []byte) (chainPEM []byte, err error)
}
