package identity

import (
	"container/list"
	"crypto/rand"
	"crypto/tls"
	"sync"
	"sync/atomic"
	"time"

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
//
// Sessions never cross identities. crypto/tls finds a session by server name
// or address, which says nothing about who dials, and not enough about who
// is dialled: an address is another pod's tomorrow. So each triple of dialling
// identity, dialled identity and address has a session cache of its own, and
// each served leaf a ticket key of its own. A renewed leaf starts anew with
// both, so that no session outlives the certificate or the bundle it began with.
type TLS struct {
	verifier *Verifier
	maxPairs int

	mu sync.Mutex
	// clients are the remembered configurations, recent their order, the one
	// used last in front.
	clients map[pair]*list.Element
	recent  *list.List
	// servers has one entry per served identity, that of its last leaf.
	servers map[mesh.ID]server
}

type pair struct {
	from, to mesh.ID
	peerKey  string
}

type client struct {
	pair pair
	leaf *Leaf
	cfg  *tls.Config
}

type server struct {
	leaf *Leaf
	cfg  *tls.Config
}

// NewTLS returns a TLS that remembers nothing yet.
func NewTLS(cfg TLSConfig) *TLS {
	if cfg.Verifier == nil {
		cfg.Verifier = NewVerifier(0)
	}
	if cfg.MaxPairs <= 0 {
		cfg.MaxPairs = 2048
	}
	return &TLS{
		verifier: cfg.Verifier,
		maxPairs: cfg.MaxPairs,
		clients:  make(map[pair]*list.Element),
		recent:   list.New(),
		servers:  make(map[mesh.ID]server),
	}
}

// Client returns the configuration with which from dials the peer to, which
// must prove exactly that identity. peerKey is the address of the peer: sessions
// are resumed only with the same from, to and peerKey. The same
// configuration is returned as long as the leaf is the same. It is not to be changed.
func (t *TLS) Client(from *Leaf, to mesh.ID, peerKey string) *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := pair{from.ID, to, peerKey}
	if e := t.clients[key]; e != nil {
		t.recent.MoveToFront(e)
		c := e.Value.(*client)
		if c.leaf != from {
			c.leaf, c.cfg = from, t.newClient(from, to)
			t.dropOthers(from.ID, from)
		}
		return c.cfg
	}
	if t.recent.Len() >= t.maxPairs {
		e := t.recent.Back()
		delete(t.clients, t.recent.Remove(e).(*client).pair)
	}
	c := &client{key, from, t.newClient(from, to)}
	t.clients[key] = t.recent.PushFront(c)
	return c.cfg
}

// Server returns the configuration with which of is served: any identity of
// the same trust domain that proves itself to the bundle of the leaf is
// accepted. Who that is, and whether it may, is the caller's to decide. The
// same configuration is returned as long as the leaf is the same. It is not
// to be changed.
func (t *TLS) Server(of *Leaf) *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.servers[of.ID]
	if s.leaf != of {
		t.dropOthers(of.ID, of)
		s = server{of, t.newServer(of)}
		t.servers[of.ID] = s
	}
	return s.cfg
}

// Forget drops what is remembered of an identity that is not served any more.
func (t *TLS) Forget(id mesh.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropOthers(id, nil)
}

// dropOthers drops what is remembered of an identity with another leaf than this, so that the key of
// an old one is not kept for a peer that is never dialled again. The caller holds mu.
func (t *TLS) dropOthers(id mesh.ID, leaf *Leaf) {
	if t.servers[id].leaf != leaf {
		delete(t.servers, id)
	}
	for e := t.recent.Front(); e != nil; {
		next := e.Next()
		if c := e.Value.(*client); c.pair.from == id && c.leaf != leaf {
			t.recent.Remove(e)
			delete(t.clients, c.pair)
		}
		e = next
	}
}

func (t *TLS) newClient(from *Leaf, to mesh.ID) *tls.Config {
	cfg := base()
	// crypto/tls would look for a host name. VerifyConnection checks more: the
	// chain and exactly one identity, on full and on resumed handshakes.
	cfg.InsecureSkipVerify = true
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return from.Certificate, nil
	}
	cfg.ClientSessionCache = new(oneSession)
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		id, err := t.verify(cs, from)
		if err == nil && id != to {
			err = refuse(ReasonWrongIdentity, "it is %s: want %s", id, to)
		}
		return err
	}
	return cfg
}

func (t *TLS) newServer(of *Leaf) *tls.Config {
	cfg := base()
	cfg.Certificates = []tls.Certificate{*of.Certificate}
	// Any certificate, because VerifyConnection verifies it; and unlike what
	// crypto/tls does by itself, on resumed handshakes too.
	cfg.ClientAuth = tls.RequireAnyClientCert
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := t.verify(cs, of)
		return err
	}
	var ticketKey [32]byte
	rand.Read(ticketKey[:])
	cfg.SetSessionTicketKeys([][32]byte{ticketKey})
	return cfg
}

// base is what both sides have in common. RFC 8446 leaves no choice of suites
// to crypto/tls; it takes AES-GCM wherever the machine has instructions for it.
func base() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
	}
}

// verify checks what holds for both sides and for every handshake.
func (t *TLS) verify(cs tls.ConnectionState, own *Leaf) (mesh.ID, error) {
	now := time.Now()
	if !own.valid(now) {
		return mesh.ID{}, refuse(ReasonExpired, "our own certificate of %s was valid to %s", own.ID, stamp(own.NotAfter))
	}
	id, err := t.verifier.Verify(cs.PeerCertificates, own.Bundle, now)
	if err == nil && id.TrustDomain != own.ID.TrustDomain {
		err = refuse(ReasonWrongTrustDomain, "it is %s: want trust domain %s", id, own.ID.TrustDomain)
	}
	return id, err
}

// oneSession is the session cache of one pair: it keeps the newest session and
// ignores the key, which crypto/tls makes of an address.
type oneSession struct {
	last atomic.Pointer[tls.ClientSessionState]
}

// Get implements tls.ClientSessionCache.
func (s *oneSession) Get(string) (*tls.ClientSessionState, bool) {
	cs := s.last.Load()
	return cs, cs != nil
}

// Put implements tls.ClientSessionCache; nil forgets the session.
func (s *oneSession) Put(_ string, cs *tls.ClientSessionState) { s.last.Store(cs) }
