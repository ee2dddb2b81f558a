package app

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tacit.dev/pause"
)

// connect HOST:PORT: says a line to an echo server and prints what comes back.
func connect(ctx context.Context, words []string, out io.Writer) error {
	flags := flag.NewFlagSet("connect", flag.ContinueOnError)
	say := flags.String("say", "hello", "the line")
	timeout := flags.Duration("timeout", 10*time.Second, "for all of it")
	if err := flags.Parse(words); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", flags.Arg(0))
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := exchange(c, c, *say+"\n"); err != nil {
		return err
	}
	fmt.Fprintln(out, *say)
	return nil
}

// dialer is what dialOnly does once.
type dialer struct {
	address  string
	port     int
	send     string
	patience time.Duration
}

// dialOnly HOST:PORT: connects from a source port of choice, sends what it is told,
// and prints what comes and how it ends. With --within the first byte has to come
// so soon at least once in five times: a busy machine is slow now and then, a rule
// always. With --lasts it must not end before, and prints how long it took.
func dialOnly(ctx context.Context, words []string, out io.Writer) error {
	var d dialer
	flags := flag.NewFlagSet("dial", flag.ContinueOnError)
	flags.IntVar(&d.port, "source-port", 0, "own port; the next ones for further times")
	flags.StringVar(&d.send, "send", "", "what to send; \\n is a line's end")
	flags.DurationVar(&d.patience, "for", 5*time.Second, "how long to listen")
	within := flags.Duration("within", 0, "when the first byte has to be there")
	lasts := flags.Duration("lasts", 0, "how long it has to last")
	if err := flags.Parse(words); err != nil {
		return err
	}
	d.address = flags.Arg(0)
	if *within == 0 {
		began := time.Now()
		said, _ := d.once(ctx, func(io.Reader) error { return nil })
		if took := time.Since(began); *lasts > 0 {
			said += ", after " + took.Round(time.Second).String()
			if took < *lasts {
				return errors.New(said)
			}
		}
		fmt.Fprintln(out, said)
		return nil
	}
	fastest := time.Hour
	for range 5 {
		began := time.Now()
		_, err := d.once(ctx, func(r io.Reader) error {
			_, err := io.ReadFull(r, make([]byte, 1))
			fastest = min(fastest, time.Since(began))
			return errors.Join(err, errDone)
		})
		if !errors.Is(err, errDone) {
			return err
		}
		if d.port != 0 {
			d.port++
		}
	}
	if fastest > *within {
		return fmt.Errorf("the first byte took %s at least", fastest)
	}
	fmt.Fprintln(out, "in time")
	return nil
}

var errDone = errors.New("done")

// once connects; look sees the connection first, and its error is the end.
func (d *dialer) once(ctx context.Context, look func(io.Reader) error) (string, error) {
	n := net.Dialer{Timeout: d.patience, LocalAddr: &net.TCPAddr{Port: d.port}, Control: reuse}
	c, err := n.DialContext(ctx, "tcp", d.address)
	if err != nil {
		return Ending(err), err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(d.patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, strings.ReplaceAll(d.send, `\n`, "\n")); err != nil {
		return Ending(err), err
	}
	if err := look(c); err != nil {
		return "", err
	}
	got, err := io.ReadAll(io.LimitReader(c, 1<<20))
	return fmt.Sprintf("%q, then %s", got, Ending(err)), err
}

// reuse lets a connection have a port that another one to somewhere else has or had.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	err2 := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, err2)
}

// tally is what a load has to tell.
type tally struct {
	mu     sync.Mutex
	ok     int
	failed map[string]int
	last   time.Time
	gap    time.Duration
	broken int
}

func (t *tally) add(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.failed[Ending(err)]++
		return
	}
	now := time.Now()
	t.ok++
	t.gap = max(t.gap, now.Sub(t.last))
	t.last = now
}

// load HOST:PORT: makes connections to an echo server, one after the other in each
// worker, until it is told to end; then it prints how they went, and fails if one
// of them did and none was allowed to.
func load(ctx context.Context, words []string, out io.Writer) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	workers := flags.Int("workers", 4, "connections at a time")
	hold := flags.Int("hold", 0, "connections that stay, and speak now and then")
	pace := flags.Duration("pace", 2*time.Millisecond, "pause of a worker")
	timeout := flags.Duration("timeout", 10*time.Second, "for one connection")
	maxFailed := flags.Int("max-failed", 0, "failures allowed")
	maxGap := flags.Duration("max-gap", time.Minute, "longest time without a success allowed")
	count := flags.Int("count", 0, "how many connections in all; 0 is until told to end")
	lasts := flags.Duration("for", 0, "how long; 0 is until told to end")
	maxBroken := flags.Int("max-broken", 0, "held connections that may break")
	if err := flags.Parse(words); err != nil {
		return err
	}
	if *lasts > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *lasts)
		defer cancel()
	}
	t := &tally{failed: map[string]int{}, last: time.Now()}
	var begun atomic.Int64
	var g sync.WaitGroup
	for range *hold {
		g.Go(func() { t.keep(ctx, flags.Arg(0), *timeout) })
	}
	for range *workers {
		g.Go(func() {
			for ctx.Err() == nil && (*count == 0 || begun.Add(1) <= int64(*count)) {
				t.add(once(flags.Arg(0), *timeout))
				pause.For(ctx, *pace)
			}
		})
	}
	g.Wait()
	return t.tell(out, *maxFailed, *maxBroken, *maxGap)
}

func (t *tally) tell(out io.Writer, maxFailed, maxBroken int, maxGap time.Duration) error {
	t.gap = max(t.gap, time.Since(t.last))
	failed := 0
	var reasons []string
	for _, why := range slices.Sorted(maps.Keys(t.failed)) {
		failed += t.failed[why]
		reasons = append(reasons, fmt.Sprintf("%s %d", why, t.failed[why]))
	}
	fmt.Fprintf(out, "ok %d, failed %d (%s), held and broken %d, longest gap %s\n",
		t.ok, failed, strings.Join(reasons, ", "), t.broken, t.gap.Round(time.Millisecond))
	if t.ok == 0 || failed > maxFailed || t.broken > maxBroken || t.gap > maxGap {
		return errors.New("that is more than was allowed")
	}
	return nil
}

// once makes one connection. What had begun when the load ends is finished.
func once(address string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	c, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	_, err = exchange(c, c, "under load\n")
	return err
}

// keep holds one connection and speaks on it ten times a second.
func (t *tally) keep(ctx context.Context, address string, timeout time.Duration) {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1}
	c, err := d.DialContext(ctx, "tcp", address)
	for err == nil && ctx.Err() == nil {
		if err = c.SetDeadline(time.Now().Add(timeout)); err != nil {
			break
		}
		if _, err = exchange(c, c, "still here\n"); err == nil {
			pause.For(ctx, 100*time.Millisecond)
		}
	}
	if c != nil {
		c.Close()
	}
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.broken++
	}
}

// many HOST:PORT: opens connections to an echo server, keeps them all until it is
// told to end, and then speaks once on each.
func many(ctx context.Context, words []string, out io.Writer) error {
	flags := flag.NewFlagSet("many", flag.ContinueOnError)
	count := flags.Int("connections", 1000, "how many")
	if err := flags.Parse(words); err != nil {
		return err
	}
	var open []net.Conn
	for range *count {
		d := net.Dialer{Timeout: stallAfter, KeepAlive: -1}
		c, err := d.DialContext(ctx, "tcp", flags.Arg(0))
		if err != nil {
			return fmt.Errorf("after %d connections: %w", len(open), err)
		}
		defer c.Close()
		open = append(open, c)
	}
	fmt.Fprintf(out, "open %d\n", len(open))
	<-ctx.Done()
	for i, c := range open {
		if err := c.SetDeadline(time.Now().Add(stallAfter)); err != nil {
			return err
		}
		if _, err := exchange(c, c, "last words\n"); err != nil {
			return fmt.Errorf("connection %d of %d: %w", i, len(open), err)
		}
	}
	fmt.Fprintf(out, "spoke on %d\n", len(open))
	return nil
}
