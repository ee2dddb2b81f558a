// Package ca is the certificate authority of one trust domain: a root that
// signs one intermediate, and the intermediate, which signs leaves. It stands
// where knowledge becomes proof: control asks it for a leaf, the node's proxy
// uses it. It refuses to decide who may have which identity (control does), to
// sign anything but identities of its own trust domain, and to show its keys.
package ca

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"time"

	"tacit.dev/mesh"
)

// ErrRequest is wrapped by errors of Sign that are the requester's fault.
var ErrRequest = errors.New("bad signing request")

// Config is what Open needs.
type Config struct {
	// Dir keeps keys and certificates. It is made with mode 0700 if missing;
	// only one process may use it at a time.
	Dir string
	// TrustDomain is the only one that is signed for.
	TrustDomain string
	// LeafTTL is how long a leaf lives at most, and by default. 0 means 24 h;
	// at least one second.
	LeafTTL time.Duration
	// Now is the clock. nil means time.Now.
	Now func() time.Time
	// Log is told of new keys. nil means nowhere.
	Log *slog.Logger
}

// CA signs. It is safe for concurrent use.
type CA struct {
	cfg Config
}

// Open loads root and intermediate from cfg.Dir, and makes what is missing.
func Open(cfg Config) (*CA, error) { return &CA{cfg: cfg}, nil }

// Sign returns a certificate for id and the key of the request: PEM of the
// leaf, the intermediate, and last the bundle. The leaf names id and nothing
// else; names inside the request must be absent or equal id. ttl is a wish: 0
// means the default, longer than the default is cut to it. An error that wraps
// ErrRequest is the requester's fault.
func (c *CA) Sign(id mesh.ID, csrPEM []byte, ttl time.Duration) ([]byte, error) {
	return nil, errors.New("sign: not yet")
}

// Bundle returns the PEM of all roots that are trusted. The caller owns it.
func (c *CA) Bundle() []byte { return nil }

// ServerCertificate returns a new certificate and key for a server that is
// reached by these DNS names and IP addresses: control itself. It carries no
// identity, so it is worth nothing between pods.
func (c *CA) ServerCertificate(names []string) (*tls.Certificate, error) {
	return nil, errors.New("server certificate: not yet")
}
