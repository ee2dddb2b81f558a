package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
)

// Reasons why a handshake failed, for counters and logs.
const (
	ReasonNoCertificate = "no_certificate"
	// ReasonExpired: outside of its time, also if that has not begun yet.
	ReasonExpired          = "expired"
	ReasonForeignRoot      = "foreign_root"
	ReasonWrongTrustDomain = "wrong_trust_domain"
	ReasonWrongIdentity    = "wrong_identity"
	ReasonBadCertificate   = "bad_certificate"
	ReasonNotTLS           = "not_tls"
	ReasonNotTLS13         = "not_tls13"
	ReasonNotOurProtocol   = "not_our_protocol"
	// ReasonStaleSession: the session that a client offered is not known to the
	// server any more; the client dials again without it.
	ReasonStaleSession = "stale_session"
	// ReasonPeerRefused: the peer sent an alert, so its log knows more.
	ReasonPeerRefused = "peer_refused"
	// ReasonPeerClosed: FIN or RST before the end of the handshake.
	ReasonPeerClosed = "peer_closed"
	// ReasonBadTLS: something in the handshake that crypto/tls does not take, and that has
	// no other name here.
	ReasonBadTLS   = "bad_tls"
	ReasonTimeout  = "timeout"
	ReasonCanceled = "canceled"
	ReasonOther    = "other"
)

// alertTexts are errors of crypto/tls that have no type of their own. A test
// holds them to what crypto/tls really says.
var alertTexts = [...]struct{ text, reason string }{
	{"client didn't provide a certificate", ReasonNoCertificate},
	{"client offered only unsupported versions", ReasonNotTLS13},
	{"server selected unsupported protocol version", ReasonNotTLS13},
	{"client requested unsupported application protocols", ReasonNotOurProtocol},
}

// Reason names why err happened by one of the constants above; "" for nil. It
// understands errors of this package, of crypto/tls, of contexts and sockets.
func Reason(err error) string {
	var verify *VerifyError
	var own *OwnError
	var header tls.RecordHeaderError
	var op *net.OpError
	var alert tls.AlertError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &verify):
		return verify.Reason
	case errors.As(err, &own):
		return own.Reason
	case errors.As(err, &header):
		return ReasonNotTLS
	case errors.Is(err, context.Canceled):
		return ReasonCanceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return ReasonTimeout
	case errors.As(err, &op) && op.Op == "remote error", errors.As(err, &alert):
		return ReasonPeerRefused
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, syscall.ECONNABORTED):
		return ReasonPeerClosed
	}
	for _, a := range alertTexts {
		if strings.Contains(err.Error(), a.text) {
			return a.reason
		}
	}
	if strings.Contains(err.Error(), "tls: ") {
		return ReasonBadTLS
	}
	return ReasonOther
}
