package mesh

import (
	"fmt"
	"strings"
)

// ID is a workload identity: a service account of a namespace of a trust
// domain. Its text is a SPIFFE ID (SPIFFE-ID §2) in the form that Istio uses.
// The zero ID is nobody; it never equals a peer.
type ID struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// maxID bounds an identity as text, in bytes: three segments of 253, and what is between.
const maxID = 1024

// ParseID reads spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT and
// nothing else: no query, no fragment, no escapes, no empty or extra segment.
func ParseID(uri string) (ID, error) {
	if len(uri) > maxID {
		return ID{}, fmt.Errorf("parse identity of %d bytes: want at most %d", len(uri), maxID)
	}
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	if !ok {
		return ID{}, fmt.Errorf("parse identity %q: want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", uri)
	}
	part := strings.Split(rest, "/")
	if len(part) != 5 || part[1] != "ns" || part[3] != "sa" {
		return ID{}, fmt.Errorf("parse identity %q: want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", uri)
	}
	id := ID{TrustDomain: part[0], Namespace: part[2], ServiceAccount: part[4]}
	for _, s := range []string{id.TrustDomain, id.Namespace, id.ServiceAccount} {
		if !validSegment(s) {
			return ID{}, fmt.Errorf("parse identity %q: segment %q: want 1 to 253 of a-z A-Z 0-9 . _ -", uri, s)
		}
	}
	return id, nil
}

// validSegment reports whether s may stand in a SPIFFE path. "." and ".." are
// refused, as SPIFFE-ID §2.2 asks.
func validSegment(s string) bool {
	if s == "" || len(s) > 253 || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// IsZero reports whether id is nobody.
func (id ID) IsZero() bool { return id == ID{} }

// String is the SPIFFE ID, or "" for nobody.
func (id ID) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}
