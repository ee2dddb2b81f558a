package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"testing"
	"time"

	"tacit.dev/mesh"
	"tacit.dev/wire/csr"
	"tacit.dev/wire/xds"
)

func (n *testNode) sign(id mesh.ID) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	return n.signer.Sign(n.t.Context(), id, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func labID(sa string) mesh.ID {
	return mesh.ID{TrustDomain: "lab", Namespace: "default", ServiceAccount: sa}
}

func TestSigning(t *testing.T) {
	b := newBench(t, "n1", "n2")
	b.namespace("on")
	b.pod("server", "n1", "10.30.1.2")
	b.start()
	n1, n2 := b.node("n1", nil), b.node("n2", nil)
	n1.awaitEnroll("server", true)
	n2.awaitDirect("10.30.1.2", false)

	chain, err := n1.sign(labID("server"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil || len(leaf.URIs) != 1 || leaf.URIs[0].String() != labID("server").String() {
		t.Errorf("leaf of %v (%v), want %v", leaf.URIs, err, labID("server"))
	}
	foreign := labID("server")
	foreign.TrustDomain = "other"
	for name, row := range map[string]struct {
		node *testNode
		id   mesh.ID
	}{
		"pod of another node":  {n2, labID("server")},
		"nobody's identity":    {n1, labID("admin")},
		"foreign trust domain": {n1, foreign},
	} {
		if _, err := row.node.sign(row.id); !errors.Is(err, csr.ErrDenied) {
			t.Errorf("%s: error %v, want denied", name, err)
		}
	}

	// Who is revoked gets none until that is taken back.
	mesh := "apiVersion: tacit.dev/v1alpha1\nkind: Mesh\nmetadata: {name: default}\nspec: {revoked: ["
	b.write("mesh.yaml", mesh+"default/server]}\n")
	awaitSigning(t, n1, csr.ErrDenied)
	b.write("mesh.yaml", mesh+"]}\n")
	awaitSigning(t, n1, nil)

	// After the release there is no certificate any more.
	b.namespace("off")
	n1.awaitEnroll("server", false)
	n1.report("server", xds.Released)
	awaitSigning(t, n1, csr.ErrDenied)
}

// awaitSigning waits until a certificate of the server is signed with that error.
func awaitSigning(t *testing.T, n *testNode, want error) {
	t.Helper()
	for limit := time.Now().Add(patience); ; {
		_, err := n.sign(labID("server"))
		if errors.Is(err, want) {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("error %v, want %v", err, want)
		}
	}
}
