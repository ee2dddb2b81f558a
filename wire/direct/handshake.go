package direct

import (
	"bytes"
	"context"
	"crypto/fips140"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"tacit.dev/identity"
)

// handshaker is the socket as crypto/tls sees it during the handshake. It differs
// from a plain socket in three ways:
//
//   - It never gives crypto/tls a byte beyond the record that it is reading,
//     so that the records after the handshake are still in the inbox.
//   - It holds back what crypto/tls writes until crypto/tls reads, so that the last
//     flight and the preamble leave in one packet.
//   - Once the record layer of this package writes, crypto/tls must not: two
//     records sealed with one key and one number would give the key away. Then
//     Write fails.
//
// It belongs to the goroutine that runs the handshake.
type handshaker struct {
	*net.TCPConn
	in *inbox
	// rest is how much of the record at hand crypto/tls may still read.
	rest int

	// out is what crypto/tls has written, out[:sent] is on its way already. buf
	// is its memory, unless it has outgrown it.
	out  []byte
	sent int
	buf  []byte

	// What follows the handshake: sealed for records, through for cryptoTLS.
	sealed  bool   // Write fails
	feed    []byte // if sealed: all that Read gives
	through bool   // Write holds nothing back
	dry     bool   // Read gives nothing
	err     error  // what Read says from now on
}

var errSealed = errors.New("crypto/tls wrote after the handover of the connection")

// notYet tells crypto/tls that there is no more now, but may be later.
type notYet struct{}

func (notYet) Error() string   { return "no record to read" }
func (notYet) Timeout() bool   { return true }
func (notYet) Temporary() bool { return true }

func (h *handshaker) Read(p []byte) (int, error) {
	if h.sealed || h.dry {
		if len(h.feed) == 0 {
			return 0, notYet{}
		}
		n := copy(p, h.feed)
		h.feed = h.feed[n:]
		return n, nil
	}
	for h.rest == 0 {
		b := h.in.bytes()
		if len(b) >= recordHeader {
			h.rest = recordHeader + int(b[3])<<8 + int(b[4])
		} else if err := h.more(); err != nil {
			return 0, err
		}
	}
	if len(h.in.bytes()) == 0 {
		if err := h.more(); err != nil {
			return 0, err
		}
	}
	b := h.in.bytes()
	n := copy(p, b[:min(len(b), h.rest)])
	h.in.consume(n)
	h.rest -= n
	return n, nil
}

// more sends what was held back, and reads.
func (h *handshaker) more() error {
	if err := h.flush(); err != nil {
		return err
	}
	return h.fill()
}

func (h *handshaker) fill() error {
	if h.err != nil {
		return h.err
	}
	err := h.in.fill()
	if err == io.EOF {
		// crypto/tls takes an end between two records for an orderly one.
		err = ErrTruncated
	}
	if err != nil && !isTimeout(err) {
		h.err = err
	}
	return err
}

func (h *handshaker) Write(p []byte) (int, error) {
	if h.sealed {
		return 0, errSealed
	}
	if h.through {
		return h.TCPConn.Write(p)
	}
	h.out = append(h.out, p...)
	return len(p), nil
}

func (h *handshaker) flush() error {
	if h.sent == len(h.out) {
		return nil
	}
	n, err := h.TCPConn.Write(h.out[h.sent:])
	h.sent += n
	return err
}

// Close is not crypto/tls's to do.
func (h *handshaker) Close() error { return nil }

// secrets receives the application traffic secrets of one connection as crypto/tls
// writes them for debuggers: LABEL, client random, secret, in hexadecimal. Each
// connection has its own, because a client random is in the clear: an
// attacker who copied one could give its own secrets to another's connection.
type secrets struct {
	client, server []byte
}

var (
	labelClient = []byte("CLIENT_TRAFFIC_SECRET_0 ")
	labelServer = []byte("SERVER_TRAFFIC_SECRET_0 ")
)

func (s *secrets) Write(line []byte) (int, error) {
	switch {
	case bytes.HasPrefix(line, labelClient):
		s.client = lastHex(line)
	case bytes.HasPrefix(line, labelServer):
		s.server = lastHex(line)
	}
	return len(line), nil
}

func lastHex(line []byte) []byte {
	line = bytes.TrimSpace(line)
	text := line[bytes.LastIndexByte(line, ' ')+1:]
	secret := make([]byte, hex.DecodedLen(len(text)))
	if _, err := hex.Decode(secret, text); err != nil {
		return nil
	}
	return secret
}

// String keeps secrets out of logs.
func (s *secrets) String() string { return "secrets{hidden}" }

// GoString does too.
func (s *secrets) GoString() string { return s.String() }

// handshake is one that has succeeded.
type handshake struct {
	h    *handshaker
	tls  *tls.Conn
	keys *secrets // nil if crypto/tls carries the records too
	peer Peer
	// keeps: an empty record is the end of a direction. Both sides come to the same
	// answer, since they see the same protocol and suite.
	keeps bool
}

// shake runs the handshake. The alert that tells the peer of a failure has been sent
// when it returns an error; the socket is left to the caller.
func (o side) shake(ctx context.Context, in *inbox, c *net.TCPConn, cfg *tls.Config) (*handshake, error) {
	if cfg.VerifyConnection == nil || cfg.MinVersion < tls.VersionTLS13 {
		return nil, errors.New("tls: the configuration verifies nothing: take one of identity.TLS")
	}
	buf := lend(smallSize)
	hs := &handshake{h: &handshaker{TCPConn: c, in: in, buf: buf, out: buf[:0]}}
	cfg = cfg.Clone()
	cfg.NextProtos = []string{ALPN}
	if o.own {
		cfg.NextProtos = []string{ALPNKeep, ALPN}
		hs.keys = new(secrets)
		cfg.KeyLogWriter = hs.keys
	}
	if o.client {
		if o.quick {
			resumeQuickly(cfg, c.RemoteAddr().String())
		}
		hs.tls = tls.Client(hs.h, cfg)
	} else {
		ticketOnce(cfg)
		hs.tls = tls.Server(hs.h, cfg)
	}
	err := hs.tls.Handshake()
	if err != nil && !o.client {
		err = hs.staleOr(err)
	}
	if err == nil {
		err = hs.check()
	}
	if err == nil {
		return hs, nil
	}
	_ = c.SetWriteDeadline(time.Now().Add(alertTimeout))
	_ = hs.h.flush()
	takeBack(buf)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, err
}

// errStale: the server does not know the session any more.
var errStale = &identity.VerifyError{
	Reason: identity.ReasonStaleSession,
	Err:    errors.New("the session of the client is not known to the server any more"),
}

// resumeQuickly makes the client of cfg, if it has a session, resume it with P-256
// and nothing else. The keys are then derived from that exchange and from the
// session's secret, which came of X25519MLKEM768: who breaks P-256 one day has
// gained nothing. It costs a third, and the ClientHello fits into one packet.
//
// But if the server does not know the session, P-256 alone would be what protects
// the connection. The client cannot make both offers at once, so it gives up then,
// before it has sent a byte, and Dial begins anew without a session.
func resumeQuickly(cfg *tls.Config, peer string) {
	if _, ok := cfg.ClientSessionCache.Get(peer); !ok {
		return
	}
	verify := cfg.VerifyConnection
	cfg.CurvePreferences = []tls.CurveID{tls.CurveP256}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if !cs.DidResume {
			return errStale
		}
		return verify(cs)
	}
}

// staleOr tells, on the server's side, a client that gave up a session from
// one that refused our certificate.
func (hs *handshake) staleOr(err error) error {
	cs := hs.tls.ConnectionState()
	if identity.Reason(err) == identity.ReasonPeerRefused && !cs.DidResume && cs.CurveID == tls.CurveP256 {
		return fmt.Errorf("%w: %w", errStale, err)
	}
	return err
}

// ticketOnce makes the server of cfg send a ticket after a full handshake only:
// a session serves for as long as the certificates do, and sealing another ticket
// with each connection costs more than it gives. cfg belongs to one connection;
// crypto/tls asks it when it is about to send a ticket.
func ticketOnce(cfg *tls.Config) {
	if cfg.SessionTicketsDisabled {
		return
	}
	unwrap, verify := cfg.UnwrapSession, cfg.VerifyConnection
	if unwrap == nil {
		unwrap = cfg.DecryptTicket
	}
	cfg.UnwrapSession = func(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		session, err := unwrap(ticket, cs)
		cfg.SessionTicketsDisabled = session != nil
		return session, err
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if !cs.DidResume {
			cfg.SessionTicketsDisabled = false
		}
		return verify(cs)
	}
}

// alertTimeout bounds the alert after a failed handshake. It always fits into
// the socket's buffer, unless the peer reads nothing on purpose.
const alertTimeout = 100 * time.Millisecond

// check takes from the handshake what the connection needs to know.
func (hs *handshake) check() error {
	cs := hs.tls.ConnectionState()
	if cs.NegotiatedProtocol != ALPN && cs.NegotiatedProtocol != ALPNKeep {
		return &identity.VerifyError{
			Reason: identity.ReasonNotOurProtocol,
			Err:    fmt.Errorf("the peer agreed on protocol %q: want %q", cs.NegotiatedProtocol, ALPN),
		}
	}
	id, err := identity.LeafID(cs.PeerCertificates[0])
	if err != nil {
		return err
	}
	hs.peer = Peer{
		ID: id, NotAfter: cs.PeerCertificates[0].NotAfter,
		Resumed: cs.DidResume, CipherSuite: cs.CipherSuite, Curve: cs.CurveID,
	}
	if suiteOf(cs.CipherSuite) == nil {
		hs.keys = nil
	}
	hs.keeps = hs.keys != nil && cs.NegotiatedProtocol == ALPNKeep
	if hs.keys != nil && (hs.keys.client == nil || hs.keys.server == nil) {
		return errors.New("tls: crypto/tls told no traffic secrets")
	}
	return nil
}

// side says how one end runs its handshake.
type side struct {
	client bool
	// quick: resume with the cheaper key exchange, or fail with errStale.
	quick bool
	// own says that the record layer of this package follows the handshake.
	own bool
}

// ownRecords: in FIPS mode the nonces must be made inside of the approved module.
func ownRecords() bool { return !fips140.Enabled() }

// isTimeout: a deadline has passed.
func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
