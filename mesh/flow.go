package mesh

import (
	"net/netip"
	"time"
)

// Security is how the bytes of a connection crossed the network.
type Security string

const (
	// MutualTLS: both sides proved their identity to each other.
	MutualTLS Security = "mutual_tls"
	// Plaintext: nobody proved anything, at least not to us.
	Plaintext Security = "plaintext"
)

// Reporter is the side of a connection that tells of it, in Istio's words.
type Reporter string

const (
	// BySource: the proxy of the pod that dialled.
	BySource Reporter = "source"
	// ByDestination: the proxy of the pod that was dialled.
	ByDestination Reporter = "destination"
)

// Flow is one connection, told at its end by one proxy.
type Flow struct {
	Reporter Reporter
	// Source and Destination are nil where the World knows nobody.
	Source      *Peer
	Destination *Peer
	// Service is what the application dialled, nil if it dialled an address.
	Service    *Service
	SourceAddr netip.AddrPort
	// SourcePort is the port of the source's application, which is not that of SourceAddr
	// where two proxies speak; only the source's proxy tells it. SeenPort is the one that
	// the destination's application sees, and SeenReason why it is another one. Both are 0
	// where they are not known.
	SourcePort, SeenPort uint16
	SeenReason           string
	// Dialled is what the application asked for, DestinationAddr where it led.
	Dialled         netip.AddrPort
	DestinationAddr netip.AddrPort
	// Security is how it crossed the network, or was to cross it if it was refused before.
	Security Security
	// SourceID and DestinationID are the identities that were proved on this connection, zero
	// where nothing was. Source and Destination are only whom the World has at the addresses.
	SourceID, DestinationID ID
	// Resumed says that the TLS session was.
	Resumed bool
	// Kept says that it went over a TLS connection that had carried another one before.
	Kept bool

	Opened, Closed time.Time
	// Sent went from source to destination, Received came back; bytes of the application.
	Sent, Received int64
	// Policy is the Key of the policy that decided, "" for none. DryRun says what would have
	// been decided if those of a dry run were enforced, "" if the same.
	Policy, DryRun string
	// Flags are Envoy's response flags ("" is "-"): UF upstream failure, UH no
	// endpoint, UC and DC reset by either end, UAEX denied, UMSDR overload, DT timeout.
	Flags string
	// Reason tells what ended it, "" if both sides finished.
	Reason string
}
