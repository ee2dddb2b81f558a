// Package csr is how a node obtains a certificate: one signing request, one
// chain, by the gRPC service that Istio's clients and CAs speak. It is the
// station between identity, which makes keys and keeps them, and control, which
// signs. It refuses to see a private key, to decide who may have which identity,
// and to trust what the asking side says about itself.
package csr

import (
	"errors"
	"time"
)

const (
	// impersonated is the key of the metadata that names the wanted identity.
	impersonated = "ImpersonatedIdentity"
	// maxRequest bounds a signing request, maxChain an answer, in bytes of PEM.
	maxRequest = 16 << 10
	maxChain   = 1 << 20
	// callTimeout bounds a call whose context has no earlier deadline.
	callTimeout = 10 * time.Second
)

var (
	// ErrDenied: this node may not have that identity.
	ErrDenied = errors.New("denied")
	// ErrBadRequest: the request is malformed or asks for what no CA gives.
	ErrBadRequest = errors.New("bad request")
)
