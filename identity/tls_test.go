package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tacit.dev/mesh"
)

func leafOf(t *testing.T, ca *testCA, id mesh.ID) *Leaf {
	key := newTestKey(t)
	l, err := NewLeaf(id, key, toPEM(ca.sign(key.Public(), id.String(), nil), ca.mid, ca.root), time.Now())
	must(t, err)
	return l
}

func TestConfigsArePerPair(t *testing.T) {
	ca := newCA(t)
	a, b := leafOf(t, ca, id("a")), leafOf(t, ca, id("b"))
	x := NewTLS(TLSConfig{})
	first := x.Client(a, id("c"), "10.0.0.1:80")
	if x.Client(a, id("c"), "10.0.0.1:80") != first {
		t.Error("the same pair: another configuration")
	}
	seen := map[tls.ClientSessionCache]bool{first.ClientSessionCache: true}
	for i, cfg := range []*tls.Config{
		x.Client(b, id("c"), "10.0.0.1:80"),
		x.Client(a, id("d"), "10.0.0.1:80"),
		x.Client(a, id("c"), "10.0.0.2:80"),
		x.Client(leafOf(t, ca, id("a")), id("c"), "10.0.0.1:80"),
	} {
		if seen[cfg.ClientSessionCache] {
			t.Errorf("row %d: a session cache of another pair", i)
		}
		seen[cfg.ClientSessionCache] = true
	}
	served := x.Server(a)
	if x.Server(a) != served || x.Server(b) == served {
		t.Error("served: not one configuration per leaf")
	}
}

func TestPairsAreBounded(t *testing.T) {
	ca := newCA(t)
	a := leafOf(t, ca, id("a"))
	x := NewTLS(TLSConfig{MaxPairs: 3})
	busy := x.Client(a, id("busy"), "")
	for i := range 100 {
		x.Client(a, id(fmt.Sprint(i)), "")
		if x.Client(a, id("busy"), "") != busy {
			t.Fatal("the one in use was forgotten")
		}
		if len(x.clients) > 3 || x.recent.Len() != len(x.clients) {
			t.Fatalf("%d and %d are remembered", len(x.clients), x.recent.Len())
		}
	}
	x.Forget(id("a"))
	if len(x.clients) != 0 || x.recent.Len() != 0 {
		t.Error("not forgotten")
	}
}

// The key of a leaf that was renewed is not kept for peers that are never dialled again.
func TestRenewedLeavesAreDropped(t *testing.T) {
	ca := newCA(t)
	x := NewTLS(TLSConfig{})
	for i := range 10 {
		last := leafOf(t, ca, id("a"))
		x.Client(last, id("peer"), fmt.Sprint(i))
		x.Server(last)
		x.Client(last, id("peer"), fmt.Sprint(i, " again"))
		if len(x.clients) > 2 || x.recent.Len() != len(x.clients) {
			t.Fatalf("after %d leaves, %d and %d are remembered", i+1, len(x.clients), x.recent.Len())
		}
	}
}

// A resumed session is refused when our certificate is over, or when the bundle is
// another one.
func TestVerifyChecksAgain(t *testing.T) {
	ca := newCA(t)
	own := leafOf(t, ca, id("own"))
	peer := leafOf(t, ca, id("peer"))
	x := NewTLS(TLSConfig{})
	cs := tls.ConnectionState{DidResume: true, PeerCertificates: []*x509.Certificate{peer.Certificate.Leaf, ca.mid}}
	if _, err := x.verify(cs, own); err != nil {
		t.Fatal(err)
	}
	over := *own
	over.NotAfter = time.Now().Add(-time.Second)
	if _, err := x.verify(cs, &over); Reason(err) != ReasonExpired {
		t.Errorf("our own is over: %v", err)
	}
	other := *own
	other.Bundle = newCA(t).bundle()
	if _, err := x.verify(cs, &other); Reason(err) != ReasonForeignRoot {
		t.Errorf("another bundle: %v", err)
	}
	elsewhere := *own
	elsewhere.ID.TrustDomain = "elsewhere"
	if _, err := x.verify(cs, &elsewhere); Reason(err) != ReasonWrongTrustDomain {
		t.Errorf("another trust domain: %v", err)
	}
}

// A session is not resumed with a certificate that has expired since.
func TestResumedSessionExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		own := leafOf(t, ca, id("own"))
		ca.ttl /= 2
		peer := leafOf(t, ca, id("peer"))
		x := NewTLS(TLSConfig{})
		cs := tls.ConnectionState{DidResume: true, PeerCertificates: []*x509.Certificate{peer.Certificate.Leaf, ca.mid}}
		sides := map[string]*tls.Config{"client": x.Client(own, id("peer"), ""), "server": x.Server(own)}
		for _, cfg := range sides {
			must(t, cfg.VerifyConnection(cs))
		}
		time.Sleep(time.Until(peer.NotAfter) + time.Second)
		for side, cfg := range sides {
			if err := cfg.VerifyConnection(cs); Reason(err) != ReasonExpired {
				t.Errorf("%s: %v", side, err)
			}
		}
	})
}

func TestReason(t *testing.T) {
	rows := []struct {
		err  error
		want string
	}{
		{nil, ""},
		{fmt.Errorf("x: %w", refuse(ReasonWrongIdentity, "y")), ReasonWrongIdentity},
		{fmt.Errorf("x: %w", refuseOwn(ReasonExpired, id("a"), io.EOF)), ReasonExpired},
		{fmt.Errorf("x: %w", tls.RecordHeaderError{Msg: "y"}), ReasonNotTLS},
		{context.Canceled, ReasonCanceled},
		{context.DeadlineExceeded, ReasonTimeout},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, ReasonTimeout},
		{&net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}, ReasonPeerRefused},
		{fmt.Errorf("x: %w", tls.AlertError(42)), ReasonPeerRefused},
		{&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, ReasonPeerClosed},
		{io.ErrUnexpectedEOF, ReasonPeerClosed},
		{&net.OpError{Op: "local error", Err: errors.New("tls: unexpected message")}, ReasonBadTLS},
		{errors.New("x"), ReasonOther},
	}
	for _, r := range rows {
		if got := Reason(r.err); got != r.want {
			t.Errorf("%v: %q, want %q", r.err, got, r.want)
		}
	}
}
