// Command app is the application of the tests: a server that says who it is and
// who it sees, then echoes; and a client of it.
//
//	app serve ADDRESS...        on TCP
//	app dial ADDRESS [WORDS]    prints the greeting, and the echo of the words
//	app web HTTP [GRPC]         a web server with probes, see web
//	app webhook HTTPS CERT KEY  an admission webhook, see webhook
//	app get URL, app post URL   prints the answer
//	app resolve NAME            prints the addresses of a name
//	app sleep                   until a signal
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) > 1 && args[0] == "serve":
		return serve(ctx, args[1:])
	case len(args) > 1 && args[0] == "dial":
		return dial(ctx, args[1], strings.Join(args[2:], " "))
	case (len(args) == 2 || len(args) == 3) && args[0] == "web":
		return web(ctx, args[1:])
	case len(args) == 4 && args[0] == "webhook":
		return webhook(ctx, args[1], args[2], args[3])
	case len(args) == 2 && (args[0] == "get" || args[0] == "post"):
		return request(ctx, strings.ToUpper(args[0]), args[1])
	case len(args) == 2 && args[0] == "resolve":
		addresses, err := net.DefaultResolver.LookupHost(ctx, args[1])
		fmt.Println(strings.Join(addresses, " "))
		return err
	case len(args) == 1 && args[0] == "sleep":
		<-ctx.Done()
		return nil
	}
	return errors.New("usage: app serve ADDRESS... | dial ADDRESS [WORDS] | web HTTP [GRPC] | webhook HTTPS CERT KEY | get URL | post URL | resolve NAME | sleep")
}

func serve(ctx context.Context, addresses []string) error {
	all, ctx := errgroup.WithContext(ctx)
	for _, a := range addresses {
		all.Go(func() error { return listen(ctx, a) })
	}
	return all.Wait()
}

func listen(ctx context.Context, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	fmt.Println("serving on", l.Addr())
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go answer(conn) // ends with its client, or with the process
	}
}

func answer(conn net.Conn) {
	defer conn.Close()
	name, _ := os.Hostname()
	fmt.Fprintf(conn, "this is %s on %s, you are %s\n", name, os.Getenv("NODE"), conn.RemoteAddr())
	_, _ = io.Copy(conn, conn) // a client that hangs up is no error
}

// patience bounds a connection. Into silence, a proxy would wait for minutes.
const patience = 20 * time.Second

func dial(ctx context.Context, address, words string) error {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(conn, words); err != nil {
		return err
	}
	answers := bufio.NewReader(conn)
	for range 2 { // the greeting, the echo
		line, err := answers.ReadString('\n')
		fmt.Print(line)
		if err != nil {
			return fmt.Errorf("answer of %s: %w", address, err)
		}
	}
	return nil
}
