// Command load is what the benchmark needs beside iperf3 and wrk: a server that
// costs little, and many connections that do nothing.
//
//	load answer PORT…          answers HTTP requests on these ports
//	load hold N,N… HOST:PORT…  opens N connections, spread over these addresses,
//	                           one request on each; prints "open", and holds them.
//	                           After a line of its standard input it opens more,
//	                           until there are as many as the next number says.
//	                           After the last line, or at the end of its input, it
//	                           closes them
package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
)

const (
	request    = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
	answer     = "HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + body
	lastAnswer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 64\r\n\r\n" + body
	body       = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
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
		counts, err := parseCounts(args[1])
		if err != nil {
			return err
		}
		return hold(counts, args[2:])
	}
	return fmt.Errorf("arguments %q: want answer PORT… or hold N,N… HOST:PORT…", args)
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
