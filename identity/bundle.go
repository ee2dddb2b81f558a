package identity

import "errors"

// Bundle is the set of trusted roots. It is immutable.
type Bundle struct{}

// ParseBundle reads root certificates, at least one, from PEM.
func ParseBundle(pem []byte) (*Bundle, error) { return nil, errors.New("not yet") }
