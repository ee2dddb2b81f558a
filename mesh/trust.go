package mesh

import "time"

// MaxRevoked bounds Trust.Revoked.
const MaxRevoked = 1000

// Trust says which proved identities count, and for how long. A Place tells it: it holds for the
// whole mesh.
type Trust struct {
	// Revoked are identities that count no more, whatever their certificates say.
	Revoked []ID
	// MaxAge is how old a connection may become after its handshake. 0 is any age, also
	// beyond the end of the certificates.
	MaxAge time.Duration
}

// IsZero reports whether it says nothing.
func (t Trust) IsZero() bool { return len(t.Revoked) == 0 && t.MaxAge == 0 }

// IsRevoked reports whether an identity counts no more.
func (w *World) IsRevoked(id ID) bool {
	_, is := w.revoked.get(id)
	return is
}

// TrustVersion is another number when other identities are revoked than in a World before.
func (w *World) TrustVersion() uint64 { return w.trustVersion }

// MaxAge is Trust's.
func (w *World) MaxAge() time.Duration {
	by, ok := w.maxAge.owner.get(struct{}{})
	if !ok {
		return 0
	}
	return by.Trust.MaxAge
}

// changeTrust counts a place's Trust n times more.
func (m *making) changeTrust(p *Place, n int) {
	for _, id := range p.Trust.Revoked {
		count(&m.revoked, m.era, id, n)
		m.trustVersion++
	}
	if p.Trust.MaxAge == 0 {
		return
	}
	if n > 0 {
		m.maxAge.add(m.era, struct{}{}, p, byName)
	} else {
		m.maxAge.remove(m.era, struct{}{}, p)
	}
}
