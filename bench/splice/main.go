// Command splice is the measure for Tacit's cost: a proxy that accepts, dials and
// copies, and nothing else. Two of them stand where Tacit's two proxies would
// stand. Nothing of Tacit is in it: io.Copy between two TCP connections is
// Go's own splice(2).
//
// With --copy the bytes pass through the process, in buffers of 256 KiB, as they
// have to in any proxy that encrypts without the kernel's help: what Tacit costs
// beyond that is encryption and capture.
//
//	splice [--copy] LISTEN=TO…    accepts at LISTEN, leads to TO; both are HOST:PORT
package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "splice: %v\n", err)
		os.Exit(1)
	}
}

// run serves each LISTEN=TO until a listener breaks.
func run(args []string) error {
	flags := flag.NewFlagSet("splice", flag.ContinueOnError)
	var p proxy
	flags.BoolVar(&p.copies, "copy", false, "take the bytes through the process")
	if err := flags.Parse(args); err != nil {
		return err
	}
	pairs := flags.Args()
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
		go func() { broken <- p.serve(l, to) }()
	}
	return <-broken
}

// proxy says how bytes are carried.
type proxy struct{ copies bool }

func (p proxy) serve(l net.Listener, to string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go p.carry(c.(*net.TCPConn), to)
	}
}

func (p proxy) carry(c *net.TCPConn, to string) {
	defer c.Close()
	d, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer d.Close()
	var back sync.WaitGroup
	back.Go(func() { p.copyHalf(c, d.(*net.TCPConn)) })
	p.copyHalf(d.(*net.TCPConn), c)
	back.Wait()
}

// copyHalf carries one direction and its end.
func (p proxy) copyHalf(to, from *net.TCPConn) {
	if err := p.copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}

func (p proxy) copy(to, from *net.TCPConn) error {
	if !p.copies {
		_, err := io.Copy(to, from)
		return err
	}
	// Hidden as plain io.Writer and io.Reader, so that nothing is spliced.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 256<<10))
	return err
}
