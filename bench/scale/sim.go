package main

import (
	"context"
	"flag"
	"io"
	"net/rpc"
	"os"
	"strings"
	"time"

	"tacit.dev/bench/scale/cluster"
	"tacit.dev/bench/scale/fleet"
)

// runFleet is the process of the simulated nodes. It is told by calls over standard input and
// output what they do, and ends with standard input.
func runFleet(ctx context.Context, args []string) error {
	var cfg fleet.Config
	s := flag.NewFlagSet("fleet", flag.ContinueOnError)
	nodes := s.Int("nodes", 0, "how many")
	to := s.String("control", "", "HOST:PORT of each replica of control, separated by commas")
	s.StringVar(&cfg.Tokens, "tokens", "", "folder of the tokens")
	s.StringVar(&cfg.Bundle, "bundle", "", "file of the roots")
	if err := s.Parse(args); err != nil {
		return err
	}
	for i := range *nodes {
		cfg.Names = append(cfg.Names, cluster.NodeName(i))
	}
	cfg.Control, cfg.Addresses = strings.Split(*to, ","), cluster.Addresses
	f := fleet.New(cfg)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	server := rpc.NewServer()
	if err := server.RegisterName("Fleet", &Calls{f: f, ctx: ctx}); err != nil {
		return err
	}
	go serveCalls(server, cancel) // ends with the process at the latest
	return f.Run(ctx)
}

func serveCalls(s *rpc.Server, cancel context.CancelFunc) {
	s.ServeConn(duplex{os.Stdin, os.Stdout})
	cancel()
}

// duplex is two pipes as one connection.
type duplex struct {
	io.ReadCloser
	w io.WriteCloser
}

func (d duplex) Write(b []byte) (int, error) { return d.w.Write(b) }

func (d duplex) Close() error {
	d.w.Close()
	return d.ReadCloser.Close()
}

// Calls are what the process of the nodes can be asked for.
type Calls struct {
	f   *fleet.Fleet
	ctx context.Context
}

// None is for calls without an argument, or an answer.
type None struct{}

// Join lets all nodes connect over a time, Cut ends all connections until then.
func (c *Calls) Join(spread time.Duration, _ *None) error { c.f.Join(spread); return nil }

// Cut is the opposite of Join.
func (c *Calls) Cut(None, *None) error { c.f.Cut(); return nil }

// Status tells how far all nodes are.
func (c *Calls) Status(_ None, s *fleet.Status) error { *s = c.f.Status(); return nil }

// Watch begins to take note of who was told what, or ends it.
func (c *Calls) Watch(on bool, _ *None) error {
	if on {
		c.f.Watch()
	} else {
		c.f.Unwatch()
	}
	return nil
}

// Seen tells how far the word of resources has come.
func (c *Calls) Seen(names []string, s *[]fleet.Seen) error { *s = c.f.Seen(names); return nil }

// Starts tells of the pods that began since a time.
func (c *Calls) Starts(since int64, s *[]fleet.Start) error { *s = c.f.Starts(since); return nil }

// Freeze freezes the last nodes, and thaws the others.
func (c *Calls) Freeze(n int, _ *None) error { c.f.Freeze(n); return nil }

// Fresh has a node forget everything and connect again.
func (c *Calls) Fresh(i int, _ *None) error { c.f.Fresh(i); return nil }

// Served tells since when a node is served.
func (c *Calls) Served(i int, at *int64) error { *at = c.f.Served(i); return nil }

// Renew has every node ask for a certificate.
func (c *Calls) Renew(_ None, r *fleet.Renewals) error { *r = c.f.Renew(c.ctx); return nil }
