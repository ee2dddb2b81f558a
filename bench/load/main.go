// Command load is what the benchmark needs beside iperf3 and wrk: a server that
// costs little, and many connections that do nothing.
//
//	load answer PORT…          answers HTTP requests on these ports
//	load hold N HOST:PORT…     opens N connections, spread over these addresses,
//	                           one request on each; prints "open", and holds them
//	                           until its standard input ends
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	request    = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
	answer     = "HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + body
	lastAnswer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 64\r\n\r\n" + body
	body       = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	// openers is how many connections hold opens at the same time, openLimit
	// how long one may take.
	openers   = 32
	openLimit = 20 * time.Second
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "load: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 2 && args[0] == "answer":
		return serve(args[1:])
	case len(args) >= 3 && args[0] == "hold":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("number of connections: %w", err)
		}
		return hold(n, args[2:])
	}
	return fmt.Errorf("arguments %q: want answer PORT… or hold N HOST:PORT…", args)
}

func serve(ports []string) error {
	var g errgroup.Group
	for _, p := range ports {
		l, err := net.Listen("tcp", ":"+p)
		if err != nil {
			return err
		}
		g.Go(func() error { return acceptAll(l) })
	}
	return g.Wait()
}

func acceptAll(l net.Listener) error {
	var open sync.WaitGroup
	defer open.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		open.Go(func() { serveConn(c) })
	}
}

// serveConn answers until the client ends, or asks for the end. It closes first
// then, so that the client's ports are free at once.
func serveConn(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 1024)
	have := 0
	for {
		n, err := c.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		if !bytes.HasSuffix(buf[:have], []byte("\r\n\r\n")) {
			if have == len(buf) {
				return
			}
			continue
		}
		if bytes.Contains(buf[:have], []byte("Connection: close")) {
			io.WriteString(c, lastAnswer)
			return
		}
		have = 0
		if _, err := io.WriteString(c, answer); err != nil {
			return
		}
	}
}

func hold(n int, addrs []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conns := make([]net.Conn, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(openers)
	for i := range conns {
		g.Go(func() error {
			c, err := open(ctx, addrs[i%len(addrs)])
			conns[i] = c
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Println("open")
	_, err := io.Copy(io.Discard, os.Stdin)
	for _, c := range conns {
		c.Close()
	}
	return err
}

// open connects, and makes sure by one request that it really is.
func open(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: openLimit}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(openLimit))
	if _, err := io.WriteString(c, request); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(c, make([]byte, len(answer))); err != nil {
		return nil, fmt.Errorf("answer from %s: %w", addr, err)
	}
	return c, c.SetDeadline(time.Time{})
}
