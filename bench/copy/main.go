// Command splice is the measure for Tacit's cost: a proxy that accepts, dials and
// copies, and nothing else. Two of them stand where Tacit's two proxies would
// stand. Nothing of Tacit is in it: io.Copy between two TCP connections is
// Go's own splice(2).
//
//	splice LISTEN=TO…    accepts at LISTEN, leads to TO; both are HOST:PORT
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
)

var bs = func() int { n, _ := strconv.Atoi(os.Getenv("BS")); return n }()

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "splice: %v\n", err)
		os.Exit(1)
	}
}

// run serves each LISTEN=TO until a listener breaks.
func run(pairs []string) error {
	broken := make(chan error, len(pairs))
	for _, pair := range pairs {
		listen, to, ok := strings.Cut(pair, "=")
		if !ok {
			return fmt.Errorf("argument %q: want HOST:PORT=HOST:PORT", pair)
		}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return err
		}
		go func() { broken <- serve(l, to) }()
	}
	return <-broken
}

func serve(l net.Listener, to string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go carry(c.(*net.TCPConn), to)
	}
}

func carry(c *net.TCPConn, to string) {
	defer c.Close()
	d, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer d.Close()
	var back sync.WaitGroup
	back.Go(func() { copyHalf(c, d.(*net.TCPConn)) })
	copyHalf(d.(*net.TCPConn), c)
	back.Wait()
}

// copyHalf carries one direction and its end.
func copyHalf(to, from *net.TCPConn) {
	if _, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, bs)); err != nil {
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}
