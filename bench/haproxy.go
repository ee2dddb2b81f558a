package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// serverName is what the server's certificate has to say.
const serverName = "server.bench"

// haproxyGlobal is what both sides have. Each holds two descriptors per connection:
// maxconn has to fit into the limit of descriptors, or HAProxy does not start.
const haproxyGlobal = `global
  nbthread 2
  maxconn %d
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
`

// haproxyTLS is what both sides say of TLS: 1.3, mutual, AES-128-GCM.
const haproxyTLS = "ssl verify required ca-file %s crt %s ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256"

// startHAProxy starts two of them with mutual TLS between them, where Tacit's two
// proxies would stand. The bounds were set against an HAProxy that makes a whole
// handshake for each connection, which proves the peer each time; what it does when it
// resumes, as it would by default, is measured beside.
func (r *rig) startHAProxy(ctx context.Context, plain string) error {
	if err := makeCertificates(r.tools); err != nil {
		return err
	}
	most, err := mostHeld()
	if err != nil {
		return err
	}
	client := fmt.Sprintf(haproxyGlobal, min(comparedQuiet, most)+200)
	server := client
	tls := func(side string) string {
		return fmt.Sprintf(haproxyTLS, filepath.Join(r.tools, "root.pem"), filepath.Join(r.tools, side+".pem"))
	}
	for _, one := range []struct{ digit, port, resumes string }{
		{haproxyDigit, iperfPort, "no-ssl-reuse"}, {haproxyDigit, httpPort, "no-ssl-reuse"}, {resumingDigit, httpPort, "ssl-reuse"},
	} {
		port := one.digit + one.port
		client += fmt.Sprintf("listen %s\n  bind 127.0.0.1:%s\n  server s %s:%s verifyhost %s %s %s\n", port, port, plain, port, serverName, one.resumes, tls("client"))
		server += fmt.Sprintf("listen %s\n  bind %s:%s %s\n  server s 127.0.0.1:%s\n", port, plain, port, tls("server"), one.port)
	}
	for side, text := range map[string]string{"client": client, "server": server} {
		path := filepath.Join(r.tools, side+".cfg")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		// -db: in the foreground.
		if err := r.do(ctx, fmt.Sprintf("start haproxy-%s plain/%s -- haproxy -db -f %s", side, side, path)); err != nil {
			return err
		}
	}
	return nil
}

// makeCertificates writes root.pem, and client.pem and server.pem with their keys: all
// P-256, and a day old at most.
func makeCertificates(dir string) error {
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
			BasicConstraintsValid: true,
		}
	}
	root := template("root.bench")
	root.IsCA, root.KeyUsage, root.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return errors.Join(
		writeCertificate(filepath.Join(dir, "root.pem"), root, root, rootKey, rootKey),
		writeLeaf(filepath.Join(dir, "client.pem"), template("client.bench"), root, rootKey),
		writeLeaf(filepath.Join(dir, "server.pem"), template(serverName), root, rootKey))
}

func writeLeaf(path string, leaf, root *x509.Certificate, rootKey *ecdsa.PrivateKey) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return writeCertificate(path, leaf, root, key, rootKey)
}

// writeCertificate signs with the root's key, and appends the certificate's own.
func writeCertificate(path string, cert, root *x509.Certificate, key, rootKey *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, cert, root, key.Public(), rootKey)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})...)
	return os.WriteFile(path, text, 0o600)
}
