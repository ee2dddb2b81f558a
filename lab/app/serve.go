package app

import (
	"context"
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

// behavior is what a server does with one connection, which it need not close.
type behavior func(s *server, c *net.TCPConn)

// server is what all ports of one serve share.
type server struct {
	mu sync.Mutex
	// seen is what happened to a connection, by the token that its client sent;
	// results port tells. changed is closed and replaced when it grows.
	seen    map[string]string
	changed chan struct{}

	name string
}

// serve BEHAVIOUR:PORT...: listens on all addresses of both families. With --accept-after
// it is a server that is overloaded until then: few connections wait, and the SYNs of
// others are dropped. After
// SIGTERM (the end of ctx) it goes on for --drain as a good citizen does whose
// endpoint is still known to some, then closes its listeners and lets the open
// connections finish for a while.
func serve(ctx context.Context, words []string, _ io.Writer) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	drain := flags.Duration("drain", 0, "go on accepting for so long after SIGTERM")
	after := flags.Duration("accept-after", 0, "have a backlog of one connection, and accept none so long")
	finish := flags.Duration("finish", 2*time.Second, "let open connections finish for so long at most")
	name := flags.String("name", "", "what the behavior name answers")
	if err := flags.Parse(words); err != nil {
		return err
	}
	s := &server{seen: map[string]string{}, changed: make(chan struct{}), name: *name}
	specs := flags.Args()
	if len(specs) == 1 && specs[0] == "compat" {
		specs = compatPorts()
	}
	listeners, err := listenAll(specs)
	if err != nil {
		return err
	}
	if *after > 0 {
		for _, l := range listeners {
			if err := l.shorten(); err != nil {
				return err
			}
		}
		pause.For(ctx, *after)
	}
	var accepting, open sync.WaitGroup
	for _, l := range listeners {
		accepting.Go(func() { l.accept(s, &open) })
	}
	<-ctx.Done()
	time.Sleep(*drain)
	for _, l := range listeners {
		l.Close()
	}
	accepting.Wait()
	waitAtMost(&open, *finish)
	return nil
}

// waitAtMost leaves the rest to the end of the process.
func waitAtMost(g *sync.WaitGroup, d time.Duration) {
	done := make(chan struct{})
	go func() { defer close(done); g.Wait() }()
	select {
	case <-done:
	case <-time.After(d):
	}
}

type listener struct {
	*net.TCPListener
	do behavior
}

func listenAll(specs []string) ([]listener, error) {
	var out []listener
	for _, spec := range specs {
		name, port, _ := strings.Cut(spec, ":")
		do := behaviors()[name]
		if do == nil {
			return nil, fmt.Errorf("serve %s: no behavior %q", spec, name)
		}
		silent := net.ListenConfig{KeepAlive: -1} // as most programs: what is quiet is not ended
		l, err := silent.Listen(context.Background(), "tcp", ":"+port)
		if err != nil {
			return nil, err
		}
		out = append(out, listener{l.(*net.TCPListener), do})
	}
	if len(out) == 0 {
		return nil, errors.New("serve: want BEHAVIOUR:PORT, at least one")
	}
	return out, nil
}

// shorten has only one connection wait for accept.
func (l listener) shorten() error {
	c, err := l.SyscallConn()
	if err != nil {
		return err
	}
	err2 := c.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) })
	return errors.Join(err, err2)
}

func (l listener) accept(s *server, open *sync.WaitGroup) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Millisecond) // out of descriptors: others will close some
			continue
		}
		open.Go(func() {
			defer c.Close()
			l.do(s, c)
		})
	}
}

// saw remembers what happened under a token.
func (s *server) saw(token, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[token] = what
	close(s.changed)
	s.changed = make(chan struct{})
}

// ask waits until something happened under the token.
func (s *server) ask(token string, within time.Duration) string {
	deadline := time.After(within)
	for {
		s.mu.Lock()
		what, ok := s.seen[token]
		changed := s.changed
		delete(s.seen, token)
		s.mu.Unlock()
		if ok {
			return what
		}
		select {
		case <-changed:
		case <-deadline:
			return "nothing"
		}
	}
}
