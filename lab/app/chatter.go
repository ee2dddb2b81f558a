package app

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"tacit.dev/pause"
)

// news sends a line now and then without being asked, and echoes what comes: both
// sides of the connection speak first after a silence.
func news(_ *server, c *net.TCPConn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(c, c)
	}()
	tick := time.NewTicker(newsPace)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		if _, err := io.WriteString(c, secret); err != nil {
			c.Close()
			<-done
			return
		}
	}
}

const (
	// secret is what must never be seen on the wire.
	secret   = "the salary of Ada\n"
	newsPace = 300 * time.Millisecond
	// chatLimit is when somebody who chatters takes an answer for lost.
	chatLimit = 3 * time.Second
)

// chatter HOST:PORT: workers that connect, speak and listen, some for a moment and some
// for seconds, until it is told to end. What fails is counted and tried again: it is for
// those who watch the wire meanwhile.
func chatter(ctx context.Context, words []string, out io.Writer) error {
	flags := flag.NewFlagSet("chatter", flag.ContinueOnError)
	workers := flags.Int("workers", 4, "connections at a time")
	if err := flags.Parse(words); err != nil {
		return err
	}
	var answered, failed atomic.Int64
	var g sync.WaitGroup
	for range *workers {
		g.Go(func() {
			for ctx.Err() == nil {
				err := chat(ctx, flags.Arg(0), &answered)
				if err != nil {
					failed.Add(1)
				}
				pause.For(ctx, 20*time.Millisecond)
			}
		})
	}
	g.Wait()
	fmt.Fprintf(out, "answered %d, failed %d\n", answered.Load(), failed.Load())
	return nil
}

// chat is one connection of a few exchanges with silences between them.
func chat(ctx context.Context, address string, answered *atomic.Int64) error {
	c, err := net.DialTimeout("tcp", address, chatLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 1 + rand.N(4) {
		if err := c.SetDeadline(time.Now().Add(chatLimit)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, secret); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, len(secret))); err != nil {
			return err
		}
		answered.Add(1)
		pause.For(ctx, rand.N(1200*time.Millisecond))
	}
	return nil
}
