package app

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pause"
)

// The ports of "serve compat".
const (
	portResult = 7000 + iota
	portEcho
	portFirst
	portLate
	portAnswer
	portLastWord
	portReset
	portWatch
	portDrip
	portBoth
	portTLS
	portWhoami
	portUnread
	portCloseOnly
	portName
	portUrgent
	portClosed = 7099
)

func compatPorts() []string {
	return []string{
		"result:7000", "echo:7001", "first:7002", "late:7003", "answer:7004", "lastword:7005", "reset:7006", "watch:7007",
		"drip:7008", "both:7009", "tls:7010", "whoami:7011", "unread:7012", "closeonly:7013", "name:7014",
		"urgent:7015",
	}
}

// tester is one run of all checks against one server.
type tester struct {
	network     string
	target      string
	self        string
	service     string
	ownService  string
	dead        string
	size        int64
	connections int
	silence     time.Duration
}

// check is one thing that a network does to an application. What it returns is
// printed, and must be the same with and without a mesh.
type check struct {
	name string
	// alone checks are heavy, and run one after the other after all others.
	alone bool
	// needs reports whether the run was given what the check is about.
	needs func(t *tester) bool
	do    func(ctx context.Context, t *tester) (string, error)
}

func checks() []check {
	always := func(*tester) bool { return true }
	service := func(t *tester) bool { return t.service != "" }
	own := func(t *tester) bool { return t.ownService != "" }
	self := func(t *tester) bool { return t.self != "" }
	dead := func(t *tester) bool { return t.dead != "" }
	return []check{
		{"client speaks first", false, always, func(ctx context.Context, t *tester) (string, error) { return t.echo(ctx, t.target, portEcho) }},
		{"server speaks first", false, always, func(ctx context.Context, t *tester) (string, error) { return t.first(ctx, t.target, portFirst) }},
		{"server speaks first, after a second", false, always, func(ctx context.Context, t *tester) (string, error) { return t.first(ctx, t.target, portLate) }},
		{"client half-closes, then server sends", false, always, clientHalfClose},
		{"server half-closes, then client sends", false, always, serverHalfClose},
		{"server resets", false, always, serverResets},
		{"server closes with bytes unread", false, always, serverUnread},
		{"server closes at once", false, always, serverCloses},
		{"client resets", false, always, clientResets},
		{"client closes", false, always, clientCloses},
		{"closed port", false, always, closedPort},
		{"dead address", false, dead, deadAddress},
		{"urgent byte", false, always, urgentByte},
		{"single bytes", false, always, singleBytes},
		{"TLS of the application", false, always, applicationTLS},
		{"source address", false, self, sourceAddress},
		{"silence, then bytes", false, always, silence},
		{"service, port number", false, service, func(ctx context.Context, t *tester) (string, error) { return t.echo(ctx, t.service, 80) }},
		{"service, another port, named target", false, service, func(ctx context.Context, t *tester) (string, error) { return t.first(ctx, t.service, 81) }},
		{"own service", false, own, func(ctx context.Context, t *tester) (string, error) { return t.echo(ctx, t.ownService, 80) }},
		{"own address", false, self, func(ctx context.Context, t *tester) (string, error) { return t.echo(ctx, t.self, portEcho) }},
		{"own address, another port", false, self, func(ctx context.Context, t *tester) (string, error) { return t.first(ctx, t.self, portFirst) }},
		{"bytes both ways at once", true, always, bothAtOnce},
		{"many connections at once", true, always, manyAtOnce},
	}
}

// compat runs all checks and prints one line for each.
func compat(ctx context.Context, words []string, out io.Writer) error {
	t := &tester{}
	flags := flag.NewFlagSet("compat", flag.ContinueOnError)
	family := flags.Int("family", 4, "4 or 6")
	flags.StringVar(&t.target, "target", "", "address of a pod that runs serve compat")
	flags.StringVar(&t.self, "self", "", "own address, if this pod runs serve compat too")
	flags.StringVar(&t.service, "service", "", "service before the target: 80 leads to echo, 81 to first")
	flags.StringVar(&t.ownService, "own-service", "", "service before this pod: 80 leads to echo")
	flags.StringVar(&t.dead, "dead", "", "address where nobody is")
	flags.Int64Var(&t.size, "size", 64<<20, "bytes each way at once")
	flags.IntVar(&t.connections, "connections", 2000, "how many at once")
	flags.DurationVar(&t.silence, "silence", 300*time.Millisecond, "how long nobody speaks")
	only := flags.String("only", "", "run only the checks with this in their name")
	if err := flags.Parse(words); err != nil {
		return err
	}
	t.network = fmt.Sprintf("tcp%d", *family)
	var todo []check
	for _, c := range checks() {
		if c.needs(t) && strings.Contains(c.name, *only) {
			todo = append(todo, c)
		}
	}
	return t.run(ctx, todo, out)
}

func (t *tester) run(ctx context.Context, todo []check, out io.Writer) error {
	lines := make([]string, len(todo))
	var light sync.WaitGroup
	for i, c := range todo {
		if !c.alone {
			light.Go(func() { lines[i] = t.one(ctx, c) })
		}
	}
	light.Wait()
	for i, c := range todo {
		if c.alone {
			lines[i] = t.one(ctx, c)
		}
	}
	_, err := fmt.Fprintln(out, strings.Join(lines, "\n"))
	return err
}

func (t *tester) one(ctx context.Context, c check) string {
	ctx, cancel := context.WithTimeout(ctx, t.silence+2*time.Minute)
	defer cancel()
	said, err := c.do(ctx, t)
	if err != nil {
		return fmt.Sprintf("%s: FAILED: %s", c.name, Ending(err))
	}
	return c.name + ": " + said
}

// dial connects; the deadline of everything on it is stallAfter from now.
func (t *tester) dial(ctx context.Context, host string, port int) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: stallAfter}
	c, err := d.DialContext(ctx, t.network, net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), c.SetDeadline(time.Now().Add(stallAfter))
}

func (t *tester) echo(ctx context.Context, host string, port int) (string, error) {
	c, err := t.dial(ctx, host, port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return exchange(c, c, "hello")
}

// exchange sends a line to an echo server and reads it back.
func exchange(w io.Writer, r io.Reader, line string) (string, error) {
	if _, err := io.WriteString(w, line); err != nil {
		return "", err
	}
	got := make([]byte, len(line))
	if _, err := io.ReadFull(r, got); err != nil {
		return "", err
	}
	if string(got) != line {
		return "", fmt.Errorf("sent %q, got %q", line, got)
	}
	return "echoed", nil
}

// first reads the greeting before it says anything.
func (t *tester) first(ctx context.Context, host string, port int) (string, error) {
	c, err := t.dial(ctx, host, port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil {
		return "", err
	}
	if string(got) != greeting {
		return "", fmt.Errorf("greeted with %q", got)
	}
	said, err := exchange(c, c, "thanks")
	return "greeted, " + said, err
}

func clientHalfClose(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portAnswer)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.Copy(c, stream(300_000, 3)); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return "", err
	}
	n, sum, err := drain(in)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("server %s, client got %d %08x", strings.TrimSpace(line), n, sum), nil
}

func serverHalfClose(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portLastWord)
	if err != nil {
		return "", err
	}
	defer c.Close()
	n, sum, err := drain(c)
	if err != nil {
		return "", err
	}
	token := rand.Text()
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return "", err
	}
	if _, err := io.Copy(c, stream(1<<20, 9)); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	said, err := t.result(ctx, token)
	return fmt.Sprintf("client got %d %08x, server %s", n, sum, said), err
}

// result asks the server what became of the connection with that token.
func (t *tester) result(ctx context.Context, token string) (string, error) {
	c, err := t.dial(ctx, t.target, portResult)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return "", err
	}
	_ = c.SetDeadline(time.Now().Add(2 * stallAfter))
	said, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(said), err
}

// endingAfter connects, sends something, and tells how the server ends it.
func (t *tester) endingAfter(ctx context.Context, port int, send string) (string, error) {
	c, err := t.dial(ctx, t.target, port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, send); err != nil {
		return "", err
	}
	n, err := io.Copy(io.Discard, c)
	return fmt.Sprintf("%d bytes, then %s", n, Ending(err)), nil
}

func serverResets(ctx context.Context, t *tester) (string, error) {
	return t.endingAfter(ctx, portReset, "x")
}

func serverUnread(ctx context.Context, t *tester) (string, error) {
	return t.endingAfter(ctx, portUnread, strings.Repeat("x", 1000))
}

func serverCloses(ctx context.Context, t *tester) (string, error) {
	return t.endingAfter(ctx, portCloseOnly, "")
}

func clientResets(ctx context.Context, t *tester) (string, error) {
	return t.leave(ctx, func(c *net.TCPConn) error { return c.SetLinger(0) })
}

func clientCloses(ctx context.Context, t *tester) (string, error) {
	return t.leave(ctx, func(*net.TCPConn) error { return nil })
}

// leave closes a connection in some way, and tells what the server saw.
func (t *tester) leave(ctx context.Context, how func(*net.TCPConn) error) (string, error) {
	c, err := t.dial(ctx, t.target, portWatch)
	if err != nil {
		return "", err
	}
	defer c.Close()
	token := rand.Text()
	if _, err := io.WriteString(c, token+"\n"); err != nil {
		return "", err
	}
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return "", err
	}
	if err := errors.Join(how(c), c.Close()); err != nil {
		return "", err
	}
	said, err := t.result(ctx, token)
	return "server saw " + said, err
}

// closedPort: without a mesh connect is refused; with one, the reset may come after
// it. Both are allowed, within a second. A busy machine can delay one, but not each time.
func closedPort(ctx context.Context, t *tester) (string, error) {
	quickest := time.Hour
	for range 3 {
		began := time.Now()
		if how := failure(ctx, t, t.target, time.Minute); how != "refused" && how != "reset" {
			return "", fmt.Errorf("it ended by %s", how)
		}
		quickest = min(quickest, time.Since(began))
	}
	if quickest > time.Second {
		return "", fmt.Errorf("refused or reset, but after %s at best", quickest)
	}
	return "refused or reset within a second", nil
}

// failure connects to a port where nobody listens and tells how it fails.
func failure(ctx context.Context, t *tester, host string, patience time.Duration) string {
	d := net.Dialer{Timeout: patience}
	c, err := d.DialContext(ctx, t.network, net.JoinHostPort(host, fmt.Sprint(portClosed)))
	if err != nil {
		return Ending(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, err = c.Read(make([]byte, 1))
	return Ending(err)
}

// deadAddress: nobody answers. Without a mesh the client's patience ends it, with
// one the proxy's may.
func deadAddress(ctx context.Context, t *tester) (string, error) {
	switch how := failure(ctx, t, t.dead, 2*time.Second); how {
	case "timeout", "reset":
		return "fails in time", nil
	default:
		return "", fmt.Errorf("it ended by %s", how)
	}
}

// singleBytes: what is written byte by byte, without an answer, comes byte by byte. A
// busy machine may be late once, but not each time.
func singleBytes(ctx context.Context, t *tester) (string, error) {
	var there, back time.Duration
	for range 3 {
		var err error
		if there, back, err = t.drip(ctx); err != nil {
			return "", err
		}
		if there < dropLate && back < dropLate {
			return "both ways in time", nil
		}
	}
	return "", fmt.Errorf("%s late to the server, and %s to the client", there, back)
}

// drip takes single bytes from the server, then sends as many, and tells how late
// those of each direction were.
func (t *tester) drip(ctx context.Context) (there, back time.Duration, err error) {
	c, err := t.dial(ctx, t.target, portDrip)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	begin, in := time.Now(), bufio.NewReader(c)
	if _, err := fmt.Fprintln(c, begin.UnixNano()); err != nil {
		return 0, 0, err
	}
	if back, err = lateness(begin, in, c); err != nil {
		return 0, 0, err
	}
	if err := dripFrom(begin.Add(drops*dropPace), in, c); err != nil {
		return 0, 0, err
	}
	line, err := in.ReadString('\n')
	if err != nil {
		return 0, 0, err
	}
	there, err = time.ParseDuration(strings.TrimSpace(line))
	return there, back, err
}

// urgentByte: one byte is sent with MSG_OOB to a server that wants such bytes in line.
func urgentByte(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portUrgent)
	if err != nil {
		return "", err
	}
	defer c.Close()
	for _, part := range []string{"abc", "!", "def"} {
		if part == "!" {
			err = sendUrgent(c, part)
		} else {
			_, err = io.WriteString(c, part)
		}
		if err != nil {
			return "", err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	said, err := io.ReadAll(c)
	return strings.TrimSpace(string(said)), err
}

func sendUrgent(c *net.TCPConn, p string) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	err2 := raw.Control(func(fd uintptr) { err = unix.Sendmsg(int(fd), []byte(p), nil, nil, unix.MSG_OOB|unix.MSG_NOSIGNAL) })
	return errors.Join(err, err2)
}

func applicationTLS(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portTLS)
	if err != nil {
		return "", err
	}
	defer c.Close()
	s := tls.Client(c, &tls.Config{ServerName: "app", InsecureSkipVerify: true}) // who it is, is not the question
	if err := s.HandshakeContext(ctx); err != nil {
		return "", err
	}
	said, err := exchange(s, s, "secret")
	return said + ", server name " + s.ConnectionState().PeerCertificates[0].DNSNames[0], err
}

func sourceAddress(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portWhoami)
	if err != nil {
		return "", err
	}
	defer c.Close()
	said, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && strings.TrimSpace(said) != t.self {
		return "", fmt.Errorf("the server saw %s, want %s", strings.TrimSpace(said), t.self)
	}
	return "own address", err
}

func silence(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portEcho)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := exchange(c, c, "still there?"); err != nil {
		return "", err
	}
	pause.For(ctx, t.silence)
	if err := c.SetDeadline(time.Now().Add(stallAfter)); err != nil {
		return "", err
	}
	return exchange(c, c, "yes")
}

func bothAtOnce(ctx context.Context, t *tester) (string, error) {
	c, err := t.dial(ctx, t.target, portBoth)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c, "%d 5\n", t.size); err != nil {
		return "", err
	}
	sent := make(chan error, 1)
	go sendStream(c, t.size, 6, sent)
	in := bufio.NewReaderSize(c, 64<<10)
	n, sum, err := drain(io.LimitReader(in, t.size))
	if err = errors.Join(err, <-sent); err != nil {
		return "", err
	}
	line, err := in.ReadString('\n')
	if err != nil {
		return "", err
	}
	if want := checksum(t.size, 5); sum != want {
		return "", fmt.Errorf("got %d bytes with checksum %08x, want %08x", n, sum, want)
	}
	if want := fmt.Sprintf("got %d %08x", t.size, checksum(t.size, 6)); strings.TrimSpace(line) != want {
		return "", fmt.Errorf("server %s, want %s", line, want)
	}
	return fmt.Sprintf("%d bytes each way, checksums right", n), nil
}

// manyAtOnce opens all connections, speaks on all of them while all are open, and
// closes them.
func manyAtOnce(ctx context.Context, t *tester) (string, error) {
	var all, opened sync.WaitGroup
	errs := make([]error, t.connections)
	opened.Add(t.connections)
	for i := range t.connections {
		all.Go(func() { errs[i] = t.oneOfMany(ctx, fmt.Sprintf("this is number %06d", i), &opened) })
	}
	all.Wait()
	failed := map[string]int{}
	for _, err := range errs {
		if err != nil {
			failed[Ending(err)]++
		}
	}
	if len(failed) > 0 {
		return "", fmt.Errorf("%v of %d failed", failed, t.connections)
	}
	return fmt.Sprintf("%d echoed", t.connections), nil
}

func (t *tester) oneOfMany(ctx context.Context, line string, opened *sync.WaitGroup) error {
	c, err := t.dial(ctx, t.target, portEcho)
	opened.Done()
	if err != nil {
		return err
	}
	defer c.Close()
	opened.Wait()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	_, err = exchange(c, c, line)
	return err
}
