package proxy

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
	"tacit.dev/relay"
	"tacit.dev/wire/direct"
)

// inbound takes a connection that came for the pod to its application, which
// it returns. Nothing of what came has been consumed, but the preamble.
func (d *pod) inbound(ctx context.Context, j *journey) (relay.Conn, error) {
	w := d.p.know.world()
	j.flow.Source, j.flow.Destination = w.Workload(j.flow.SourceAddr.Addr()), d.self(w)
	if j.flow.Dialled.Port() == mesh.InboundPort { // the listener for outbound has a loopback address
		return nil, refuse(reasonCapturePort, flagUpstreamFailure, "%s dialled a port of the mesh's own", j.flow.SourceAddr)
	}
	e := d.expect(j, w)
	kind, err := d.look(ctx, j, e)
	if kind == direct.KindQuiet && err == nil && e >= expectNews {
		e, kind, err = d.lookOn(ctx, j, e)
	}
	switch {
	case err != nil:
		return nil, err
	case kind == direct.KindDirect:
		return d.admitDirect(ctx, j)
	case kind == direct.KindQuiet && e == expectEither:
		return d.admitFirstWord(ctx, j)
	}
	return d.admitPlaintext(ctx, j)
}

// look tells TLS from plaintext, and refuses what is plaintext where TLS is
// expected. KindQuiet is somebody who waits for the server, or is late.
func (d *pod) look(ctx context.Context, j *journey, e expectation) (direct.Kind, error) {
	if e == expectPlaintext {
		return direct.KindPlain, nil
	}
	if e == expectEither && !isMesh(j.flow.Source) {
		j.place.leave() // it may be quiet, and nobody else is to wait for that
	}
	kind, err := d.peek(ctx, j, d.p.cfg.LookLimit)
	if err != nil {
		return kind, err
	}
	return d.judge(ctx, j, e, kind)
}

// lookOn goes on to look at who has said nothing for the time of a look where TLS is expected,
// until the time of a handshake is over. The World may turn out to expect something else: the
// peer may have heard before us that this pod leaves, and wait for its first word.
func (d *pod) lookOn(ctx context.Context, j *journey, e expectation) (expectation, direct.Kind, error) {
	limit := d.p.cfg.HandshakeTimeout - d.p.cfg.LookLimit
	until, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	now := e // the watcher's own, until it has ended
	var watcher sync.WaitGroup
	watcher.Go(func() {
		d.p.know.awaitWorld(until, func(w *mesh.World) bool { now = d.expect(j, w); return now < expectNews })
		cancel()
	})
	kind, err := d.peek(until, j, 0)
	cancel()
	watcher.Wait()
	switch {
	case ctx.Err() != nil:
		return e, kind, ctx.Err()
	case now < expectNews && kind == direct.KindQuiet: // plaintext it may be; a ClientHello still meets TLS
		w := d.p.know.world()
		j.flow.Source, j.flow.Destination = w.Workload(j.flow.SourceAddr.Addr()), d.self(w)
		return expectEither, kind, nil
	case until.Err() != nil && kind == direct.KindQuiet:
		return e, kind, refuse(identity.ReasonTimeout, flagTimeout, "no ClientHello from a pod of the mesh in %s", d.p.cfg.HandshakeTimeout)
	case err != nil:
		return e, kind, err
	}
	kind, err = d.judge(ctx, j, e, kind)
	return e, kind, err
}

// judge refuses what may not be, where it has said what it is.
func (d *pod) judge(ctx context.Context, j *journey, e expectation, kind direct.Kind) (direct.Kind, error) {
	switch {
	case kind == direct.KindDirect, kind == direct.KindQuiet, e < expectDirect:
		return kind, nil
	case d.awaitReason(ctx, j):
		return kind, nil
	case kind == direct.KindOtherTLS:
		return kind, refuse(identity.ReasonNotOurProtocol, flagDenied, "TLS of another kind from a pod of the mesh")
	}
	return kind, refuse(identity.ReasonNotTLS, flagDenied, "no TLS from a pod of the mesh")
}

// peek is one of the pod's looks. A limit of 0 is none.
func (d *pod) peek(ctx context.Context, j *journey, limit time.Duration) (direct.Kind, error) {
	from := j.flow.SourceAddr.Addr()
	if !d.looks.begin(from) {
		return direct.KindQuiet, &refusal{reasonQuietLimit, flagOverload, errQuietLimit}
	}
	defer d.looks.end(from)
	kind, err := direct.Look(ctx, j.conn, limit)
	if err != nil {
		return kind, &refusal{identity.Reason(err), flagDownstreamReset, err}
	}
	return kind, nil
}

// admitFirstWord dials the application for a client that has said nothing while
// it was looked at. Who speaks first decides: if it is the application, or
// the client in plaintext, then plaintext it is. A ClientHello that was late, as on
// an overloaded node, still meets TLS, and never the application. There is no limit of time:
// an idle connection of a pool costs as little here as when it is joined.
func (d *pod) admitFirstWord(ctx context.Context, j *journey) (relay.Conn, error) {
	app, err := d.admitPlaintext(ctx, j)
	if isDenied(err) {
		return d.admitLate(ctx, j, err)
	}
	if err != nil {
		return nil, err
	}
	spoken, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	wait.Go(func() {
		_ = app.AwaitReadable()
		stop()
	})
	kind, err := d.peek(spoken, j, 0)
	app.SetReadDeadline(time.Unix(1, 0)) // ends the wait; Join lifts it
	wait.Wait()
	switch {
	case ctx.Err() != nil:
		app.Abort()
		return nil, ctx.Err()
	case err != nil && !errors.Is(err, context.Canceled): // not: the application spoke
		app.Abort()
		return nil, err
	case kind == direct.KindDirect:
		app.Abort()
		return d.admitDirect(ctx, j)
	}
	return app, nil
}

// admitLate waits for the ClientHello of who has said nothing yet, where plaintext is denied.
func (d *pod) admitLate(ctx context.Context, j *journey, denied error) (relay.Conn, error) {
	until, cancel := context.WithTimeout(ctx, d.p.cfg.HandshakeTimeout)
	defer cancel()
	if kind, err := d.peek(until, j, 0); err == nil && kind == direct.KindDirect {
		return d.admitDirect(ctx, j)
	}
	return nil, denied
}

// admitPlaintext passes a connection from outside the mesh on: the mode is permissive.
func (d *pod) admitPlaintext(ctx context.Context, j *journey) (relay.Conn, error) {
	j.kind = outside
	if j.flow.Source != nil {
		j.kind = plaintext
	}
	if err := d.permit(j, mesh.ID{}); err != nil {
		return nil, err
	}
	return d.dialApplication(ctx, j, j.flow.SourceAddr.Port())
}

// admitDirect proves who the peer is, dials the application, and tells the peer.
func (d *pod) admitDirect(ctx context.Context, j *journey) (relay.Conn, error) {
	j.kind, j.flow.Security = mutual, mesh.MutualTLS
	pc, hello, err := d.answer(ctx, j)
	if err != nil {
		return nil, err
	}
	return d.admit(ctx, j, pc, hello)
}

// admit dials the application for what came over pc, and tells the peer.
func (d *pod) admit(ctx context.Context, j *journey, pc *peerConn, hello direct.Hello) (relay.Conn, error) {
	j.kind, j.flow.Security = mutual, mesh.MutualTLS
	j.near, j.flow.Resumed = pc, pc.Peer().Resumed
	j.queued.proves(pc)
	j.flow.SourceID, j.flow.DestinationID = pc.Peer().ID, d.id
	app, err := d.admitPeer(ctx, j, pc.Peer().ID, hello)
	pc.SetWriteDeadline(time.Now().Add(d.p.cfg.HandshakeTimeout)) // relay lifts it
	if err != nil {
		if pc.Reply(replyOf(refusalOf(err))) == nil && pc.Conn.CloseWrite() == nil {
			pc.Conn.Close()
		}
		return nil, err
	}
	if err := pc.Reply(direct.Reply{Status: direct.StatusOK}); err != nil {
		app.Abort()
		return nil, &refusal{reasonReset, flagDownstreamReset, err}
	}
	return app, nil
}

// admitPeer dials the application for a peer whose identity is proved.
func (d *pod) admitPeer(ctx context.Context, j *journey, id mesh.ID, hello direct.Hello) (relay.Conn, error) {
	if err := j.identify(id); err != nil {
		return nil, err
	}
	if err := d.permit(j, id); err != nil {
		return nil, err
	}
	j.flow.Service = serviceNamed(d.p.know.world(), j.flow.Destination, hello.Service)
	return d.dialApplication(ctx, j, j.sourcePort(hello))
}

// sourcePort is the port of the client's application, as its proxy tells, for nothing proves
// it. A proxy that is older does not: then its own port is as good as any, unless it has served
// a connection before.
func (j *journey) sourcePort(hello direct.Hello) uint16 {
	switch {
	case hello.SourcePort != 0:
		return hello.SourcePort
	case j.flow.Kept:
		return 0
	}
	return j.flow.SourceAddr.Port()
}

// answer runs the handshake as the pod's identity.
func (d *pod) answer(ctx context.Context, j *journey) (*peerConn, direct.Hello, error) {
	leaf, err := d.leaf()
	if err != nil {
		return nil, direct.Hello{}, err
	}
	tn := d.answering.join(j.flow.SourceAddr.Addr())
	defer tn.leave()
	if err := d.awaitAnswer(ctx, tn, j); err != nil {
		return nil, direct.Hello{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.p.cfg.HandshakeTimeout)
	defer cancel()
	c, hello, err := direct.Server(ctx, j.conn, d.p.cfg.TLS.Server(leaf))
	if err != nil {
		return nil, hello, err
	}
	return d.newPeerConn(c, leaf), hello, nil
}

// awaitAnswer returns when tn holds a slot. The peer may give up before.
func (d *pod) awaitAnswer(ctx context.Context, tn *turn, j *journey) error {
	if tn.isHeld() {
		return nil
	}
	gone, unwatch := j.watch(tn)
	defer unwatch()
	_, err := tn.await(ctx, gone, nil)
	return err
}

// identify compares the identity that the peer proved with that of the
// World for its address. Where the World knows nobody, any identity of the trust
// domain will do: package identity has checked it.
func (j *journey) identify(id mesh.ID) error {
	if j.flow.Source == nil {
		j.flow.Source = (&mesh.Workload{Namespace: id.Namespace, ID: id}).Peer()
		return nil
	}
	if id != j.flow.Source.ID {
		return refuse(identity.ReasonWrongIdentity, flagDenied, "%s proved to be %s: want %s",
			j.flow.SourceAddr, id, j.flow.Source.ID)
	}
	return nil
}

// dialApplication opens the last piece of the way. The application sees the
// client's own address, and its port too unless that cannot be had; 0 is not known.
func (d *pod) dialApplication(ctx context.Context, j *journey, port uint16) (relay.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.p.cfg.DialTimeout)
	defer cancel()
	j.place.await(ctx)
	defer j.place.leave()
	g := &dialling{from: j.flow.SourceAddr.Addr(), port: port, ports: samePort, to: j.flow.Dialled}
	c, err := d.dial(ctx, g)
	if err != nil {
		return nil, err
	}
	j.noteSource(g, c)
	far := relay.Prepared(c)
	if g.canBeAgain() {
		far.Leave()
	}
	return far, nil
}

// noteSource notes which port the client's application has, and which one it has in the eyes
// of the application here.
func (j *journey) noteSource(g *dialling, c *net.TCPConn) {
	if g.port == 0 {
		return
	}
	j.flow.SourcePort, j.flow.SeenPort = g.port, g.port
	if !g.same {
		j.flow.SeenPort = ownPort(c)
	}
	if j.flow.SeenPort == g.port {
		return
	}
	j.flow.SeenReason = portReason(g.missed)
	j.d.p.metrics.otherPort(j.flow.SeenReason)
}

// serviceNamed returns the service that the peer says was dialled, if it is one
// that the destination serves: what a peer says must not grow the metrics.
func serviceNamed(w *mesh.World, destination *mesh.Peer, name string) *mesh.Service {
	key, _, _ := cutLast(name, ":")
	if key == "" || destination == nil {
		return nil
	}
	if !destination.Serves(key) {
		return nil
	}
	return w.ServiceNamed(key)
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
