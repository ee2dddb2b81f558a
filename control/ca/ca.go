// Package ca is the certificate authority of one trust domain: a root that
// signs one intermediate, and the intermediate, which signs leaves. It stands
// where knowledge becomes proof: control asks it for a leaf, the node's proxy
// uses it. It refuses to decide who may have which identity (control does), to
// sign anything but identities of its own trust domain, and to show its keys.
package ca

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"tacit.dev/mesh"
)

const (
	rootLife         = 10 * 365 * 24 * time.Hour
	intermediateLife = 365 * 24 * time.Hour
	serverLife       = 24 * time.Hour
	// DefaultLeafTTL is how long a leaf lives if nobody says otherwise.
	DefaultLeafTTL = 24 * time.Hour
	// clockSkew is how far back a certificate begins at most, for verifiers
	// whose clock is behind.
	clockSkew = 2 * time.Minute

	// The names under which pairs are kept.
	rootPair         = "root"
	intermediatePair = "intermediate"
)

// ErrRequest is wrapped by errors of Sign that are the requester's fault.
var ErrRequest = errors.New("bad signing request")

// Config is what Open needs.
type Config struct {
	// Store keeps keys and certificates.
	Store Store
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

func (c Config) validate() error {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("no store for the CA's keys"))
	}
	if _, err := mesh.ParseID(mesh.ID{TrustDomain: c.TrustDomain, Namespace: "n", ServiceAccount: "s"}.String()); err != nil {
		errs = append(errs, fmt.Errorf("trust domain %q: want 1 to 253 of a-z A-Z 0-9 . _ -", c.TrustDomain))
	}
	if c.LeafTTL < time.Second {
		errs = append(errs, fmt.Errorf("leaf ttl %v: want at least 1s", c.LeafTTL))
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.LeafTTL == 0 {
		c.LeafTTL = DefaultLeafTTL
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// CA signs. It is safe for concurrent use.
type CA struct {
	cfg Config

	mu           sync.Mutex // guards what follows; held while an intermediate is made
	root         *pair
	intermediate *pair
}

// Open loads root and intermediate from cfg.Store, and makes what is missing.
// The root's key is needed only to make an intermediate: it may be kept elsewhere as
// long as the intermediate lasts.
func Open(cfg Config) (*CA, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	root, err := openRoot(cfg)
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	c := &CA{cfg: cfg, root: root}
	if c.intermediate, err = load(cfg.Store, intermediatePair); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if _, err := c.signer(); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	return c, nil
}

// openRoot loads the root. It makes one only where nothing is: a root that is
// there and unreadable must not be replaced, since every node trusts it.
func openRoot(cfg Config) (*pair, error) {
	root, err := load(cfg.Store, rootPair)
	if err != nil || root != nil {
		return root, checkRoot(root, cfg, err)
	}
	root, err = makeRoot(cfg.TrustDomain, cfg.Now())
	if err != nil {
		return nil, err
	}
	err = root.save(cfg.Store, rootPair)
	if errors.Is(err, fs.ErrExist) { // another process was faster
		root, err = load(cfg.Store, rootPair)
		return root, checkRoot(root, cfg, err)
	}
	if err == nil {
		cfg.Log.Info("root made", "store", cfg.Store.String(), "trust_domain", cfg.TrustDomain, "expires", root.cert.NotAfter)
	}
	return root, err
}

func checkRoot(root *pair, cfg Config, err error) error {
	if err != nil {
		return err
	}
	if root == nil {
		return fmt.Errorf("the root of %v is gone again", cfg.Store)
	}
	if want := rootName(cfg.TrustDomain); root.cert.Subject.CommonName != want {
		return fmt.Errorf("the root of %v is %q, want %q: another trust domain needs a store of its own",
			cfg.Store, root.cert.Subject.CommonName, want)
	}
	if !cfg.Now().Before(root.cert.NotAfter) {
		return fmt.Errorf("the root of %v expired at %v", cfg.Store, root.cert.NotAfter)
	}
	return nil
}

// signer returns an intermediate with at least a fifth of its life left, and
// makes it if need be. If it cannot be made, the old one serves to its end.
func (c *CA) signer() (*pair, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	old := c.intermediate
	if old != nil && (old.key == nil || old.cert.CheckSignatureFrom(c.root.cert) != nil) {
		c.cfg.Log.Warn("intermediate is without key, or not of this root", "store", c.cfg.Store.String())
		old = nil
	}
	if old != nil && old.cert.NotAfter.Sub(now) > intermediateLife/5 {
		return old, nil
	}
	fresh, err := c.newIntermediate(now)
	if err != nil && old != nil && now.Before(old.cert.NotAfter) {
		c.cfg.Log.Error("intermediate not renewed", "error", err, "expires", old.cert.NotAfter)
		return old, nil
	}
	if err != nil {
		return nil, err
	}
	c.intermediate = fresh
	return fresh, nil
}

func (c *CA) newIntermediate(now time.Time) (*pair, error) {
	if c.root.key == nil {
		return nil, fmt.Errorf("sign intermediate: the root's key is missing in %v: put it back, or an intermediate of this root", c.cfg.Store)
	}
	p, err := makeIntermediate(c.root, c.cfg.TrustDomain, now)
	if err != nil {
		return nil, err
	}
	err = p.save(c.cfg.Store, intermediatePair)
	if errors.Is(err, fs.ErrExist) { // another process was faster
		p, err = load(c.cfg.Store, intermediatePair)
		if err == nil && (p == nil || p.key == nil) {
			err = fmt.Errorf("the intermediate of %v is gone again", c.cfg.Store)
		}
		return p, err
	}
	if err != nil {
		return nil, err
	}
	c.cfg.Log.Info("intermediate made", "store", c.cfg.Store.String(), "expires", p.cert.NotAfter)
	return p, nil
}

// Secret is known to whoever holds the intermediate's key, and to nobody else; the key
// does not follow from it. It changes with the intermediate.
func (c *CA) Secret(purpose string) ([]byte, error) {
	signer, err := c.signer()
	if err != nil {
		return nil, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(signer.key)
	if err != nil {
		return nil, fmt.Errorf("secret of the intermediate: %w", err)
	}
	return hkdf.Key(sha256.New, key, nil, purpose, sha256.Size)
}

// Bundle returns the PEM of all roots that are trusted. The caller owns it.
func (c *CA) Bundle() []byte { return bytes.Clone(c.root.pem()) }

// Ends says when the CA's certificates end, by name.
func (c *CA) Ends() map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	ends := map[string]time.Time{rootPair: c.root.cert.NotAfter}
	if c.intermediate != nil {
		ends[intermediatePair] = c.intermediate.cert.NotAfter
	}
	return ends
}
