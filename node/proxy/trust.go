package proxy

import (
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
)

// What a handshake has proved counts for as long as the mesh says (mesh.Trust):
//
//	before a dial, after each handshake   revoked: refused
//	knowledge.apply: the next World       revoked: open connections are reset, kept ones end
//	queues.look, at intervals             too old, or a certificate has ended: reset
//
// Nobody can prove anew who is at the end of a connection that is open.

// revoked is why nobody connects as one of the identities, or to it; nil if none is revoked.
func revoked(w *mesh.World, ids ...mesh.ID) *refusal {
	for _, id := range ids {
		if w.IsRevoked(id) {
			return refuse(reasonRevoked, flagDenied, "%s is revoked", id)
		}
	}
	return nil
}

// isRevoked is revoked for the two ends of pc, by the World of now.
func (pc *peerConn) isRevoked() *refusal {
	return revoked(pc.d.p.know.world(), pc.Peer().ID, pc.d.id)
}

// lifetime is how old pc may become where most is the bound. The last tenth is spread, so that
// what began together does not end together.
func (pc *peerConn) lifetime(most time.Duration) time.Duration {
	return most - time.Duration(pc.born.UnixNano()%(int64(most)/10+1))
}

// proves notes who has proved to be at the other end, nil for nobody yet. From then on the
// connection ends when that counts no more.
func (c *queued) proves(pc *peerConn) { c.peer.Store(pc) }

// overdue is why the connection may not go on, nil if it may. most is mesh.Trust.MaxAge.
func (c *queued) overdue(now time.Time, most time.Duration) *refusal {
	pc := c.peer.Load()
	if pc == nil || most == 0 {
		return nil
	}
	switch {
	case now.After(pc.Peer().NotAfter):
		return refuse(identity.ReasonExpired, flagTimeout, "the certificate of %s ended", pc.Peer().ID)
	case now.After(pc.leaf.NotAfter):
		return refuse("own_"+identity.ReasonExpired, flagTimeout, "the own certificate of %s ended", pc.leaf.ID)
	case now.Sub(pc.born) >= pc.lifetime(most):
		return refuse(reasonMaxAge, flagTimeout, "it is older than maxConnectionAge of the Mesh, %s", most)
	}
	return nil
}

// endRevoked ends what was dialed, and is open or kept, of identities that are revoked in w.
// Proxy.review does the same for what has come in.
func (p *Proxy) endRevoked(w *mesh.World) {
	for _, c := range p.queues.list(nil) {
		pc := c.peer.Load()
		if pc == nil {
			continue
		}
		if why := revoked(w, pc.Peer().ID, c.d.id); why != nil && c.reset(why) {
			p.metrics.trustResets.WithLabelValues(why.reason).Inc()
		}
	}
	for _, d := range p.list() {
		d.idle.endIdle(func(pc *peerConn) bool { return revoked(w, pc.to.id, d.id) != nil })
	}
}

// endOverdue resets a connection that has become too old.
func (p *Proxy) endOverdue(c *queued, now time.Time) {
	if why := c.overdue(now, p.know.world().MaxAge()); why != nil && c.reset(why) {
		p.metrics.trustResets.WithLabelValues(why.reason).Inc()
	}
}
