package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"tacit.dev/mesh"
)

func id(sa string) mesh.ID {
	return mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: sa}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testCA is a root and an intermediate, and a Signer.
type testCA struct {
	t           testing.TB
	root, mid   *x509.Certificate
	rootK, midK *ecdsa.PrivateKey
	ttl         time.Duration

	mu    sync.Mutex
	fail  error // what Sign answers
	calls int
}

func newCA(t testing.TB) *testCA {
	ca := &testCA{t: t, ttl: time.Hour}
	ca.root, ca.rootK = ca.make(&x509.Certificate{Subject: pkix.Name{CommonName: "root"}}, nil, nil)
	ca.mid, ca.midK = ca.make(&x509.Certificate{Subject: pkix.Name{CommonName: "mid"}}, ca.root, ca.rootK)
	return ca
}

// make signs a CA; a template without times is valid around now.
func (ca *testCA) make(tmpl, parent *x509.Certificate, parentK *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	key := newTestKey(ca.t)
	tmpl.SerialNumber = big.NewInt(1)
	if tmpl.NotAfter.IsZero() {
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(240*time.Hour)
	}
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign
	if parent == nil {
		parent, parentK = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), parentK)
	must(ca.t, err)
	c, err := x509.ParseCertificate(der)
	must(ca.t, err)
	return c, key
}

func newTestKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

// sign makes a leaf for pub; edit may change the template.
func (ca *testCA) sign(pub any, uri string, edit func(*x509.Certificate)) *x509.Certificate {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ca.ttl),
	}
	if uri != "" {
		u, err := url.Parse(uri)
		must(ca.t, err)
		tmpl.URIs = []*url.URL{u}
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.mid, pub, ca.midK)
	must(ca.t, err)
	c, err := x509.ParseCertificate(der)
	must(ca.t, err)
	return c
}

func (ca *testCA) bundle() *Bundle {
	b, err := newBundle([]*x509.Certificate{ca.root})
	must(ca.t, err)
	return b
}

func toPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// Sign implements Signer.
func (ca *testCA) Sign(ctx context.Context, id mesh.ID, csrPEM []byte) ([]byte, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.calls++
	if ca.fail != nil {
		return nil, ca.fail
	}
	block, _ := pem.Decode(csrPEM)
	if block == nil {
		return nil, errors.New("no PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	if len(csr.URIs) != 1 || csr.URIs[0].String() != id.String() {
		return nil, errors.New("request for another identity")
	}
	return toPEM(ca.sign(csr.PublicKey, id.String(), nil), ca.mid, ca.root), nil
}

func (ca *testCA) set(fail error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.fail = fail
}

func (ca *testCA) called() int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.calls
}
