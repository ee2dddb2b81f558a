package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"time"
)

// pair is a certificate of the CA and its key. The key is nil if it is kept elsewhere.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// LogValue keeps the key out of logs.
func (p *pair) LogValue() slog.Value { return slog.StringValue(p.cert.Subject.CommonName) }

func (p *pair) pem() []byte { return encodeCert(p.cert.Raw) }

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func rootName(trustDomain string) string { return "Tacit root of " + trustDomain }

func makeRoot(trustDomain string, now time.Time) (*pair, error) {
	t := authorityTemplate(rootName(trustDomain), now, rootLife)
	t.MaxPathLen = 1
	return makePair(t, nil)
}

func makeIntermediate(root *pair, trustDomain string, now time.Time) (*pair, error) {
	t := authorityTemplate("Tacit intermediate of "+trustDomain, now, intermediateLife)
	t.MaxPathLenZero = true
	if t.NotAfter.After(root.cert.NotAfter) {
		t.NotAfter = root.cert.NotAfter
	}
	return makePair(t, root)
}

func authorityTemplate(name string, now time.Time, life time.Duration) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: name, Organization: []string{"Tacit"}},
		NotBefore:             now.Add(-clockSkew).UTC().Truncate(time.Second),
		NotAfter:              now.Add(life).UTC().Truncate(time.Second),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// makePair makes a key and has its certificate signed by parent, or by itself.
func makePair(template *x509.Certificate, parent *pair) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %q: %w", template.Subject.CommonName, err)
	}
	if parent == nil {
		parent = &pair{cert: template, key: key}
	}
	der, err := create(template, parent, &key.PublicKey)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back %q: %w", template.Subject.CommonName, err)
	}
	return &pair{cert: cert, key: key}, nil
}

// create signs the template under a random serial number (127 bits: RFC 5280
// §4.1.2.2 allows 20 bytes and wants them positive).
func create(template *x509.Certificate, parent *pair, key *ecdsa.PublicKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, key, parent.key)
	if err != nil {
		return nil, fmt.Errorf("sign with %q: %w", parent.cert.Subject.CommonName, err)
	}
	return der, nil
}

// load reads the pair of that name. It returns nil if there is no certificate.
func load(store Store, name string) (*pair, error) {
	certPEM, keyPEM, err := store.Load(name)
	if err != nil || certPEM == nil {
		return nil, err
	}
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("read %s of %v: want a PEM block CERTIFICATE", name, store)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s of %v: %w", name, store, err)
	}
	p := &pair{cert: cert}
	if keyPEM == nil {
		return p, nil
	}
	if err := p.setKey(keyPEM); err != nil {
		return nil, fmt.Errorf("read key of %s of %v: %w", name, store, err)
	}
	return p, nil
}

func (p *pair) setKey(keyPEM []byte) error {
	block, _ := pem.Decode(keyPEM)
	if block == nil || block.Type != "PRIVATE KEY" {
		return errors.New("want a PEM block PRIVATE KEY")
	}
	found, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return err
	}
	key, ok := found.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(p.cert.PublicKey) {
		return errors.New("it is not the key of the certificate beside it")
	}
	p.key = key
	return nil
}

func (p *pair) save(store Store, name string) error {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return fmt.Errorf("encode key of %q: %w", p.cert.Subject.CommonName, err)
	}
	return store.Save(name, p.pem(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}
