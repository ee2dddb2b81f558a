// Package bearer reads a caller's token from a gRPC request, where xds and csr begin to
// find out who asks. It refuses to judge it: that is control's.
package bearer

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"
)

// MaxToken bounds a token, in bytes. One of Kubernetes has about 1 kB.
const MaxToken = 16 << 10

// Token is the request's token, "" if there is none, or one that is too long.
func Token(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	for _, v := range md.Get("authorization") {
		if len(v) > 7 && strings.EqualFold(v[:7], "bearer ") {
			if t := strings.TrimSpace(v[7:]); len(t) <= MaxToken {
				return t
			}
		}
	}
	return ""
}
