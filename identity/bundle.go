package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// Bundle is the set of trusted roots. It is immutable.
type Bundle struct {
	roots *x509.CertPool
	count int
	hash  [sha256.Size]byte
}

// ParseBundle reads root certificates, at least one, from PEM.
func ParseBundle(pem []byte) (*Bundle, error) {
	certs, err := parsePEM(pem)
	if err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	return newBundle(certs)
}

func newBundle(roots []*x509.Certificate) (*Bundle, error) {
	if len(roots) == 0 {
		return nil, errors.New("parse bundle: no root certificate in it")
	}
	b := &Bundle{roots: x509.NewCertPool(), count: len(roots)}
	h := sha256.New()
	for _, c := range roots {
		if !c.IsCA {
			return nil, fmt.Errorf("parse bundle: certificate %q is not a CA", c.Subject)
		}
		b.roots.AddCert(c)
		h.Write(c.Raw)
	}
	h.Sum(b.hash[:0])
	return b, nil
}

// Len is the number of roots.
func (b *Bundle) Len() int { return b.count }

// Fingerprint names the set of roots, in their order.
func (b *Bundle) Fingerprint() string { return hex.EncodeToString(b.hash[:8]) }

// Equal reports whether both hold the same roots in the same order.
func (b *Bundle) Equal(o *Bundle) bool { return o != nil && b.hash == o.hash }

// parsePEM reads all CERTIFICATE blocks; any other block is an error.
func parsePEM(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return nil, fmt.Errorf("%d bytes that are not PEM after certificate %d", len(rest), len(certs))
			}
			return certs, nil
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %q: want CERTIFICATE", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs, text = append(certs, c), rest
	}
}
