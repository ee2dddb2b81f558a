package app

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pause"
)

// attacker is who knocks at a pod's port and pretends to be a proxy.
type attacker struct {
	address  string
	mark     int
	port     int
	ca       string
	id       string
	patience time.Duration
	count    int
}

// hostile MODE HOST:PORT: tries to be taken for a proxy, and prints how the
// other side ended it. Modes: no-certificate, tls12, foreign-root, signed (a
// certificate of the CA in --ca for the identity --id), expired, garbage, slow (a
// byte of a ClientHello now and then), half-open (a ClientHello, and nothing after it).
func hostile(ctx context.Context, words []string, out io.Writer) error {
	var a attacker
	flags := flag.NewFlagSet("hostile", flag.ContinueOnError)
	flags.IntVar(&a.mark, "mark", 0, "mark of the socket, so that a pod's own capture lets it pass (needs CAP_NET_ADMIN)")
	flags.IntVar(&a.port, "source-port", 0, "own port; 0 is any")
	flags.StringVar(&a.ca, "ca", "", "folder with intermediate.pem and intermediate.key")
	flags.StringVar(&a.id, "id", "spiffe://lab/ns/default/sa/client", "identity in the certificate")
	flags.DurationVar(&a.patience, "for", 5*time.Second, "how long at most")
	flags.IntVar(&a.count, "count", 1, "how many connections at once")
	if err := flags.Parse(words); err != nil {
		return err
	}
	a.address = flags.Arg(1)
	attack := map[string]func(context.Context, *net.TCPConn) error{
		"no-certificate": a.noCertificate, "tls12": a.tls12, "foreign-root": a.foreignRoot, "signed": a.signed,
		"expired": a.expired, "garbage": garbage, "slow": slow, "half-open": halfOpen,
	}[flags.Arg(0)]
	if attack == nil {
		return fmt.Errorf("hostile: no mode %q", flags.Arg(0))
	}
	ctx, cancel := context.WithTimeout(ctx, a.patience)
	defer cancel()
	return a.run(ctx, attack, out)
}

// run attacks count times at once and tells how many ended how.
func (a *attacker) run(ctx context.Context, attack func(context.Context, *net.TCPConn) error, out io.Writer) error {
	t := tally{failed: map[string]int{}}
	var g sync.WaitGroup
	for range a.count {
		g.Go(func() { t.add(a.once(ctx, attack)) })
	}
	g.Wait()
	if t.ok > 0 {
		fmt.Fprintf(out, "let in %d\n", t.ok)
	}
	for why, n := range t.failed {
		fmt.Fprintf(out, "%s %d\n", why, n)
	}
	return nil
}

func (a *attacker) once(ctx context.Context, attack func(context.Context, *net.TCPConn) error) error {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		if a.mark == 0 {
			return nil
		}
		err2 := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, a.mark) })
		return errors.Join(err, err2)
	}}
	if a.port != 0 {
		d.LocalAddr = &net.TCPAddr{Port: a.port}
	}
	c, err := d.DialContext(ctx, "tcp", a.address)
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	return attack(ctx, c.(*net.TCPConn))
}

// handshake succeeds only if the other side has taken the certificate: TLS 1.3
// tells a client so with the first byte of an answer.
func handshake(ctx context.Context, c *net.TCPConn, cfg *tls.Config) error {
	cfg.InsecureSkipVerify = true // the attacker does not mind
	cfg.NextProtos = []string{"tacit/1"}
	t := tls.Client(c, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return refusedBy(err)
	}
	// An empty preamble of version 1, and a line for an echo server.
	if _, err := t.Write(append([]byte{1, 0, 0}, "let me in\n"...)); err != nil {
		return refusedBy(err)
	}
	answer := make([]byte, 4) // version, status, length
	if _, err := io.ReadFull(t, answer); err != nil {
		return refusedBy(err)
	}
	if answer[1] != 0 {
		return errRefused
	}
	return nil
}

var errRefused = errors.New("refused")

// refusedBy makes one thing of an alert and of the reset that may overtake it.
func refusedBy(err error) error {
	if err != nil && (strings.Contains(err.Error(), "remote error: tls") || Ending(err) == "reset" || errors.Is(err, io.EOF)) {
		return errRefused
	}
	return err
}

func (a *attacker) noCertificate(ctx context.Context, c *net.TCPConn) error {
	return handshake(ctx, c, &tls.Config{MinVersion: tls.VersionTLS13})
}

func (a *attacker) tls12(ctx context.Context, c *net.TCPConn) error {
	return handshake(ctx, c, &tls.Config{MaxVersion: tls.VersionTLS12})
}

func (a *attacker) foreignRoot(ctx context.Context, c *net.TCPConn) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "somebody else"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	return a.withLeaf(ctx, c, issuer{root, key, nil}, time.Now().Add(time.Hour))
}

func (a *attacker) signed(ctx context.Context, c *net.TCPConn) error {
	i, err := loadIssuer(a.ca)
	if err != nil {
		return err
	}
	return a.withLeaf(ctx, c, i, time.Now().Add(time.Hour))
}

func (a *attacker) expired(ctx context.Context, c *net.TCPConn) error {
	i, err := loadIssuer(a.ca)
	if err != nil {
		return err
	}
	return a.withLeaf(ctx, c, i, time.Now().Add(-time.Minute))
}

// issuer is a stolen, or a made up, certificate authority.
type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
	// chain is sent after the leaf.
	chain [][]byte
}

func loadIssuer(dir string) (issuer, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, "intermediate.pem"))
	if err != nil {
		return issuer{}, err
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, "intermediate.key"))
	if err != nil {
		return issuer{}, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return issuer{}, err
	}
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	return issuer{cert, pair.PrivateKey.(crypto.Signer), pair.Certificate}, err
}

func (a *attacker) withLeaf(ctx context.Context, c *net.TCPConn, i issuer, until time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	id, err := url.Parse(a.id)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, key.Public(), i.key)
	if err != nil {
		return err
	}
	leaf := tls.Certificate{Certificate: append([][]byte{der}, i.chain...), PrivateKey: key}
	return handshake(ctx, c, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{leaf}})
}

func garbage(_ context.Context, c *net.TCPConn) error {
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: hostile\r\n\r\n"); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return refusedBy(err)
}

// slow sends the beginning of a ClientHello, byte by byte.
func slow(ctx context.Context, c *net.TCPConn) error {
	hello := append([]byte{0x16, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3}, make([]byte, 200)...)
	for _, b := range hello {
		if _, err := c.Write([]byte{b}); err != nil {
			return refusedBy(err)
		}
		if pause.For(ctx, 100*time.Millisecond); ctx.Err() != nil {
			return errors.New("outlived")
		}
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return refusedBy(err)
}

// halfOpen sends a ClientHello, and leaves what comes back without an answer until
// the other side ends it.
func halfOpen(ctx context.Context, c *net.TCPConn) error {
	err := tls.Client(deaf{c}, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"tacit/1"}}).HandshakeContext(ctx)
	if !errors.Is(err, errDone) {
		return refusedBy(err)
	}
	for err = nil; err == nil; {
		_, err = c.Read(make([]byte, 512))
	}
	return refusedBy(err)
}

// deaf speaks, and does not listen.
type deaf struct{ net.Conn }

func (deaf) Read([]byte) (int, error) { return 0, errDone }
