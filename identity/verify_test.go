package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"net/url"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func TestVerify(t *testing.T) {
	ca, foreign := newCA(t), newCA(t)
	key := newTestKey(t).Public()
	good := id("a").String()
	oldMid, oldMidK := ca.make(&x509.Certificate{
		Subject:   pkix.Name{CommonName: "old"},
		NotBefore: time.Now().Add(-3 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
	}, ca.root, ca.rootK)
	byOld := &testCA{t: t, ttl: time.Hour, mid: oldMid, midK: oldMidK}
	uris := func(list ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for _, s := range list {
				u, err := url.Parse(s)
				must(t, err)
				c.URIs = append(c.URIs, u)
			}
		}
	}
	rows := []struct {
		name  string
		chain []*x509.Certificate
		want  mesh.ID
		fails string
	}{
		{"good", []*x509.Certificate{ca.sign(key, good, nil), ca.mid}, id("a"), ""},
		{"good with more names", []*x509.Certificate{ca.sign(key, good, func(c *x509.Certificate) {
			c.DNSNames, c.IPAddresses = []string{"a.example"}, []net.IP{net.IPv4(1, 2, 3, 4)}
		}), ca.mid}, id("a"), ""},
		{"nothing", nil, mesh.ID{}, ReasonNoCertificate},
		{"no intermediate", []*x509.Certificate{ca.sign(key, good, nil)}, mesh.ID{}, ReasonForeignRoot},
		{"foreign root", []*x509.Certificate{foreign.sign(key, good, nil), foreign.mid}, mesh.ID{}, ReasonForeignRoot},
		{"foreign root, sent along", []*x509.Certificate{foreign.sign(key, good, nil), foreign.mid, foreign.root}, mesh.ID{}, ReasonForeignRoot},
		{"expired", []*x509.Certificate{ca.sign(key, good, func(c *x509.Certificate) {
			c.NotAfter = time.Now().Add(-time.Second)
		}), ca.mid}, mesh.ID{}, ReasonExpired},
		{"not yet", []*x509.Certificate{ca.sign(key, good, func(c *x509.Certificate) {
			c.NotBefore = time.Now().Add(time.Minute)
		}), ca.mid}, mesh.ID{}, ReasonExpired},
		{"expired intermediate", []*x509.Certificate{byOld.sign(key, good, nil), oldMid}, mesh.ID{}, ReasonExpired},
		{"no URI", []*x509.Certificate{ca.sign(key, "", nil), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"a DNS name only", []*x509.Certificate{ca.sign(key, "", func(c *x509.Certificate) {
			c.Subject.CommonName, c.DNSNames = good, []string{"a.default.lab"}
		}), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"two URIs", []*x509.Certificate{ca.sign(key, good, uris(id("b").String())), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"another scheme", []*x509.Certificate{ca.sign(key, "https://lab/ns/default/sa/a", nil), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"another path", []*x509.Certificate{ca.sign(key, "spiffe://lab/default/a", nil), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"escaped", []*x509.Certificate{ca.sign(key, "spiffe://lab/ns/default/sa/%61", nil), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"query", []*x509.Certificate{ca.sign(key, good+"?x=1", nil), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"upper-case scheme", []*x509.Certificate{ca.sign(key, "", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanOf(t, "SPIFFE://lab/ns/default/sa/a")}
		}), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"a CA", []*x509.Certificate{ca.sign(key, good, func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid = true, true
		}), ca.mid}, mesh.ID{}, ReasonBadCertificate},
		{"the intermediate itself", []*x509.Certificate{ca.mid}, mesh.ID{}, ReasonBadCertificate},
	}
	v := NewVerifier(0)
	for _, r := range rows {
		for try := range 2 { // without and with the memory
			got, err := v.Verify(r.chain, ca.bundle(), time.Now())
			if got != r.want || Reason(err) != r.fails {
				t.Errorf("%s, try %d: %v, %v is %q: want %v, %q", r.name, try, got, err, Reason(err), r.want, r.fails)
			}
			var ve *VerifyError
			if err != nil && !errors.As(err, &ve) {
				t.Errorf("%s: error is a %T", r.name, err)
			}
		}
	}
}

func sanOf(t *testing.T, uri string) pkix.Extension {
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
	must(t, err)
	return pkix.Extension{Id: oidSubjectAltName, Value: value}
}

// What is remembered is forgotten with time and with another bundle.
func TestVerifierMemory(t *testing.T) {
	ca, foreign := newCA(t), newCA(t)
	v := NewVerifier(0)
	chain := []*x509.Certificate{ca.sign(newTestKey(t).Public(), id("a").String(), nil), ca.mid}
	now := time.Now()
	if _, err := v.Verify(chain, ca.bundle(), now); err != nil {
		t.Fatal(err)
	}
	// Known by its leaf alone: the memory, not the chain, says so.
	if _, err := v.Verify(chain[:1], ca.bundle(), now); err != nil {
		t.Errorf("again: %v", err)
	}
	for name, err := range map[string]error{
		"after its end":        second(v.Verify(chain, ca.bundle(), now.Add(2*time.Hour))),
		"before its beginning": second(v.Verify(chain, ca.bundle(), now.Add(-2*time.Hour))),
	} {
		if Reason(err) != ReasonExpired {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := v.Verify(chain, foreign.bundle(), now); Reason(err) != ReasonForeignRoot {
		t.Errorf("another bundle: %v", err)
	}
}

func second[A, B any](_ A, b B) B { return b }

func TestVerifierIsBounded(t *testing.T) {
	v := NewVerifier(10)
	for i := range 1000 {
		var k leafKey
		k.leaf[0], k.leaf[1] = byte(i), byte(i>>8)
		v.remember(k, proof{id: id(fmt.Sprint(i))})
		if n := len(v.young) + len(v.old); n > 10 {
			t.Fatalf("%d are remembered", n)
		}
		if p, ok := v.recall(k); !ok || p.id != id(fmt.Sprint(i)) {
			t.Fatalf("the newest is not: %v", p)
		}
	}
}

// A chain of two ways is good for as long as the longer one.
func TestLongest(t *testing.T) {
	day := func(n int) time.Time { return time.Unix(int64(n)*86400, 0) }
	c := func(from, to int) *x509.Certificate {
		return &x509.Certificate{NotBefore: day(from), NotAfter: day(to)}
	}
	leaf := c(10, 20)
	got := longest(id("a"), [][]*x509.Certificate{{leaf, c(0, 15)}, {leaf, c(11, 30), c(0, 18)}})
	if got.notBefore != day(11) || got.notAfter != day(18) {
		t.Errorf("from %v to %v", got.notBefore, got.notAfter)
	}
}

func TestParseBundle(t *testing.T) {
	ca := newCA(t)
	leaf := ca.sign(newTestKey(t).Public(), id("a").String(), nil)
	rows := []struct {
		name string
		pem  []byte
		want int
	}{
		{"one", toPEM(ca.root), 1},
		{"two", toPEM(ca.root, ca.mid), 2},
		{"none", nil, 0},
		{"a leaf", toPEM(leaf), 0},
		{"text", []byte("hello"), 0},
		{"text behind", append(toPEM(ca.root), "hello"...), 0},
		{"a key", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0},
	}
	for _, r := range rows {
		b, err := ParseBundle(r.pem)
		if (err == nil) != (r.want > 0) || err == nil && b.Len() != r.want {
			t.Errorf("%s: %v", r.name, err)
		}
	}
}

func TestNewLeaf(t *testing.T) {
	ca := newCA(t)
	key := newTestKey(t)
	leaf := ca.sign(key.Public(), id("a").String(), nil)
	rows := []struct {
		name string
		id   mesh.ID
		pem  []byte
		ok   bool
	}{
		{"good", id("a"), toPEM(leaf, ca.mid, ca.root), true},
		{"another's", id("b"), toPEM(leaf, ca.mid, ca.root), false},
		{"no root", id("a"), toPEM(leaf, ca.mid), false},
		{"no leaf", id("a"), toPEM(ca.root), false},
		{"no intermediate", id("a"), toPEM(leaf, ca.root), false},
		{"for another key", id("a"), toPEM(ca.sign(newTestKey(t).Public(), id("a").String(), nil), ca.mid, ca.root), false},
		{"nothing", id("a"), nil, false},
	}
	for _, r := range rows {
		l, err := NewLeaf(r.id, key, r.pem, time.Now())
		if (err == nil) != r.ok {
			t.Errorf("%s: %v", r.name, err)
		}
		if err == nil && (len(l.Certificate.Certificate) != 2 || l.Bundle.Len() != 1 || !l.NotAfter.Equal(leaf.NotAfter)) {
			t.Errorf("%s: %+v", r.name, l)
		}
	}
}
