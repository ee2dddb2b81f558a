package identity

import (
	"crypto/tls"

	"tacit.dev/mesh"
)

// TLSConfig is what TLS needs.
type TLSConfig struct {
	// Verifier is shared by all connections; nil makes one.
	Verifier *Verifier
	// MaxPairs bounds the remembered client configurations, and so the
	// sessions; 0 means 2048. The one used longest ago is forgotten first.
	MaxPairs int
}

// TLS makes the TLS configurations of leaves. It may be used by many at once.
type TLS struct{}

// NewTLS returns a TLS that remembers nothing yet.
func NewTLS(cfg TLSConfig) *TLS { return &TLS{} }

// Client returns the configuration with which from dials the peer to, which
// must prove exactly that identity. peerKey is the address of the peer: sessions
// are resumed only with the same from, to and peerKey. The same
// configuration is returned as long as the leaf is the same. It is not to be changed.
func (t *TLS) Client(from *Leaf, to mesh.ID, peerKey string) *tls.Config { return &tls.Config{} }

// Server returns the configuration with which of is served: any identity of
// the same trust domain that proves itself to the bundle of the leaf is
// accepted. Who that is, and whether it may, is the caller's to decide. The
// same configuration is returned as long as the leaf is the same. It is not
// to be changed.
func (t *TLS) Server(of *Leaf) *tls.Config { return &tls.Config{} }
