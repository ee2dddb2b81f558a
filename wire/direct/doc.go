// Package direct speaks TLS 1.3 on the port that the application listens on, for one
// connection of an application at a time. It is what crosses the network between the
// outbound half of one proxy and the inbound half of another.
//
// The handshake is crypto/tls; the records after it are sealed and opened here
// (RFC 8446 §5), or by crypto/tls in FIPS builds. After the handshake each side
// sends one preamble, and then the application's bytes flow and nothing else. When
// they have ended, another preamble may follow (keep.go).
//
// It refuses to dial, to listen, to choose identities, and to decide who may
// talk to whom: a connected socket and a tls.Config of package identity come in.
package direct
