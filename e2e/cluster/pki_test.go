package cluster

import (
	"crypto/x509"
	"testing"
)

// TestServerCertificates: a kubelet that the API server cannot verify gives no
// logs and no exec, and that is all that people would see of it.
func TestServerCertificates(t *testing.T) {
	p, err := newPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.node("n1", "172.30.0.11", "fd00:172:30::b"); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.ca.cert)
	for _, test := range []struct{ file, name string }{
		{"apiserver.crt", "127.0.0.1"}, {"apiserver.crt", apiService4}, {"apiserver.crt", "kubernetes.default.svc"},
		{"kubelet-n1.crt", "172.30.0.11"}, {"kubelet-n1.crt", "fd00:172:30::b"}, {"kubelet-n1.crt", "n1"},
	} {
		text, err := p.read(test.file)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := parsePEM(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{DNSName: test.name, Roots: roots}); err != nil {
			t.Errorf("%s for %s: %v", test.file, test.name, err)
		}
	}
}
