package mesh

import (
	"strings"
	"testing"
)

func TestParseIDRoundTrip(t *testing.T) {
	want := ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web-1"}
	got, err := ParseID("spiffe://cluster.local/ns/shop/sa/web-1")
	if err != nil || got != want {
		t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
	if got.String() != "spiffe://cluster.local/ns/shop/sa/web-1" {
		t.Errorf("String() = %q", got)
	}
}

func TestParseIDRefuses(t *testing.T) {
	for _, uri := range []string{
		"",
		"https://td/ns/a/sa/b",
		"spiffe://td/ns/a",
		"spiffe://td/ns/a/sa/",
		"spiffe:///ns/a/sa/b",
		"spiffe://td/ns//sa/b",
		"spiffe://td/ns/a/sa/b/c",
		"spiffe://td/ns/a/sa/b?x=1",
		"spiffe://td/ns/a/sa/b#x",
		"spiffe://td/ns/%61/sa/b",
		"spiffe://td/ns/../sa/b",
		"spiffe://td:80/ns/a/sa/b",
		"spiffe://user@td/ns/a/sa/b",
		"SPIFFE://td/ns/a/sa/b",
		"spiffe://td/ns/a/sa/" + strings.Repeat("b", 254),
	} {
		if id, err := ParseID(uri); err == nil {
			t.Errorf("ParseID(%q) = %+v, want an error", uri, id)
		}
	}
}

func TestZeroIDIsNobody(t *testing.T) {
	if s := (ID{}).String(); s != "" {
		t.Errorf("String() = %q, want nothing", s)
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("spiffe://td/ns/a/sa/b")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := ParseID(uri)
		if err == nil && id.String() != uri {
			t.Errorf("ParseID(%q).String() = %q: two texts for one identity", uri, id)
		}
	})
}
