package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
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
	// NotAfter is when the leaf or one of its intermediates expires.
	NotAfter time.Time
	// Bundle is what peers are verified against as long as this leaf is used.
	Bundle *Bundle
}

// Signer asks a CA for a certificate. Sign may block until ctx is done and may
// be called by many at once. The answer is PEM: the leaf, intermediates, and
// last the roots, which are the bundle. The private key is never given to it.
type Signer interface {
	Sign(ctx context.Context, id mesh.ID, csrPEM []byte) (chainPEM []byte, err error)
}

// NewLeaf puts together what a Signer answered. It fails unless the chain
// proves id to its own bundle at the time now and belongs to key.
func NewLeaf(id mesh.ID, key crypto.Signer, chainPEM []byte, now time.Time) (*Leaf, error) {
	certs, err := parsePEM(chainPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", id, err)
	}
	chain, roots := splitRoots(certs)
	if len(chain) == 0 {
		return nil, fmt.Errorf("certificate of %s: no leaf among %d certificates", id, len(certs))
	}
	bundle, err := newBundle(roots)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", id, err)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("certificate of %s: it is for another key than the one it was asked for", id)
	}
	got, err := verifyChain(chain, bundle, now)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", id, err)
	}
	if got.id != id {
		return nil, fmt.Errorf("certificate of %s: it is for %s", id, got.id)
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return &Leaf{ID: id, Certificate: cert, NotBefore: got.notBefore, NotAfter: got.notAfter, Bundle: bundle}, nil
}

// splitRoots takes the self-signed certificates from the end of a chain.
func splitRoots(certs []*x509.Certificate) (chain, roots []*x509.Certificate) {
	i := len(certs)
	for i > 0 && certs[i-1].IsCA && bytes.Equal(certs[i-1].RawSubject, certs[i-1].RawIssuer) {
		i--
	}
	return certs[:i], certs[i:]
}

// valid reports whether the leaf may be used at the time now.
func (l *Leaf) valid(now time.Time) bool {
	return l != nil && !now.Before(l.NotBefore) && !now.After(l.NotAfter)
}

// newRequest makes a key, and the signing request for it. P-256 because both
// sides sign and verify once per full handshake, and it is the cheapest there.
func newRequest(id mesh.ID) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key for %s: %w", id, err)
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, nil, fmt.Errorf("make a signing request for %s: %w", id, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a signing request for %s: %w", id, err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}
