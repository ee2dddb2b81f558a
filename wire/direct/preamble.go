package direct

// ALPN names this protocol in the TLS handshake (RFC 7301).
const ALPN = "tacit/1"

// Hello is what the client tells before the first byte of the application.
type Hello struct {
	// Service is what the application dialled, NAMESPACE/HOSTNAME:PORT, "" if
	// it dialled a pod.
	Service string
	// Traceparent is W3C Trace Context, "" for none.
	Traceparent string
	// SourcePod is NAMESPACE/NAME; for logs only, since nothing proves it.
	SourcePod string
}

// Status is the server's answer to a Hello.
type Status uint8

// The numbers are on the wire.
const (
	StatusOK           Status = 0
	StatusDenied       Status = 1
	StatusRefused      Status = 2
	StatusUnreachable  Status = 3
	StatusTimedOut     Status = 4
	StatusShuttingDown Status = 5
)

// String is the word for logs and counters.
func (s Status) String() string { return "" }

// Reply is what the server answers after its dial to the application.
type Reply struct {
	Status Status
	// Reason is for people: the name of a policy, an errno. Cut at 1024 bytes.
	Reason string
}
