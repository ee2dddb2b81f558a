package app

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	greeting = "welcome\n"
	// stallAfter is when a conversation has stalled: nothing that the stories do
	// takes so long between two bytes, silence apart.
	stallAfter = 20 * time.Second
)

func behaviors() map[string]behavior {
	return map[string]behavior{
		"echo":      echo,
		"first":     first,
		"late":      late,
		"answer":    answerAfterEOF,
		"lastword":  lastWord,
		"reset":     resetAfterByte,
		"watch":     watchEnd,
		"drip":      drip,
		"both":      bothWays,
		"tls":       ownTLS(),
		"whoami":    whoami,
		"peer":      sayPeer,
		"result":    result,
		"name":      sayName,
		"sink":      sink,
		"quiet":     quiet,
		"unread":    resetUnread,
		"closeonly": closeAtOnce,
		"stuck":     stuck,
		"urgent":    urgentInLine,
		"news":      news,
	}
}

// echo sends back what comes, and ends when the client has ended.
func echo(_ *server, c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// first speaks first, at once, and then echoes.
func first(s *server, c *net.TCPConn) {
	if _, err := io.WriteString(c, greeting); err == nil {
		echo(s, c)
	}
}

// late says nothing for a second and then speaks first.
func late(s *server, c *net.TCPConn) {
	time.Sleep(time.Second)
	first(s, c)
}

// answerAfterEOF reads a request to its end, then sends a mebibyte, and its end.
func answerAfterEOF(_ *server, c *net.TCPConn) {
	n, sum, err := drain(c)
	if err != nil {
		return
	}
	fmt.Fprintf(c, "got %d %08x\n", n, sum)
	_, _ = io.Copy(c, stream(1<<20, 7))
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c)
}

// lastWord sends a mebibyte and its end, then reads what the client still has to
// say, and remembers it under the first line.
func lastWord(s *server, c *net.TCPConn) {
	_, _ = io.Copy(c, stream(1<<20, 8))
	_ = c.CloseWrite()
	in := bufio.NewReader(c)
	token, err := in.ReadString('\n')
	if err != nil {
		s.saw(strings.TrimSpace(token), "no token: "+Ending(err))
		return
	}
	n, sum, err := drain(in)
	s.saw(strings.TrimSpace(token), fmt.Sprintf("got %d %08x, then %s", n, sum, Ending(err)))
}

// resetAfterByte reads a byte and resets.
func resetAfterByte(_ *server, c *net.TCPConn) {
	_, _ = io.ReadFull(c, make([]byte, 1))
	_ = c.SetLinger(0)
}

// resetUnread closes with bytes unread, which the kernel makes a reset.
func resetUnread(_ *server, c *net.TCPConn) {
	_, _ = io.ReadFull(c, make([]byte, 1))
}

// closeAtOnce accepts and closes.
func closeAtOnce(*server, *net.TCPConn) {}

// urgentInLine takes urgent bytes in line, as FTP and telnet servers do, and says what
// it has read.
func urgentInLine(_ *server, c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	if err != nil {
		return
	}
	b, err := io.ReadAll(c)
	fmt.Fprintf(c, "got %q, then %s\n", b, Ending(err))
}

// watchEnd reads a token, says ok, and remembers how the connection ended.
func watchEnd(s *server, c *net.TCPConn) {
	in := bufio.NewReader(c)
	token, err := in.ReadString('\n')
	if err != nil {
		return
	}
	if _, err := io.WriteString(c, "ok\n"); err != nil {
		return
	}
	_, err = io.Copy(io.Discard, in)
	s.saw(strings.TrimSpace(token), Ending(err))
}

const (
	// drops are sent in each direction, one every dropPace.
	drops    = 100
	dropPace = 5 * time.Millisecond
	// dropLate is less than what anything adds that collects small writes.
	dropLate = 10 * time.Millisecond
)

// drip reads a time, sends single bytes from then on, takes as many, and says how
// late they were.
func drip(_ *server, c *net.TCPConn) {
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	nanoseconds, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		return
	}
	begin := time.Unix(0, nanoseconds)
	if dripFrom(begin, in, c) != nil {
		return
	}
	if late, err := lateness(begin.Add(drops*dropPace), in, c); err == nil {
		fmt.Fprintln(c, late)
	}
}

// dripFrom sends single bytes at their times, whatever becomes of those before.
func dripFrom(begin time.Time, r io.Reader, w io.Writer) error {
	for i := range drops {
		time.Sleep(time.Until(begin.Add(time.Duration(i) * dropPace)))
		if _, err := w.Write([]byte{'.'}); err != nil {
			return err
		}
	}
	_, err := io.CopyN(io.Discard, r, drops/2)
	return err
}

// lateness reads them, and is how late the one in the middle came, if they are put
// in the order of their lateness. Both ends have the same clock. Each second byte has
// an answer: then the first is acknowledged late, and Nagle's algorithm, if it is on
// anywhere, holds the second back.
func lateness(begin time.Time, r io.Reader, w io.Writer) (time.Duration, error) {
	late := make([]time.Duration, drops)
	for i := range late {
		if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
			return 0, err
		}
		late[i] = time.Since(begin.Add(time.Duration(i) * dropPace))
		if i%2 == 0 {
			continue
		}
		if _, err := w.Write([]byte{'!'}); err != nil {
			return 0, err
		}
	}
	slices.Sort(late)
	return late[drops/2], nil
}

// bothWays reads "SIZE SEED\n", then sends that stream while it reads another of the
// same size, and ends with what it got.
func bothWays(_ *server, c *net.TCPConn) {
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	size, seed, err := sizeAndSeed(line)
	if err != nil {
		return
	}
	sent := make(chan error, 1)
	go sendStream(c, size, seed, sent)
	n, sum, err := drain(io.LimitReader(in, size))
	if err = errors.Join(err, <-sent); err != nil {
		return
	}
	fmt.Fprintf(c, "got %d %08x\n", n, sum)
}

func sendStream(w io.Writer, size int64, seed byte, done chan<- error) {
	_, err := io.Copy(w, stream(size, seed))
	done <- err
}

func sizeAndSeed(line string) (int64, byte, error) {
	a, b, _ := strings.Cut(strings.TrimSpace(line), " ")
	size, err := strconv.ParseInt(a, 10, 64)
	seed, err2 := strconv.ParseUint(b, 10, 8)
	return size, byte(seed), errors.Join(err, err2)
}

// whoami tells the client its address as the server sees it.
func whoami(_ *server, c *net.TCPConn) {
	host, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err == nil {
		fmt.Fprintln(c, strings.TrimPrefix(host, "::ffff:"))
	}
}

// sayPeer tells the client its address and port as the server sees them.
func sayPeer(_ *server, c *net.TCPConn) {
	fmt.Fprintln(c, c.RemoteAddr())
}

// result answers what happened under a token.
func result(s *server, c *net.TCPConn) {
	token, err := bufio.NewReader(c).ReadString('\n')
	if err == nil {
		fmt.Fprintln(c, s.ask(strings.TrimSpace(token), stallAfter))
	}
}

// sayName tells who serves.
func sayName(s *server, c *net.TCPConn) {
	name := s.name
	if name == "" {
		name = os.Getenv("POD_NAME")
	}
	fmt.Fprintln(c, name)
}

// sink reads and says nothing.
func sink(_ *server, c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }

// quiet neither reads nor writes until the client goes.
func quiet(_ *server, c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) }

// ownTLS speaks TLS of its own and echoes inside of it.
func ownTLS() behavior {
	return func(_ *server, c *net.TCPConn) {
		cert, err := selfSigned()
		if err != nil {
			return
		}
		t := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		_, _ = io.Copy(t, t)
		_ = t.CloseWrite()
	}
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"app"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// Ending is how a connection ended, in words that do not depend on who was in
// between.
func Ending(err error) string {
	var timeout net.Error
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return "end"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}
