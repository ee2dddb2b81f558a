package proxy

import (
	"crypto/tls"
	"net"
)

// foreignTLS begins a handshake that has nothing to do with the mesh.
func foreignTLS(c net.Conn) {
	tls.Client(c, &tls.Config{ServerName: "example.org", NextProtos: []string{"h2"}}).Handshake()
}
