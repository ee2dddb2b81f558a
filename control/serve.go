package control

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tacit.dev/control/ca"
)

// serverNames are what nodes may reach control by: the given names, and the host
// of the listener or, if that is any address, all addresses of the machine.
func serverNames(l net.Addr, given []string) ([]string, error) {
	names := slices.Clone(given)
	at, err := netip.ParseAddrPort(l.String())
	if err != nil {
		return nil, fmt.Errorf("name control by its address %s: %w", l, err)
	}
	if !at.Addr().IsUnspecified() {
		return unique(append(names, at.Addr().Unmap().WithZone("").String())), nil
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("name control by its addresses: %w", err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			names = append(names, p.Addr().Unmap().WithZone("").String())
		}
	}
	return unique(append(names, "localhost")), nil
}

// advertised is where other processes reach l.
func advertised(l net.Addr, given string) (string, error) {
	if given != "" {
		return given, nil
	}
	at, err := netip.ParseAddrPort(l.String())
	if err != nil || !at.Addr().IsUnspecified() {
		return l.String(), err
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("find an address of this machine: %w", err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			return netip.AddrPortFrom(p.Addr().Unmap(), at.Port()).String(), nil
		}
	}
	return l.String(), nil
}

func unique(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// serverCertificate is control's own, renewed at half of its life by the
// handshake that finds it old. It is safe for concurrent use.
type serverCertificate struct {
	ca    *ca.CA
	names []string

	mu   sync.Mutex // guards cert; held while another is made
	cert *tls.Certificate
}

func (s *serverCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.cert != nil && now.Before(s.cert.Leaf.NotBefore.Add(s.cert.Leaf.NotAfter.Sub(s.cert.Leaf.NotBefore)/2)) {
		return s.cert, nil
	}
	fresh, err := s.ca.ServerCertificate(s.names)
	if err != nil && s.cert != nil && now.Before(s.cert.Leaf.NotAfter) {
		return s.cert, nil
	}
	if err == nil {
		s.cert = fresh
	}
	return fresh, err
}
