package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"sync"
	"time"

	"tacit.dev/mesh"
)

// VerifyError says why a peer's certificate was not accepted.
type VerifyError struct {
	// Reason is one of the Reason constants.
	Reason string
	Err    error
}

func (e *VerifyError) Error() string { return "verify peer: " + e.Err.Error() }

func (e *VerifyError) Unwrap() error { return e.Err }

func refuse(reason, format string, args ...any) error {
	return &VerifyError{Reason: reason, Err: fmt.Errorf(format, args...)}
}

// Verifier verifies chains of peers and remembers, per leaf and bundle, those
// that were good. It may be used by many at once.
type Verifier struct {
	max int

	mu sync.Mutex
	// young and old hold what was good. When young is full it becomes old, and
	// what was old is forgotten: that bounds both without a list to keep.
	young, old map[leafKey]proof
}

type leafKey struct{ leaf, bundle [sha256.Size]byte }

// proof is what a good chain proves, and when.
type proof struct {
	id                  mesh.ID
	notBefore, notAfter time.Time
}

// NewVerifier returns a Verifier that remembers at most max leaves (0 means 4096).
func NewVerifier(max int) *Verifier {
	if max <= 0 {
		max = 4096
	}
	return &Verifier{max: max, young: make(map[leafKey]proof), old: make(map[leafKey]proof)}
}

// Verify returns the identity that chain (leaf first) proves at the time now
// to those who trust bundle. The error is a *VerifyError.
//
// The signatures are checked once per leaf and bundle; the times, always. Only
// good chains are remembered, so that nobody can fill the memory with bad ones.
func (v *Verifier) Verify(chain []*x509.Certificate, bundle *Bundle, now time.Time) (mesh.ID, error) {
	if len(chain) == 0 {
		return mesh.ID{}, refuse(ReasonNoCertificate, "the peer sent no certificate")
	}
	key := leafKey{sha256.Sum256(chain[0].Raw), bundle.hash}
	p, ok := v.recall(key)
	if ok && !now.Before(p.notBefore) && !now.After(p.notAfter) {
		return p.id, nil
	}
	// Not known, or known by a chain that is over: perhaps this one is not.
	p, err := verifyChain(chain, bundle, now)
	if err != nil {
		return mesh.ID{}, err
	}
	v.remember(key, p)
	return p.id, nil
}

func (v *Verifier) recall(key leafKey) (proof, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if p, ok := v.young[key]; ok {
		return p, true
	}
	p, ok := v.old[key]
	if ok {
		v.add(key, p)
	}
	return p, ok
}

func (v *Verifier) remember(key leafKey, p proof) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.add(key, p)
}

func (v *Verifier) add(key leafKey, p proof) {
	if len(v.young) >= (v.max+1)/2 {
		v.young, v.old = make(map[leafKey]proof), v.young
	}
	v.young[key] = p
}

// verifyChain checks everything, without memory.
func verifyChain(chain []*x509.Certificate, bundle *Bundle, now time.Time) (proof, error) {
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return proof{}, err
	}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return proof{}, refuse(ReasonExpired, "certificate of %s is valid from %s to %s, and it is %s",
			id, stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(now))
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         bundle.roots,
		Intermediates: between,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return proof{}, refuse(chainReason(err), "certificate of %s, to bundle %s: %w", id, bundle.Fingerprint(), err)
	}
	return longest(id, chains), nil
}

// longest takes, of several good chains, the one that stays good for longest.
func longest(id mesh.ID, chains [][]*x509.Certificate) proof {
	var best proof
	for _, chain := range chains {
		p := proof{id: id, notBefore: chain[0].NotBefore, notAfter: chain[0].NotAfter}
		for _, c := range chain[1:] {
			if c.NotBefore.After(p.notBefore) {
				p.notBefore = c.NotBefore
			}
			if c.NotAfter.Before(p.notAfter) {
				p.notAfter = c.NotAfter
			}
		}
		if p.notAfter.After(best.notAfter) {
			best = p
		}
	}
	return best
}

func chainReason(err error) string {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return ReasonForeignRoot
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return ReasonExpired
	}
	return ReasonBadCertificate
}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// LeafID reads the identity that a certificate claims. It proves nothing by
// itself. The error is a *VerifyError.
func LeafID(leaf *x509.Certificate) (mesh.ID, error) { return leafID(leaf) }

// leafID reads the URI SAN from the extension itself: url.URL, which crypto/x509
// offers, has been normalised, and identities are compared exactly.
func leafID(leaf *x509.Certificate) (mesh.ID, error) {
	if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 {
		return mesh.ID{}, refuse(ReasonBadCertificate, "certificate of %v is a CA, not a leaf (X509-SVID §5.2)", leaf.URIs)
	}
	uris, err := uriNames(leaf)
	if err != nil {
		return mesh.ID{}, refuse(ReasonBadCertificate, "subject alternative names: %w", err)
	}
	if len(uris) != 1 {
		return mesh.ID{}, refuse(ReasonBadCertificate, "%d URI SANs %q: want exactly one (X509-SVID §2)", len(uris), uris)
	}
	id, err := mesh.ParseID(uris[0])
	if err != nil {
		return mesh.ID{}, refuse(ReasonBadCertificate, "%w", err)
	}
	return id, nil
}

func uriNames(leaf *x509.Certificate) ([]string, error) {
	const tagURI = 6 // uniformResourceIdentifier [6] IA5String, RFC 5280 §4.2.1.6
	var uris []string
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil {
			return nil, err
		} else if len(rest) > 0 {
			return nil, fmt.Errorf("%d bytes after the sequence", len(rest))
		}
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
				uris = append(uris, string(n.Bytes))
			}
		}
	}
	return uris, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
