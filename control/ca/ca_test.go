package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tacit.dev/mesh"
)

var client = mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: "client"}

func open(t *testing.T, cfg Config) *CA {
	t.Helper()
	if cfg.Store == nil {
		cfg.Store = Folder(t.TempDir())
	}
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "lab"
	}
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func certificates(t *testing.T, chain []byte) []*x509.Certificate {
	t.Helper()
	var certs []*x509.Certificate
	for block, rest := pem.Decode(chain); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	return certs
}

func sign(t *testing.T, c *CA, ttl time.Duration) []*x509.Certificate {
	t.Helper()
	chain, err := c.Sign(client, request(t, p256(t), x509.CertificateRequest{}), ttl)
	if err != nil {
		t.Fatal(err)
	}
	return certificates(t, chain)
}

func verify(leaf *x509.Certificate, intermediate, root *x509.Certificate, at time.Time, use x509.ExtKeyUsage) error {
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	middle.AddCert(intermediate)
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{use}})
	return err
}

func TestLeafNamesItsIdentityAndNothingElse(t *testing.T) {
	certs := sign(t, open(t, Config{}), 0)
	if len(certs) != 3 {
		t.Fatalf("chain of %d certificates, want leaf, intermediate, root", len(certs))
	}
	leaf := certs[0]
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if err := verify(leaf, certs[1], certs[2], time.Now(), use); err != nil {
			t.Errorf("verify as %v: %v", use, err)
		}
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != client.String() {
		t.Errorf("URI names %v, want %v", leaf.URIs, client)
	}
	if n := len(leaf.DNSNames) + len(leaf.IPAddresses) + len(leaf.EmailAddresses); n != 0 || leaf.Subject.String() != "" {
		t.Errorf("%d other names, subject %q, want none", n, leaf.Subject)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || leaf.IsCA || len(leaf.ExtKeyUsage) != 2 {
		t.Errorf("key usage %b, CA %v, extended %v", leaf.KeyUsage, leaf.IsCA, leaf.ExtKeyUsage)
	}
}

func TestLeafSignsNothing(t *testing.T) {
	c := open(t, Config{})
	key := p256(t)
	chain, err := c.Sign(client, request(t, key, x509.CertificateRequest{}), 0)
	if err != nil {
		t.Fatal(err)
	}
	certs := certificates(t, chain)
	der, err := create(leafTemplate(time.Now(), time.Hour), &pair{cert: certs[0], key: key}, &p256(t).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if verify(forged, certs[0], certs[2], time.Now(), x509.ExtKeyUsageClientAuth) == nil {
		t.Error("a certificate signed by a leaf was accepted")
	}
}

// A leaf lives as long as was wished, counted from now, also if that is a few
// seconds; and half of its life lies in the future.
func TestLife(t *testing.T) {
	for _, row := range []struct{ wish, limit, want time.Duration }{
		{0, 0, 24 * time.Hour},
		{time.Hour, 0, time.Hour},
		{48 * time.Hour, 0, 24 * time.Hour},
		{-time.Second, 0, 24 * time.Hour},
		{0, 5 * time.Second, 5 * time.Second},
		{time.Hour, 5 * time.Second, 5 * time.Second},
		{time.Millisecond, 0, time.Second},
	} {
		now := time.Date(2026, 1, 1, 0, 0, 0, 999_000_000, time.UTC)
		c := open(t, Config{LeafTTL: row.limit, Now: func() time.Time { return now }})
		leaf := sign(t, c, row.wish)[0]
		if got := leaf.NotAfter.Sub(now); got < row.want || got >= row.want+time.Second {
			t.Errorf("wish %v of %v: lives %v, want %v", row.wish, row.limit, got, row.want)
		}
		if leaf.NotBefore.After(now) || now.Sub(leaf.NotBefore) > clockSkew+time.Second {
			t.Errorf("wish %v of %v: begins %v before now", row.wish, row.limit, now.Sub(leaf.NotBefore))
		}
		if half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2); row.want > time.Second && !half.After(now) {
			t.Errorf("wish %v of %v: half of its life is over at once", row.wish, row.limit)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	c := open(t, Config{})
	uri := func(s string) []*url.URL { return []*url.URL{{Scheme: "spiffe", Host: "lab", Path: s}} }
	ed, edErr := func() (crypto.Signer, error) { _, k, err := ed25519.GenerateKey(rand.Reader); return k, err }()
	r, rsaErr := rsa.GenerateKey(rand.Reader, 2048)
	p384, p384Err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err := errors.Join(edErr, rsaErr, p384Err); err != nil {
		t.Fatal(err)
	}
	good := request(t, p256(t), x509.CertificateRequest{})
	broken := func() []byte {
		block, _ := pem.Decode(good)
		block.Bytes[len(block.Bytes)-1] ^= 1
		return pem.EncodeToMemory(block)
	}()
	for name, row := range map[string]struct {
		id   mesh.ID
		csr  []byte
		text string
	}{
		"foreign trust domain": {mesh.ID{TrustDomain: "other", Namespace: "a", ServiceAccount: "b"}, good, "trust domain"},
		"nobody":               {mesh.ID{}, good, "not an identity"},
		"escape in the name":   {mesh.ID{TrustDomain: "lab", Namespace: "a/b", ServiceAccount: "c"}, good, "not an identity"},
		"nothing":              {client, nil, "PEM"},
		"garbage":              {client, []byte("garbage"), "PEM"},
		"too long":             {client, append(good, make([]byte, maxRequest)...), "at most"},
		"two":                  {client, append(append([]byte{}, good...), good...), "one PEM block"},
		"wrong block":          {client, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}), "PEM block"},
		"not a request":        {client, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte{1}}), "bad signing request"},
		"broken signature":     {client, broken, "signature"},
		"Ed25519":              {client, request(t, ed, x509.CertificateRequest{}), "P-256"},
		"RSA":                  {client, request(t, r, x509.CertificateRequest{}), "P-256"},
		"P-384":                {client, request(t, p384, x509.CertificateRequest{}), "P-256"},
		"another identity":     {client, request(t, p256(t), x509.CertificateRequest{URIs: uri("/ns/default/sa/admin")}), "it names"},
		"two identities": {client, request(t, p256(t), x509.CertificateRequest{
			URIs: append(uri("/ns/default/sa/client"), uri("/ns/default/sa/admin")...)}), "it names"},
		"a DNS name":    {client, request(t, p256(t), x509.CertificateRequest{DNSNames: []string{"control"}}), "names besides"},
		"an IP address": {client, request(t, p256(t), x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}), "names besides"},
	} {
		_, err := c.Sign(row.id, row.csr, 0)
		if !errors.Is(err, ErrRequest) || !strings.Contains(err.Error(), row.text) {
			t.Errorf("%s: error %v, want ErrRequest with %q", name, err, row.text)
		}
	}
}

func TestRequestMayNameItsIdentity(t *testing.T) {
	u, err := url.Parse(client.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, Config{}).Sign(client, request(t, p256(t), x509.CertificateRequest{URIs: []*url.URL{u}}), 0); err != nil {
		t.Error(err)
	}
}

func TestSecondOpenKeepsKeys(t *testing.T) {
	dir := t.TempDir()
	first := sign(t, open(t, Config{Store: Folder(dir)}), 0)
	second := sign(t, open(t, Config{Store: Folder(dir)}), 0)
	if !first[1].Equal(second[1]) || !first[2].Equal(second[2]) {
		t.Error("intermediate or root changed")
	}
	if first[0].SerialNumber.Cmp(second[0].SerialNumber) == 0 {
		t.Error("two leaves with one serial number")
	}
}

// Leaders that hold the same keys have the same secret, for one purpose, and no others.
func TestSecret(t *testing.T) {
	dir := t.TempDir()
	secret := func(dir, purpose string) string {
		c := open(t, Config{Store: Folder(dir)})
		s, err := c.Secret(purpose)
		if err != nil || len(s) != 32 {
			t.Fatalf("%d bytes, %v", len(s), err)
		}
		return string(s)
	}
	first := secret(dir, "a")
	if secret(dir, "a") != first {
		t.Error("opened again, it is another one")
	}
	if first == secret(dir, "b") || first == secret(t.TempDir(), "a") {
		t.Error("another purpose, or another CA, has the same")
	}
}

func TestFilesAreSecret(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	open(t, Config{Store: Folder(dir)})
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 4 {
		t.Fatalf("%d files (%v), want keys and certificates of root and intermediate", len(entries), err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v %v, want mode 0600", e.Name(), info.Mode(), err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s: %v %v, want mode 0700", dir, info.Mode(), err)
	}
}

// A process that was killed leaves a key without a certificate at worst.
func TestOpenAfterCrash(t *testing.T) {
	for _, lost := range []string{"root.pem intermediate.key intermediate.pem", "intermediate.pem", "intermediate.key", "intermediate.key intermediate.pem"} {
		dir := t.TempDir()
		open(t, Config{Store: Folder(dir)})
		for _, f := range strings.Fields(lost) {
			if err := os.Remove(filepath.Join(dir, f)); err != nil {
				t.Fatal(err)
			}
		}
		certs := sign(t, open(t, Config{Store: Folder(dir)}), 0)
		if err := verify(certs[0], certs[1], certs[2], time.Now(), x509.ExtKeyUsageServerAuth); err != nil {
			t.Errorf("without %s: %v", lost, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, row := range map[string]struct {
		spoil func(dir string) error
		cfg   Config
		text  string
	}{
		"another trust domain": {func(string) error { return nil }, Config{TrustDomain: "other"}, "another trust domain"},
		"root is garbage": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "root.pem"), []byte("x"), 0o600)
		}, Config{TrustDomain: "lab"}, "read root of"},
		"key of somebody else": {func(dir string) error {
			return os.Rename(filepath.Join(dir, "intermediate.key"), filepath.Join(dir, "root.key"))
		}, Config{TrustDomain: "lab"}, "not the key"},
		"bad trust domain": {func(string) error { return nil }, Config{TrustDomain: "a/b"}, "trust domain"},
		"no life":          {func(string) error { return nil }, Config{TrustDomain: "lab", LeafTTL: time.Millisecond}, "leaf ttl"},
	} {
		dir := t.TempDir()
		open(t, Config{Store: Folder(dir)})
		if err := row.spoil(dir); err != nil {
			t.Fatal(err)
		}
		row.cfg.Store = Folder(dir)
		if _, err := Open(row.cfg); err == nil || !strings.Contains(err.Error(), row.text) {
			t.Errorf("%s: error %v, want %q", name, err, row.text)
		}
	}
}

// The intermediate is renewed before its end; without the root's key it serves
// to its end.
func TestIntermediateIsRenewed(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	c := open(t, Config{Store: Folder(dir), Now: func() time.Time { return now }})
	first := sign(t, c, 0)[1]
	now = now.Add(intermediateLife * 9 / 10)
	second := sign(t, c, 0)
	if second[1].Equal(first) {
		t.Error("intermediate with a tenth of its life left still signs")
	}
	if err := verify(second[0], second[1], second[2], now, x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}

	if err := os.Remove(filepath.Join(dir, "root.key")); err != nil {
		t.Fatal(err)
	}
	now = second[1].NotAfter.Add(-time.Hour)
	c = open(t, Config{Store: Folder(dir), Now: func() time.Time { return now }})
	if last := sign(t, c, 0); last[0].NotAfter.After(last[1].NotAfter) {
		t.Errorf("leaf until %v outlives its intermediate until %v", last[0].NotAfter, last[1].NotAfter)
	}
	now = now.Add(2 * time.Hour)
	if _, err := c.Sign(client, request(t, p256(t), x509.CertificateRequest{}), 0); err == nil || !strings.Contains(err.Error(), "key is missing") {
		t.Errorf("error %v, want that the root's key is missing", err)
	}
}

func TestServerCertificateIsNoIdentity(t *testing.T) {
	c := open(t, Config{})
	cert, err := c.ServerCertificate([]string{"control.tacit-system.svc", "172.30.0.254", "fd00:30::1"})
	if err != nil {
		t.Fatal(err)
	}
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM(c.Bundle())
	inter, err := x509.ParseCertificate(cert.Certificate[1])
	if err != nil {
		t.Fatal(err)
	}
	middle.AddCert(inter)
	for _, name := range []string{"control.tacit-system.svc", "172.30.0.254", "fd00:30::1"} {
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, DNSName: name}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if len(cert.Leaf.URIs) != 0 || len(cert.Leaf.ExtKeyUsage) != 1 || cert.Leaf.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth {
		t.Errorf("URIs %v, usage %v: want none, and server only", cert.Leaf.URIs, cert.Leaf.ExtKeyUsage)
	}
	if _, err := c.ServerCertificate(nil); err == nil {
		t.Error("a certificate without names was made")
	}
}

func TestWriteFileReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	// What an interrupted write may have left.
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), ".f.new"), []byte("much longer than the rest"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("read %q, %v, want %q", got, err, content)
		}
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("%d files left (%v), want 1", len(entries), err)
	}
}

func FuzzSign(f *testing.F) {
	c, err := Open(Config{Store: Folder(f.TempDir()), TrustDomain: "lab"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(request(f, p256(f), x509.CertificateRequest{}))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, csr []byte) {
		if _, err := c.Sign(client, csr, 0); err != nil && !errors.Is(err, ErrRequest) {
			t.Errorf("error %v is not ErrRequest", err)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	c, err := Open(Config{Store: Folder(b.TempDir()), TrustDomain: "lab"})
	if err != nil {
		b.Fatal(err)
	}
	csr := request(b, p256(b), x509.CertificateRequest{})
	for b.Loop() {
		if _, err := c.Sign(client, csr, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// faster is a Store in which another process saves first.
type faster struct {
	Store
	other Config
	once  bool
}

func (f *faster) Save(name string, certPEM, keyPEM []byte) error {
	if f.once {
		return f.Store.Save(name, certPEM, keyPEM)
	}
	f.once = true
	if _, err := Open(f.other); err != nil {
		return err
	}
	return fs.ErrExist
}

func TestOpenTakesWhatAnotherProcessHasSaved(t *testing.T) {
	cfg := Config{Store: Folder(t.TempDir()), TrustDomain: "lab"}
	slow := cfg
	slow.Store = &faster{Store: cfg.Store, other: cfg}
	c, err := Open(slow)
	if err != nil {
		t.Fatal(err)
	}
	if want := open(t, cfg).Bundle(); !bytes.Equal(c.Bundle(), want) {
		t.Error("two roots of one store")
	}
}
