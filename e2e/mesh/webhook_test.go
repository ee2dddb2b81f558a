package mesh_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWebhook: the API server asks a pod of an enrolled namespace, and is asked by
// nobody in between for another certificate than the pod's own.
func TestWebhook(t *testing.T) {
	s := enrolled(t)
	cert, key := certificate(t, "webhook."+s.name+".svc")
	s.kubectl("create", "secret", "tls", "webhook", "--cert="+cert, "--key="+key)
	s.apply("webhook.yaml")
	s.ready("webhook")
	s.captured("webhook")
	text, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	s.apply("configuration.yaml", "SPACE", s.name, "BUNDLE", base64.StdEncoding.EncodeToString(text))
	t.Cleanup(func() { s.kubectlLast("delete", "validatingwebhookconfiguration", s.name) })
	s.eventually("a word of the webhook", func() error { // the API server hears of it a moment later
		_, err := s.try("create", "configmap", "forbidden", "--dry-run=server")
		if err == nil || !strings.Contains(err.Error(), "says the webhook to 172.30.0.1:") {
			return fmt.Errorf("a forbidden object is made, or refused by somebody else: %v", err)
		}
		return nil
	})
	s.kubectl("create", "configmap", "allowed", "--dry-run=server")
}

// certificate makes a self-signed one, and returns the files.
func certificate(t *testing.T, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}
