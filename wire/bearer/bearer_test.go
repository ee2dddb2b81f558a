package bearer

import (
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
)

func TestToken(t *testing.T) {
	full := strings.Repeat("x", MaxToken)
	for _, r := range []struct {
		values []string
		want   string
	}{
		{nil, ""},
		{[]string{"Bearer abc"}, "abc"},
		{[]string{"bearer  abc "}, "abc"},
		{[]string{"Basic abc"}, ""},
		{[]string{"Basic abc", "BEARER def"}, "def"},
		{[]string{"Bearer "}, ""},
		{[]string{"Bearer " + full}, full},
		{[]string{"Bearer x" + full}, ""},
	} {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": r.values})
		if got := Token(ctx); got != r.want {
			t.Errorf("%.40q: %.40q, want %.40q", r.values, got, r.want)
		}
	}
}
