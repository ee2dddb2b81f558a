package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// pki is the cluster's certificate authority, and the folder of all keys.
type pki struct {
	dir string
	ca  *pair
}

type pair struct {
	cert            *x509.Certificate
	key             *ecdsa.PrivateKey
	certPEM, keyPEM []byte
}

// newPKI makes the keys of the control plane; nodes get theirs when they are added.
func newPKI(dir string) (*pki, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	ca, err := issue(nil, pkix.Name{CommonName: "kubernetes"}, nil)
	if err != nil {
		return nil, err
	}
	p := &pki{dir: dir, ca: ca}
	return p, errors.Join(
		p.write("ca", ca, nil),
		p.server("apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", controlPlane4, apiService4, "localhost",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
		p.server("kubelet-client", pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}),
		p.client("kube-controller-manager", pkix.Name{CommonName: "system:kube-controller-manager"}),
		p.client("kube-scheduler", pkix.Name{CommonName: "system:kube-scheduler"}),
		p.client("kube-proxy", pkix.Name{CommonName: "system:kube-proxy"}),
		p.serviceAccounts(),
		p.frontProxy())
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

// read is a file as text, for a node's own root.
func (p *pki) read(name string) (string, error) {
	text, err := os.ReadFile(p.path(name))
	return string(text), err
}

func (p *pki) write(name string, pair *pair, err error) error {
	if err != nil {
		return fmt.Errorf("certificate %s: %w", name, err)
	}
	return errors.Join(
		os.WriteFile(p.path(name+".crt"), pair.certPEM, 0o600),
		os.WriteFile(p.path(name+".key"), pair.keyPEM, 0o600))
}

// server makes NAME.crt and NAME.key for these names and addresses.
func (p *pki) server(name string, subject pkix.Name, names ...string) error {
	pair, err := issue(p.ca, subject, names)
	return p.write(name, pair, err)
}

// client makes NAME.kubeconfig for a component in the control plane or on a node.
func (p *pki) client(name string, subject pkix.Name) error {
	return p.kubeconfig(name, subject, net.JoinHostPort(controlPlane4, strconv.Itoa(apiPort)))
}

func (p *pki) kubeconfig(name string, subject pkix.Name, server string) error {
	c, err := issue(p.ca, subject, nil)
	if err != nil {
		return fmt.Errorf("kubeconfig %s: %w", name, err)
	}
	text := base64.StdEncoding.EncodeToString
	return os.WriteFile(p.path(name+".kubeconfig"), fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: tacit-e2e
clusters: [{name: tacit-e2e, cluster: {server: "https://%s", certificate-authority-data: %s}}]
contexts: [{name: tacit-e2e, context: {cluster: tacit-e2e, user: %s}}]
users: [{name: %s, user: {client-certificate-data: %s, client-key-data: %s}}]
`, server, text(p.ca.certPEM), name, name, text(c.certPEM), text(c.keyPEM)), 0o600)
}

// node makes what the kubelet of a node needs.
func (p *pki) node(name string, addresses ...string) error {
	who := pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}}
	return errors.Join(
		p.client("kubelet-"+name, who),
		p.server("kubelet-"+name, who, append(addresses, "127.0.0.1", name)...))
}

// serviceAccounts makes the key that signs tokens.
func (p *pki) serviceAccounts() error {
	sa, err := issue(p.ca, pkix.Name{CommonName: "service-accounts"}, nil)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&sa.key.PublicKey)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	return errors.Join(p.write("sa", sa, nil), os.WriteFile(p.path("sa.pub"), text, 0o600))
}

// frontProxy makes a CA of its own, by which the API server proves itself to
// aggregated API servers: with the cluster's CA every client could.
func (p *pki) frontProxy() error {
	ca, err := issue(nil, pkix.Name{CommonName: "front-proxy"}, nil)
	if err != nil {
		return err
	}
	client, err := issue(ca, pkix.Name{CommonName: "front-proxy-client"}, nil)
	return errors.Join(p.write("front-proxy-ca", ca, nil), p.write("front-proxy", client, err))
}

// issue makes a key and a certificate signed by ca, or by itself if there is none.
func issue(ca *pair, subject pkix.Name, names []string) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c, err := unsigned(subject, names)
	if err != nil {
		return nil, err
	}
	signer, signingKey := c, key
	if ca == nil {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature, nil
	} else {
		signer, signingKey = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, signer, &key.PublicKey, signingKey)
	if err != nil {
		return nil, err
	}
	return encode(der, key)
}

// unsigned is the certificate before it is signed.
func unsigned(subject pkix.Name, names []string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: subject, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, n)
		}
	}
	return c, nil
}

func encode(der []byte, key *ecdsa.PrivateKey) (*pair, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	text, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &pair{cert: cert, key: key,
		certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		keyPEM:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text})}, nil
}
