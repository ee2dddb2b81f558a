package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"tacit.dev/pause"
)

// talk is what two applications say to each other over one connection, and how it ends. Both
// know it from a seed.
type talk struct {
	end talkEnd
	// says are the lengths of what the client and the server write, one after the other, and
	// rests for how long each is quiet before.
	says  [2][]int
	rests [2][]time.Duration
	bytes [2]*rand.ChaCha8
}

type talkEnd uint64

const (
	endBoth talkEnd = iota // each ends its direction when it has said all
	endClientFirst
	endServerFirst
	resetByClient
	resetByServer
)

func newTalk(seed uint64) *talk {
	rnd := rand.New(rand.NewPCG(seed, 0))
	k := &talk{end: talkEnd(rnd.Uint64N(5))}
	for i := range k.says {
		k.bytes[i] = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(i)})
		for range 1 + rnd.IntN(12) {
			size, rest := 1+rnd.IntN(3000), time.Duration(0)
			if rnd.IntN(20) == 0 {
				size = rnd.IntN(300_000)
			}
			if rnd.IntN(6) == 0 {
				rest = time.Duration(rnd.IntN(700)) * time.Millisecond
			}
			k.says[i], k.rests[i] = append(k.says[i], size), append(k.rests[i], rest)
		}
	}
	return k
}

// run is one end of it: 0 is the client, 1 the server.
func (k *talk) run(t *testing.T, c *net.TCPConn, me int) error {
	heard := make(chan error, 1)
	ended := make(chan struct{})
	go func() { heard <- k.hear(c, 1-me); close(ended) }()
	waits := k.end == endClientFirst && me == 1 || k.end == endServerFirst && me == 0
	var err error
	for i, n := range k.says[me] {
		pause.For(t.Context(), k.rests[me][i])
		if waits && i == len(k.says[me])-1 {
			<-ended
		}
		p := make([]byte, n)
		k.bytes[me].Read(p)
		if _, err = c.Write(p); err != nil {
			break
		}
	}
	early := false // it has heard the end before it had ended its own direction
	select {
	case <-ended:
		early = true
	default:
	}
	switch {
	case k.end == resetByClient && me == 0, k.end == resetByServer && me == 1:
		c.SetLinger(0)
		c.Close()
		<-heard
		return nil
	case err == nil:
		err = c.CloseWrite()
	}
	hearErr := <-heard
	c.Close()
	if k.end >= resetByClient {
		if hearErr == nil && early { // if both have ended their directions, a reset tells nothing
			return errors.New("an orderly end of a connection that was reset")
		}
		return nil
	}
	return errors.Join(err, hearErr)
}

// hear reads all that an end says, to its end. A reset is an error.
func (k *talk) hear(c *net.TCPConn, from int) error {
	want := rand.NewChaCha8([32]byte{})
	*want = *k.bytes[from]
	b, w := make([]byte, 10_000), make([]byte, 10_000)
	got, all := 0, 0
	for _, n := range k.says[from] {
		all += n
	}
	for {
		n, err := c.Read(b)
		want.Read(w[:n])
		if string(b[:n]) != string(w[:n]) {
			return fmt.Errorf("other bytes than were sent, between %d and %d", got, got+n)
		}
		got += n
		switch {
		case err == io.EOF && got == all:
			return nil
		case err == io.EOF:
			return fmt.Errorf("an orderly end after %d of %d bytes", got, all)
		case err != nil:
			return err
		}
	}
}

// Many connections open, talk, are quiet, end one direction, reset and close at random: nobody
// gets other bytes, or less than all and an orderly end, and afterwards nothing is left.
func TestManyAtRandom(t *testing.T) {
	many, _ := strconv.Atoi(os.Getenv("TACIT_MANY"))
	many = max(many, 400)
	needDescriptors(t, 10_000)
	c, client, server := pair(t)
	failed := make(chan error, 2*many)
	server.serve(1, func(c *net.TCPConn) {
		var head [8]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return // reset at once
		}
		seed := binary.BigEndian.Uint64(head[:])
		k := newTalk(seed)
		if err := k.run(t, c, 1); err != nil {
			failed <- fmt.Errorf("server, seed %d, end %d: %w", seed, k.end, err)
		}
	})
	goroutines, files := c.settle(t, client)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	turns := make(chan struct{}, 300)
	for i := range many {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			k := newTalk(seed + uint64(i))
			conn, err := client.dial(server.at(i%2 == 0, 1))
			if err == nil {
				_, err = conn.Write(binary.BigEndian.AppendUint64(nil, seed+uint64(i)))
			}
			if err == nil {
				err = k.run(t, conn, 0)
			}
			if err != nil {
				failed <- fmt.Errorf("client, seed %d, end %d: %w", seed+uint64(i), k.end, err)
			}
		})
	}
	wg.Wait()
	c.nothingLeft(t, client, goroutines, files)
	for len(failed) > 0 {
		t.Error(<-failed)
	}
}

// settle waits until no connection is open, and returns how many goroutines and descriptors
// there are then.
func (c *cluster) settle(t *testing.T, client *testPod) (goroutines, files int) {
	await(t, "no connection is open", func() bool {
		return c.nodes[0].count("tacit_connections_open")+c.nodes[1].count("tacit_connections_open") == 0
	})
	for _, n := range c.nodes {
		for range 6 {
			for _, d := range n.proxy.list() {
				d.sockets4.trim()
				d.sockets6.trim()
			}
		}
	}
	client.mu.Lock()
	spares := len(client.spares[4]) + len(client.spares[6])
	client.mu.Unlock()
	return runtime.NumGoroutine(), descriptors(t) - spares
}

// nothingLeft waits until there are no more goroutines and descriptors than before.
func (c *cluster) nothingLeft(t *testing.T, client *testPod, goroutines, files int) {
	t.Helper()
	var g, f int
	for end := time.Now().Add(4 * limit); ; runtime.Gosched() {
		if g, f = c.settle(t, client); g <= goroutines && f <= files+8 {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	t.Errorf("%d goroutines and %d descriptors: %d and %d before", g, f, goroutines, files)
}
