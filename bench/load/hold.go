package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// openers is how many connections hold opens at the same time, openLimit
	// how long one may take, stageLimit how long all of a stage.
	openers    = 32
	openLimit  = 20 * time.Second
	stageLimit = 2 * time.Minute
)

// parseCounts reads N,N…, numbers of connections that grow.
func parseCounts(text string) (counts []int, err error) {
	last := 0
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n <= last {
			return nil, fmt.Errorf("numbers of connections %q: want numbers that grow", text)
		}
		counts, last = append(counts, n), n
	}
	return counts, nil
}

// hold opens connections until there are as many as each of the counts, and waits
// for a line after each. At the end, and when its input ends, it closes them all.
func hold(counts []int, addrs []string) error {
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	lines := bufio.NewScanner(os.Stdin)
	for _, n := range counts {
		more, err := openAll(len(conns), n, addrs)
		if err != nil {
			return err
		}
		conns = append(conns, more...)
		fmt.Println("open")
		if !lines.Scan() {
			break
		}
	}
	return lines.Err()
}

// openAll opens the connections from number first up to, without, number end.
func openAll(first, end int, addrs []string) ([]net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), stageLimit)
	defer cancel()
	conns := make([]net.Conn, end-first)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(openers)
	for i := range conns {
		g.Go(func() (err error) {
			conns[i], err = open(ctx, addrs[(first+i)%len(addrs)])
			return err
		})
	}
	return conns, g.Wait()
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
