package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"tacit.dev/mesh"
)

// maxRequest bounds the PEM of a signing request; one for P-256 has about 500 bytes.
const maxRequest = 16 << 10

// Sign returns a certificate for id and the key of the request: PEM of the
// leaf, the intermediate, and last the bundle. The leaf names id and nothing
// else; names inside the request must be absent or equal id. ttl is a wish: 0
// means the default, longer than the default is cut to it. An error that wraps
// ErrRequest is the requester's fault.
func (c *CA) Sign(id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	uri, err := c.checkID(id)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	key, err := parseRequest(csrPEM, id)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	template := leafTemplate(c.cfg.Now(), c.life(ttl))
	template.URIs = []*url.URL{uri}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	leaf, signer, err := c.issue(template, key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	chain := append(encodeCert(leaf), signer.pem()...)
	return append(chain, c.root.pem()...), nil
}

// ServerCertificate returns a new certificate and key for a server that is
// reached by these DNS names and IP addresses: control itself. It carries no
// identity, so it is worth nothing between pods.
func (c *CA) ServerCertificate(names []string) (*tls.Certificate, error) {
	if len(names) == 0 {
		return nil, errors.New("sign server certificate: no name")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("sign server certificate for %q: %w", names, err)
	}
	template := leafTemplate(c.cfg.Now(), serverLife)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	leaf, signer, err := c.issue(template, &key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("sign server certificate for %q: %w", names, err)
	}
	return serverChain(leaf, signer, key)
}

func serverChain(leaf []byte, signer *pair, key *ecdsa.PrivateKey) (*tls.Certificate, error) {
	cert, err := x509.ParseCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("read back server certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{leaf, signer.cert.Raw}, PrivateKey: key, Leaf: cert}, nil
}

func (c *CA) checkID(id mesh.ID) (*url.URL, error) {
	if again, err := mesh.ParseID(id.String()); err != nil || again != id {
		return nil, fmt.Errorf("%w: not an identity: %w", ErrRequest, err)
	}
	if id.TrustDomain != c.cfg.TrustDomain {
		return nil, fmt.Errorf("%w: trust domain %q, want %q", ErrRequest, id.TrustDomain, c.cfg.TrustDomain)
	}
	return url.Parse(id.String())
}

// life is how long a leaf lives for which ttl is wished.
func (c *CA) life(ttl time.Duration) time.Duration {
	if ttl <= 0 || ttl > c.cfg.LeafTTL {
		return c.cfg.LeafTTL
	}
	return max(ttl, time.Second)
}

// leafTemplate is valid for at least life from now on. It begins a little
// earlier, a twentieth of its life and two minutes at most: renewal is due at half
// of a leaf's life, which for a leaf of seconds would already be over otherwise.
// Certificates count in whole seconds, so both ends are rounded outwards.
func leafTemplate(now time.Time, life time.Duration) *x509.Certificate {
	return &x509.Certificate{
		NotBefore:             now.Add(-min(clockSkew, life/20)).UTC().Truncate(time.Second),
		NotAfter:              now.Add(life + time.Second - 1).UTC().Truncate(time.Second),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
}

// issue signs the template with the intermediate; a leaf never outlives it.
func (c *CA) issue(template *x509.Certificate, key *ecdsa.PublicKey) ([]byte, *pair, error) {
	signer, err := c.signer()
	if err != nil {
		return nil, nil, err
	}
	if template.NotAfter.After(signer.cert.NotAfter) {
		template.NotAfter = signer.cert.NotAfter
	}
	der, err := create(template, signer, key)
	return der, signer, err
}

// parseRequest returns the key of a PKCS #10 request (RFC 2986) that is signed
// with it. What else the request wishes is ignored, except names: they have to be
// absent or id itself, since a requester that wants something else is confused.
func parseRequest(csrPEM []byte, id mesh.ID) (*ecdsa.PublicKey, error) {
	if len(csrPEM) > maxRequest {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrRequest, len(csrPEM), maxRequest)
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		return nil, fmt.Errorf("%w: want one PEM block CERTIFICATE REQUEST", ErrRequest)
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: its own signature: %w", ErrRequest, err)
	}
	key, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: key %v: want ECDSA P-256", ErrRequest, req.PublicKeyAlgorithm)
	}
	return key, checkNames(req, id)
}

func checkNames(req *x509.CertificateRequest, id mesh.ID) error {
	if len(req.DNSNames)+len(req.IPAddresses)+len(req.EmailAddresses) != 0 {
		return fmt.Errorf("%w: it asks for names besides its identity", ErrRequest)
	}
	if len(req.URIs) > 1 || len(req.URIs) == 1 && req.URIs[0].String() != id.String() {
		return fmt.Errorf("%w: it names %v, want none or %s", ErrRequest, req.URIs, id)
	}
	return nil
}
