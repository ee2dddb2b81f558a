package direct

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"tacit.dev/identity"
	"tacit.dev/mesh"
)

// plain is a peer that knows nothing of this package: crypto/tls on a socket, and
// the preambles by hand.
func plainConfig(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{ALPN}
	return cfg
}

func random(seed uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(p)
	return p
}

const interopBytes = 4 << 20

// exchange sends both ways at once and compares, up to the orderly end.
func exchange(t *testing.T, a, b interface {
	io.ReadWriter
	CloseWrite() error
}) {
	t.Helper()
	seed := rand.Uint64()
	type result struct {
		sum [32]byte
		err error
	}
	send := func(c io.Writer, end func() error, seed uint64, out chan<- result) {
		p := random(seed, interopBytes)
		_, err := c.Write(p)
		out <- result{sha256.Sum256(p), errors.Join(err, end())}
	}
	receive := func(c io.Reader, out chan<- result) {
		p, err := io.ReadAll(c)
		out <- result{sha256.Sum256(p), err}
	}
	ch := [4]chan result{}
	for i := range ch {
		ch[i] = make(chan result, 1)
	}
	go send(a, a.CloseWrite, seed, ch[0])
	go receive(b, ch[1])
	go send(b, b.CloseWrite, seed+1, ch[2])
	go receive(a, ch[3])
	var got [4]result
	for i := range ch {
		if got[i] = <-ch[i]; got[i].err != nil {
			t.Errorf("seed %d: part %d: %v", seed, i, got[i].err)
		}
	}
	if got[0].sum != got[1].sum || got[2].sum != got[3].sum {
		t.Errorf("seed %d: other bytes arrived than were sent", seed)
	}
}

func TestPlainClient(t *testing.T) {
	w := newWorld(t)
	cfg := plainConfig(w.clientConfig())
	for _, resumed := range []bool{false, true} {
		cs, ss := w.sockets(t)
		accepted := make(chan *Conn, 1)
		go func() {
			s, h, err := serve(soon(t), ss, w.tls.Server(w.server), side{own: true})
			if err == nil && h.Service != "x" {
				err = errors.New("service " + h.Service)
			}
			if err == nil {
				err = s.Reply(Reply{})
			}
			if err != nil {
				t.Error(err)
			}
			accepted <- s
		}()
		c := tls.Client(cs, cfg)
		must(t, c.Handshake())
		// The preamble in two records, the second one with bytes of the application.
		hello, err := appendHello(nil, Hello{Service: "x"})
		must(t, err)
		_, err = c.Write(hello[:2])
		must(t, err)
		_, err = c.Write(append(hello[2:], "first"...))
		must(t, err)
		s := <-accepted
		if s == nil {
			t.FailNow()
		}
		r, err := readReply(c)
		must(t, err)
		if r.Status != StatusOK || c.ConnectionState().DidResume != resumed || s.Peer().Resumed != resumed {
			t.Fatalf("%v, resumed %v: want %v", r, s.Peer().Resumed, resumed)
		}
		first := make([]byte, 5)
		_, err = io.ReadFull(s, first)
		must(t, err)
		if string(first) != "first" {
			t.Fatalf("got %q", first)
		}
		for conn := s.s.(*records); conn.rekey != 33; {
			conn.rekey = 33 // KeyUpdates of ours, read by crypto/tls
		}
		must(t, cs.SetDeadline(time.Now().Add(30*time.Second)))
		must(t, ss.SetDeadline(time.Now().Add(30*time.Second)))
		exchange(t, c, s)
	}
}

func TestPlainServer(t *testing.T) {
	w := newWorld(t)
	cfg := plainConfig(w.tls.Server(w.server))
	for _, resumed := range []bool{false, true, true} {
		cs, ss := w.sockets(t)
		s := tls.Server(ss, cfg)
		accepted := make(chan error, 1)
		go func() {
			_, err := readHello(s)
			if err == nil {
				// Reply and bytes of the application in one record.
				_, err = s.Write(append(appendReply(nil, Reply{StatusOK, "ok"}), "first"...))
			}
			accepted <- err
		}()
		c, err := client(soon(t), cs, w.clientConfig(), opening{hello: Hello{Service: "x"}}, side{client: true, own: true})
		must(t, err)
		_, err = c.AwaitReply(soon(t))
		must(t, err)
		must(t, <-accepted)
		if c.Peer().Resumed != resumed {
			t.Errorf("resumed %v: want %v", c.Peer().Resumed, resumed)
		}
		first := make([]byte, 5)
		_, err = io.ReadFull(c, first)
		must(t, err)
		if string(first) != "first" {
			t.Fatalf("got %q", first)
		}
		// Ask crypto/tls for KeyUpdates, and send some unasked.
		r := c.s.(*records)
		r.rekey = 29
		b := r.seal.seal(make([]byte, 0, 100), typeHandshake, []byte{msgKeyUpdate, 0, 0, 1, 1})
		must(t, r.seal.update())
		_, err = r.c.Write(b)
		must(t, err)
		before := bytes.Clone(r.open.secret)
		// Not while crypto/tls says goodbye: it cannot answer then, and forgets to
		// change the key that it reads with.
		echo(t, c, s)
		if bytes.Equal(before, r.open.secret) {
			t.Error("crypto/tls did not answer the KeyUpdate")
		}
		must(t, c.Raw().SetDeadline(time.Now().Add(30*time.Second)))
		must(t, ss.SetDeadline(time.Now().Add(30*time.Second)))
		exchange(t, c, s)
	}
}

func TestReadBeforeReply(t *testing.T) {
	w := newWorld(t)
	cs, ss := w.sockets(t)
	go func() { _, _, _ = Server(soon(t), ss, w.tls.Server(w.server)) }()
	c, err := Client(soon(t), cs, w.clientConfig(), Hello{})
	must(t, err)
	if _, err := c.Read(make([]byte, 1)); err != errNoReply {
		t.Errorf("%v: want %v", err, errNoReply)
	}
}

// Each row is a handshake that must fail, and what each side says of it.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	foreign := newTestCA(t)
	other := mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "other"}
	elsewhere := mesh.ID{TrustDomain: "elsewhere", Namespace: "default", ServiceAccount: "client"}
	key := w.l.Addr().String()
	good := w.tls.Server(w.server)
	edit := func(cfg *tls.Config, f func(*tls.Config)) *tls.Config {
		cfg = cfg.Clone()
		cfg.NextProtos = []string{ALPN}
		f(cfg)
		return cfg
	}
	rows := []struct {
		name           string
		client, server *tls.Config
		// plain: the client is crypto/tls alone, since ours refuses to do that.
		plain              bool
		clientSays, served string
	}{
		{"wrong identity", w.tls.Client(w.client, other, key), good, false,
			identity.ReasonWrongIdentity, identity.ReasonPeerRefused},
		{"foreign root", w.tls.Client(foreign.leaf(t, idClient), idServer, key), w.tls.Server(w.server), false,
			identity.ReasonForeignRoot, identity.ReasonPeerRefused},
		{"wrong trust domain", w.tls.Client(w.ca.leaf(t, elsewhere), idServer, key), good, false,
			identity.ReasonWrongTrustDomain, identity.ReasonPeerRefused},
		{"no certificate", edit(w.clientConfig(), func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
			c.ClientSessionCache = nil
		}), good, true, identity.ReasonPeerRefused, identity.ReasonNoCertificate},
		{"client of a foreign root that asks no questions", edit(w.tls.Client(foreign.leaf(t, idClient), idServer, key), func(c *tls.Config) {
			c.VerifyConnection = nil
		}), good, true, identity.ReasonPeerRefused, identity.ReasonForeignRoot},
		{"TLS 1.2", edit(w.clientConfig(), func(c *tls.Config) {
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		}), good, true, identity.ReasonPeerRefused, identity.ReasonNotTLS13},
		{"another ALPN", edit(w.clientConfig(), func(c *tls.Config) { c.NextProtos = []string{"h2"} }), good, true,
			identity.ReasonPeerRefused, identity.ReasonNotOurProtocol},
		{"no ALPN", edit(w.clientConfig(), func(c *tls.Config) { c.NextProtos = nil }), good, true,
			"", identity.ReasonNotOurProtocol},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			cs, ss := w.sockets(t)
			served := make(chan error, 1)
			go func() {
				_, _, err := Server(soon(t), ss, r.server)
				served <- err
			}()
			err := dialRefused(t, cs, r.client, r.plain)
			if got := identity.Reason(err); r.clientSays != "" && got != r.clientSays {
				t.Errorf("client: %v is %s, want %s", err, got, r.clientSays)
			}
			err = <-served
			if got := identity.Reason(err); got != r.served {
				t.Errorf("server: %v is %s, want %s", err, got, r.served)
			}
		})
	}
}

func dialRefused(t *testing.T, cs *net.TCPConn, cfg *tls.Config, plain bool) error {
	ctx := soon(t)
	if !plain {
		c, err := Client(ctx, cs, cfg, Hello{})
		if err == nil {
			_, err = c.AwaitReply(ctx)
		}
		return err
	}
	c := tls.Client(cs, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 1))
	return err
}

// A server without a client certificate's demand, or one that speaks no TLS.
func TestClientRefusals(t *testing.T) {
	w := newWorld(t)
	rows := []struct {
		name, want string
		serve      func(*net.TCPConn)
	}{
		{"plaintext server", identity.ReasonNotTLS, func(c *net.TCPConn) { _, _ = c.Write([]byte("220 smtp.example ESMTP\r\n")) }},
		{"end at once", identity.ReasonPeerClosed, func(c *net.TCPConn) { _ = c.CloseWrite() }},
		{"reset", identity.ReasonPeerClosed, func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() }},
		{"server without ALPN", identity.ReasonNotOurProtocol, func(c *net.TCPConn) {
			cfg := w.tls.Server(w.server).Clone()
			cfg.NextProtos = nil
			_ = tls.Server(c, cfg).Handshake()
		}},
		{"certificate of another", identity.ReasonWrongIdentity, func(c *net.TCPConn) {
			_ = tls.Server(c, plainConfig(w.tls.Server(w.client))).Handshake()
		}},
		{"TLS 1.2 server", identity.ReasonPeerRefused, func(c *net.TCPConn) {
			cfg := plainConfig(w.tls.Server(w.server))
			cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			_ = tls.Server(c, cfg).Handshake()
		}},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			cs, ss := w.sockets(t)
			go r.serve(ss)
			_, err := Client(soon(t), cs, w.clientConfig(), Hello{})
			if got := identity.Reason(err); got != r.want {
				t.Errorf("%v is %s, want %s", err, got, r.want)
			}
		})
	}
}

func TestServerRefusals(t *testing.T) {
	w := newWorld(t)
	rows := []struct {
		name, want string
		send       string
	}{
		{"garbage", identity.ReasonNotTLS, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"end at once", identity.ReasonPeerClosed, ""},
		{"half a ClientHello", identity.ReasonPeerClosed, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"},
		{"record without end", identity.ReasonOther, "\x16\x03\x01\xff\xff\x01\x00\x01\xfc\x03\x03"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			cs, ss := w.sockets(t)
			_, err := cs.Write([]byte(r.send))
			must(t, err)
			must(t, cs.CloseWrite())
			_, _, err = Server(soon(t), ss, w.tls.Server(w.server))
			if got := identity.Reason(err); got != r.want && !(r.want == identity.ReasonOther && err != nil) {
				t.Errorf("%v is %s, want %s", err, got, r.want)
			}
		})
	}
}

func TestUnverifiedConfigIsRefused(t *testing.T) {
	w := newWorld(t)
	c, _ := w.sockets(t)
	if _, err := Client(context.Background(), c, &tls.Config{MinVersion: tls.VersionTLS13}, Hello{}); err == nil {
		t.Error("a configuration that verifies nothing was taken")
	}
}

// Two pods of different identities have had one address: no session of the one
// may serve to reach the other, and none of one client to speak as another.
func TestSessionsNeverCrossIdentities(t *testing.T) {
	w := newWorld(t)
	idNext := mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "next"}
	next := w.ca.leaf(t, idNext)
	addr := w.l.Addr().String()
	// connect dials the pod at the address as from, expecting to; of serves.
	connect := func(from *identity.Leaf, to mesh.ID, of *identity.Leaf) (client, server Peer, err error) {
		cs, ss := w.sockets(t)
		served := make(chan Peer, 1)
		go func() {
			s, _, err := Server(soon(t), ss, w.tls.Server(of))
			if err != nil {
				served <- Peer{}
				return
			}
			_ = s.Reply(Reply{})
			served <- s.Peer()
		}()
		c, err := Client(soon(t), cs, w.tls.Client(from, to, addr), Hello{})
		if err == nil {
			_, err = c.AwaitReply(soon(t))
		}
		server = <-served
		if err == nil {
			client = c.Peer()
		}
		return client, server, err
	}
	steps := []struct {
		name    string
		from    *identity.Leaf
		to      mesh.ID
		of      *identity.Leaf
		resumed bool
		fails   bool
	}{
		{"first", w.client, idServer, w.server, false, false},
		{"again", w.client, idServer, w.server, true, false},
		{"another client, same server and address", next, idServer, w.server, false, false},
		{"the first client again", w.client, idServer, w.server, true, false},
		{"the other client again", next, idServer, w.server, true, false},
		{"the address is another pod's, the World knows", w.client, idNext, next, false, false},
		{"the address is another pod's, the World is stale", w.client, idServer, next, false, true},
		// crypto/tls throws a session away with which a handshake failed.
		{"and back", w.client, idServer, w.server, false, false},
		{"the new pod again", w.client, idNext, next, true, false},
	}
	for _, s := range steps {
		c, srv, err := connect(s.from, s.to, s.of)
		if s.fails {
			if got := identity.Reason(err); got != identity.ReasonWrongIdentity {
				t.Errorf("%s: %v is %s, want %s", s.name, err, got, identity.ReasonWrongIdentity)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if c.ID != s.to || srv.ID != s.from.ID || c.Resumed != s.resumed || srv.Resumed != s.resumed {
			t.Errorf("%s: client sees %+v, server sees %+v, want %v and %v, resumed %v", s.name, c, srv, s.to, s.from.ID, s.resumed)
		}
	}
}

// A renewed certificate begins without the sessions of the old one.
func TestRenewalEndsSessions(t *testing.T) {
	w := newWorld(t)
	for _, renew := range []func(){
		func() {},
		func() { w.client = w.ca.leaf(t, idClient) },
		func() { w.server = w.ca.leaf(t, idServer) },
	} {
		renew()
		for _, resumed := range []bool{false, true} {
			if c, s := w.connect(t, true, true); c.Peer().Resumed != resumed || s.Peer().Resumed != resumed {
				t.Errorf("resumed %v: want %v", c.Peer().Resumed, resumed)
			}
		}
	}
}
