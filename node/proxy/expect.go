package proxy

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"tacit.dev/mesh"
)

// expectation is what the receiver makes of a new connection, before a byte of it
// has come.
type expectation uint8

const (
	// expectPlaintext: served at once, without a look.
	expectPlaintext expectation = iota
	// expectEither: looked at for the time of LookLimit, then plaintext.
	expectEither
	// expectNews: waited for as with expectDirect, but who speaks plaintext may do
	// so. Who says nothing is refused: were it TLS that is late, and the
	// application spoke first, its words would be on the wire in clear.
	expectNews
	// expectDirect: TLS, or refused.
	expectDirect
)

// standing is what others may know of the pod that receives.
type standing uint8

const (
	// unannounced: to the others the pod is outside of the mesh.
	unannounced standing = iota
	// news: announced so recently that some nodes may not know it.
	news
	// announced: every node knows it.
	announced
)

// expect is the receiver's decision table: whom the World knows at the source address,
// and the source port.
//
//	source                      port marked     not marked
//	mesh pod                    direct          direct: the port was rewritten on the way
//	  that may not know us yet  news            either
//	  that may exclude this pod news            either
//	  and has marked ports      either          either
//	enrolled pod                news            either
//	pod outside of it           either          plaintext
//	unknown                     either          plaintext
//
// A mesh pod is captured, so plaintext of its own accord comes only from what it
// excludes. Everything else is plaintext that went around a proxy: to an address that
// nobody knew, or past rules that are gone. As long as the receiver is news, or unannounced, a
// mesh pod may take it for outside: plaintext is let in, and from a port that is not marked
// nobody waits for TLS longer than a look.
//
// A pod is captured before it is announced, and withdrawn before it is released: in
// between it is enrolled and not yet, or no longer, a mesh pod, and speaks TLS, always from a
// marked port (awaitsTLS). So may one that only our World does not know to be
// enrolled. Without the look its ClientHello would reach the application.
func expect(source *mesh.Peer, port uint16, self standing, excluded bool) expectation {
	marked := mesh.IsDirectPort(port)
	switch {
	case !isMesh(source) && isEnrolled(source) && marked:
		return expectNews
	case !isMesh(source) && (isEnrolled(source) || marked):
		return expectEither
	case !isMesh(source):
		return expectPlaintext
	case excluded && source.MarkedPorts, !marked && (excluded || self != announced):
		return expectEither
	case excluded || self != announced:
		return expectNews
	}
	return expectDirect
}

func isMesh(w *mesh.Peer) bool { return w != nil && w.Direct }

func isEnrolled(w *mesh.Peer) bool { return w != nil && w.Enrolled }

// mayExclude reports whether an exclusion of the source may have led to the port of self
// that was dialled: the source's rules see what the application dials, which may be a
// service, or a port of a node.
func mayExclude(w *mesh.World, source, self *mesh.Peer, dialled netip.AddrPort) bool {
	if source == nil || len(source.ExcludeOutbound) == 0 {
		return false
	}
	excludes := func(to netip.AddrPort) bool {
		return slices.ContainsFunc(source.ExcludeOutbound, func(e mesh.Exclusion) bool { return e.Has(to) })
	}
	if excludes(dialled) || self == nil {
		return excludes(dialled)
	}
	for _, p := range self.Services {
		s := w.ServiceNamed(p.Service)
		if s != nil && p.Target == dialled.Port() && (slices.ContainsFunc(fronts(s, p.Port.Service), excludes) ||
			slices.ContainsFunc(s.NodePorts, func(n mesh.NodePort) bool { return n.Service == p.Port.Service && excludesNode(w, source, n.Node) })) {
			return true
		}
	}
	return slices.ContainsFunc(self.HostPorts, func(p mesh.HostPort) bool {
		return p.Target == dialled.Port() && excludesNode(w, source, p.Port)
	})
}

// excludesNode reports whether the source may reach a port of a node in plaintext.
func excludesNode(w *mesh.World, source *mesh.Peer, port uint16) bool {
	return slices.ContainsFunc(source.ExcludeOutbound, func(e mesh.Exclusion) bool {
		return (e.Port == 0 || e.Port == port) && (!e.Prefix.IsValid() || w.HasNodeIn(e.Prefix))
	})
}

// fronts are where a port of a service may be dialled, but for the addresses of nodes.
func fronts(s *mesh.Service, port uint16) (all []netip.AddrPort) {
	for _, a := range slices.Concat(s.Addresses, s.External) {
		all = append(all, netip.AddrPortFrom(a, port))
	}
	return all
}

// expect is what the receiver makes of j if w is known.
func (d *pod) expect(j *journey, w *mesh.World) expectation {
	source, self := w.Workload(j.flow.SourceAddr.Addr()), d.self(w)
	return expect(source, j.flow.SourceAddr.Port(), d.standing(self), mayExclude(w, source, self, j.flow.Dialled))
}

// standing tells what others may know of this pod, self in the World. One that has not
// heard that it is announced dials in plaintext, and a NAT on its way may have given it a
// marked port.
func (d *pod) standing(self *mesh.Peer) standing {
	if !isMesh(self) {
		d.announced.Store(0)
		return unannounced
	}
	now := time.Now().UnixNano()
	d.announced.CompareAndSwap(0, now)
	if now-d.announced.Load() < int64(d.p.cfg.AnnounceGrace) {
		return news
	}
	return announced
}

// awaitReason reports whether a reason for the plaintext of j becomes known within
// AnnounceGrace: this pod leaves the mesh, or the source is another pod than our World has
// it, or has exclusions by now. The peer may have heard of it before us.
func (d *pod) awaitReason(ctx context.Context, j *journey) bool {
	j.place.leave() // nobody else is to wait for that
	ctx, cancel := context.WithTimeout(ctx, d.p.cfg.AnnounceGrace)
	defer cancel()
	return d.p.know.awaitWorld(ctx, func(w *mesh.World) bool {
		source, self := w.Workload(j.flow.SourceAddr.Addr()), d.self(w)
		if isMesh(self) && isMesh(source) && !mayExclude(w, source, self, j.flow.Dialled) {
			return false
		}
		j.flow.Source, j.flow.Destination = source, self
		return true
	})
}
